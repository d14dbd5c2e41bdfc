"""`Pool` on Ray: one actor per device."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from cluster.devices import DeviceKind, claim
from cluster.errors import ClusterError
from cluster.failures import Failure, classify
from cluster.pool import Completion, Payload, WorkerInfo, attempt, make_worker
from cluster.session import Session

_START_SECONDS = 180
_WATCH_SECONDS = 1.0


class _Actor:
    """Lives in the worker process; `activity` answers while `run` is busy."""

    def __init__(self, factory: str, kind: DeviceKind, threads: int, slot: str = "worker") -> None:
        self._slot = slot
        self._line = ""
        self._device = claim(kind)
        self._worker = make_worker(factory, self._device, threads, self._report)

    def _report(self, line: str) -> None:
        self._line = line

    def __repr__(self) -> str:
        """The worker's name, as Ray's dashboard and logs show it."""
        import ray

        return f"{self._slot}@{ray.util.get_node_ip_address()}"

    def describe(self) -> tuple[str, int, str]:
        import ray

        return self._device.name, os.getpid(), ray.util.get_node_ip_address()

    def run(self, payload: Payload) -> tuple[Any, Failure | None, float]:
        started = time.perf_counter()
        result, failure = attempt(self._worker, payload)
        self._line = ""
        return result, failure, time.perf_counter() - started

    def activity(self) -> str:
        return self._line


class RayPool:
    """Actors that each own one device; a lost one is replaced while the cluster can."""

    def __init__(self, session: Session, factory: str, environment: Mapping[str, str] | None = None) -> None:
        """Start the workers and wait until each has made sure of its device.

        Args:
            factory: "module:attribute" of the worker class.
            environment: variables for the worker processes.
        Raises:
            ClusterError: a worker did not start or did not get its device.
        """
        self._session = session
        self._factory = factory
        self._environment = dict(environment or {})
        self._actors: dict[str, Any] = {}
        self._infos: dict[str, WorkerInfo] = {}
        self._running: dict[Any, str] = {}
        self._starts: Counter[str] = Counter()  # by slot
        self._lines: dict[str, str] = {}
        self._watches: dict[Any, str] = {}
        self._watched_at = 0.0
        slots = [f"{session.kind.name}-{index}" for index in range(session.count)]
        handles = {slot: self._start(slot) for slot in slots}  # all at once: each takes seconds
        for slot, handle in handles.items():
            self._adopt(slot, handle)

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        """Live workers by name."""
        return self._infos

    def _start(self, slot: str) -> Any:
        import ray

        kind, threads = self._session.kind, self._session.threads
        options: dict[str, Any] = {"num_cpus": threads, "max_restarts": 0, "max_task_retries": 0}
        # A name is taken for some seconds after its actor was lost, so a replacement has another. Two drivers have two
        # namespaces.
        self._starts[slot] += 1
        options["name"] = slot if self._starts[slot] == 1 else f"{slot} ({self._starts[slot]})"
        if kind.resource == "NPU":
            options["resources"] = {"NPU": 1}
        elif kind.resource == "GPU":
            options["num_gpus"] = 1
        if self._environment:
            options["runtime_env"] = {"env_vars": self._environment}
        # The watch group has a thread of its own, so that `activity` answers while `run` is busy.
        actor = ray.remote(concurrency_groups={"watch": 1}, **options)(_Actor)
        return actor.remote(self._factory, kind, threads, slot)

    def _adopt(self, slot: str, handle: Any) -> None:
        import ray

        try:
            device, process_id, host = ray.get(handle.describe.remote(), timeout=_START_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"worker {slot} did not start within {_START_SECONDS} s: its device or cores are taken by another job"
            ) from error
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise ClusterError(f"worker {slot} did not start: {str(cause).strip().splitlines()[-1]}") from error
        name = f"{slot}@{host}"
        self._actors[name] = handle
        self._infos[name] = WorkerInfo(name=name, device=device, process_id=process_id)

    def submit(self, worker: str, payload: Payload) -> None:
        """Give an idle worker a job."""
        handle = self._actors[worker]
        name = str(payload.get("label", "job"))
        self._running[handle.run.options(name=name).remote(payload)] = worker

    def wait(self, seconds: float) -> list[Completion]:
        """Completions so far, waiting up to `seconds` for the first."""
        import ray

        if not self._running:
            time.sleep(seconds)
            return []
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=seconds)
        if ready:  # whatever else has ended meanwhile
            more, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            ready = list({*ready, *more})
        return [self._complete(reference) for reference in ready]

    def _complete(self, reference: Any) -> Completion:
        import ray

        worker = self._running.pop(reference)
        self._lines.pop(worker, None)
        try:
            result, failure, seconds = ray.get(reference)
        except ray.exceptions.RayError as error:
            failure = classify(error)
            if failure.kind != "worker_lost":
                return Completion(worker=worker, failure=failure)
            message = f"worker {worker} (process {self._infos[worker].process_id}) was lost"
            self._replace(worker)
            return Completion(worker=worker, failure=Failure(kind="worker_lost", message=message, detail=str(error)))
        return Completion(worker=worker, result=result, failure=failure, seconds=seconds)

    def _replace(self, worker: str) -> None:
        slot = worker.partition("@")[0]
        del self._actors[worker], self._infos[worker]
        self._adopt(slot, self._start(slot))

    def activity(self) -> Mapping[str, str]:
        """Worker -> the last line it reported; asked for about once a second, never waited for."""
        import ray

        if self._watches:
            ready, _ = ray.wait(list(self._watches), num_returns=len(self._watches), timeout=0)
            for reference in ready:
                worker = self._watches.pop(reference)
                try:
                    self._lines[worker] = ray.get(reference)
                except ray.exceptions.RayError:
                    self._lines.pop(worker, None)  # the loss itself arrives as the job's completion
        if time.monotonic() - self._watched_at > _WATCH_SECONDS:
            self._watched_at = time.monotonic()
            asked = set(self._watches.values())
            for worker in set(self._running.values()) - asked:
                # No task events: a question a second would push the jobs out of what the dashboard remembers.
                watch = {"concurrency_group": "watch", "enable_task_events": False}
                reference = self._actors[worker].activity.options(**watch).remote()
                self._watches[reference] = worker
        return self._lines

    def close(self) -> None:
        """Kill the actors; Ray itself ends with the session."""
        import ray

        for handle in self._actors.values():
            ray.kill(handle, no_restart=True)
        self._actors.clear()
        self._infos.clear()
        self._running.clear()
