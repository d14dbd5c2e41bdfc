"""`Pool` on Ray: one actor per place that the cluster has, for as long as it has it.

Nodes may join and leave. Every few seconds the pool looks at the cluster: it starts workers at new places, forgets
those of nodes that are gone, starts lost ones again, and ends those whose job shows no sign of life.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster import actor
from cluster.errors import ClusterError
from cluster.failures import Failure, classify
from cluster.placement import Node, Place, name_hosts, places
from cluster.pool import Change, Completion, Payload, WorkerInfo
from cluster.session import Session
from cluster.witness import Witness

_START_SECONDS = 180.0
_TEND_SECONDS = 1.0
_LOOK_SECONDS = 3.0  # between looks at the cluster's nodes; sooner after a worker was lost
_LONGEST_PAUSE_SECONDS = 60.0  # between attempts to start a worker that does not start
_GIVE_UP_SECONDS = 600.0  # without any worker, on a cluster whose nodes may come back
_MOST_QUESTIONS_PER_SECOND = 3  # to workers, about what they are doing


@dataclass
class _Starting:
    place: Place
    handle: Any
    described: Any
    since: float


@dataclass
class _Worker:
    place: Place
    handle: Any
    info: WorkerInfo
    vigil: Any  # a reference that fails when the process ends
    job: Any = None  # a reference to the result of the job that it has
    since: float = 0.0  # when it got the job
    question: Any = None
    line: str = ""
    heard: float = 0.0  # when its job was last known to get on


@dataclass
class _Pause:
    """How long to wait before a worker is started again that did not start."""

    until: float
    seconds: float


class RayPool:
    """Actors that each own one device, or share it as `Session.per_device` says."""

    def __init__(
        self,
        session: Session,
        factory: str,
        environment: Mapping[str, str] | None = None,
        *,
        stuck_seconds: float = 3600.0,
        witness: Witness | None = None,
    ) -> None:
        """Start the workers and wait until each has made sure of its device.

        Args:
            factory: "module:attribute" of the worker class.
            environment: variables for the worker processes.
            stuck_seconds: a worker whose job shows no progress for so long is ended.
            witness: by which workers tell whether they see what the driver sees; None: all do.
        Raises:
            ClusterError: a worker did not get its device, or none has started in time.
        """
        self._session = session
        self._stuck_seconds = stuck_seconds
        self._recipe = actor.Recipe(
            factory=factory,
            kind=session.kind,
            threads=session.threads,
            per_device=session.per_device,
            environment=dict(environment or {}),
            witness=witness,
        )
        self._hosts: dict[str, str] = {}
        self._starting: dict[str, _Starting] = {}
        self._workers: dict[str, _Worker] = {}
        self._infos: dict[str, WorkerInfo] = {}  # of `_workers`
        self._pauses: dict[str, _Pause] = {}
        self._changes: list[Change] = []
        self._done: list[Completion] = []  # not handed on yet
        self._tended_at = self._alive_at = time.monotonic()
        self._asked_at = self._looked_at = 0.0
        self._place()
        self._first_start()

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        """Live workers by name; one and the same mapping, kept up to date."""
        return self._infos

    def _first_start(self) -> None:
        import ray

        deadline = time.monotonic() + _START_SECONDS
        while (self._starting or not self._workers) and time.monotonic() < deadline:
            if self._starting:
                ray.wait([starting.described for starting in self._starting.values()], timeout=1.0)
            else:
                time.sleep(1.0)
            for name, error in self._adopt_started():
                if getattr(error, "actor_init_failed", False):  # else its node left meanwhile
                    raise ClusterError(f"worker {name} did not start: {_last_line(error)}")
            self._tend()
        if not self._workers:
            raise ClusterError(
                f"no {self._session.kind.name} worker started within {_START_SECONDS:.0f} s: devices or cores are "
                "taken by another job, or nodes are leaving; wait, and run the same command again"
            )

    def submit(self, worker: str, payload: Payload) -> None:
        """Give an idle worker a job."""
        mine = self._workers[worker]
        name = str(payload.get("label", "job"))
        mine.job = mine.handle.run.options(name=name).remote(payload)
        mine.line = ""
        mine.since = mine.heard = time.monotonic()

    def wait(self, seconds: float) -> list[Completion]:
        """Completions so far, waiting up to `seconds` for the first.

        Raises:
            ClusterError: no worker is left, and none can be expected.
        """
        import ray

        running = {worker.job: name for name, worker in self._workers.items() if worker.job is not None}
        if not running:
            starting = [starting.described for starting in self._starting.values()]
            if starting:
                ray.wait(starting, timeout=seconds)
            elif not self._done:
                time.sleep(seconds)
            ready = []
        else:
            ready, _ = ray.wait(list(running), num_returns=1, timeout=0 if self._done else seconds)
            if ready:  # whatever else has ended meanwhile
                ready, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
        for reference in ready:
            self._complete(running[reference])
        self._tend()
        done, self._done = self._done, []
        return done

    def changes(self) -> list[Change]:
        """Workers that joined or left since this was asked last."""
        changes, self._changes = self._changes, []
        return changes

    def _complete(self, name: str) -> None:
        """Collect the job of a worker, whatever became of it."""
        import ray

        worker = self._workers[name]
        try:
            result, failure, seconds = ray.get(worker.job)
        except ray.exceptions.RayTaskError as error:  # the job cannot even be read, or its result not be sent
            self._done.append(Completion(worker=name, failure=classify(error)))
        except ray.exceptions.RayError as error:
            self._lose(name, classify(error))
            return
        else:
            self._done.append(Completion(worker=name, result=result, failure=failure, seconds=seconds))
        worker.job, worker.line = None, ""

    def _lose(self, name: str, failure: Failure) -> None:
        """Forget a worker; its job, if it has one, failed with it."""
        worker = self._workers.pop(name)
        del self._infos[name]
        where = f"worker {name} (process {worker.info.process_id})"
        messages = {
            "worker_lost": f"{where} was lost",
            "node_lost": f"{where} was lost with its node",
            "out_of_memory": f"{where} was ended because its node ran out of memory",
        }
        failure = Failure(
            kind=failure.kind,
            message=messages.get(failure.kind, failure.message),
            detail=failure.detail or failure.message,
        )
        # A process that is out of reach may still hold its device.
        actor.end(worker.handle, worker.place.node_id, worker.info.process_id)
        self._looked_at = 0.0
        if worker.job is not None:
            self._done.append(Completion(worker=name, failure=failure, seconds=time.monotonic() - worker.since))
        self._changes.append(Change(worker=worker.info, reason=failure))

    def _tend(self) -> None:
        """Once a second: who has started, who is gone, who hangs; and now and then, what is missing."""
        now = time.monotonic()
        if now - self._tended_at < _TEND_SECONDS:
            return
        self._tended_at = now
        for name, error in self._adopt_started():
            told = Failure(kind="worker_lost", message=f"worker {name} did not start: {_last_line(error)}")
            self._changes.append(Change(worker=WorkerInfo(name=name, device="", process_id=0), reason=told))
            pause = self._pauses.get(name)
            seconds = min(2 * pause.seconds if pause else 1.0, _LONGEST_PAUSE_SECONDS)
            self._pauses[name] = _Pause(until=now + seconds, seconds=seconds)
        self._find_lost()
        self._ask(now)
        self._find_stuck(now)
        if now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            self._place()
        if not self._done:
            self._check_alive(now)

    def _adopt_started(self) -> list[tuple[str, Exception]]:
        """Take in workers that have started; those that failed to, with why."""
        import ray

        failed: list[tuple[str, Exception]] = []
        by_reference = {starting.described: name for name, starting in self._starting.items()}
        if not by_reference:
            return failed
        ready, _ = ray.wait(list(by_reference), num_returns=len(by_reference), timeout=0)
        for reference in ready:
            name = by_reference[reference]
            starting = self._starting.pop(name)
            try:
                device, process_id, sees_output = ray.get(reference)
            except ray.exceptions.RayError as error:
                failed.append((name, error))
                continue
            info = WorkerInfo(
                name=name,
                device=device.name,
                process_id=process_id,
                sees_output=sees_output,
                software=device.software,
                cpu_fallback=device.cpu_fallback,
            )
            vigil = actor.watch(starting.handle.vigil)
            self._workers[name] = _Worker(place=starting.place, handle=starting.handle, info=info, vigil=vigil)
            self._infos[name] = info
            self._pauses.pop(name, None)
            self._changes.append(Change(worker=info))
        return failed

    def _find_lost(self) -> None:
        import ray

        vigils = {worker.vigil: name for name, worker in self._workers.items()}
        if not vigils:
            return
        ended, _ = ray.wait(list(vigils), num_returns=len(vigils), timeout=0)
        for vigil in ended:
            name = vigils[vigil]
            worker = self._workers[name]
            if worker.job is not None and ray.wait([worker.job], timeout=0)[0]:
                self._complete(name)  # it may have ended just in time
            if name not in self._workers:
                continue
            try:
                ray.get(vigil)
            except ray.exceptions.RayError as error:
                self._lose(name, classify(error))

    def _find_stuck(self, now: float) -> None:
        for name in [name for name, worker in self._workers.items() if worker.job is not None]:
            silent = now - self._workers[name].heard
            if silent > self._stuck_seconds:
                told = f"no progress for {silent:.0f} s (workers.stuck_minutes), worker {name} was ended"
                self._lose(name, Failure(kind="stuck", message=told))

    def _place(self) -> None:
        """Start what the cluster has room for and is not there; what is on nodes that are gone is not waited for."""
        import ray

        nodes = [
            Node(id=node["NodeID"], address=node["NodeManagerAddress"], resources=node["Resources"])
            for node in ray.nodes()
            if node["Alive"]
        ]
        self._hosts = name_hosts(nodes, self._hosts)
        session = self._session
        wanted = places(
            nodes,
            self._hosts,
            session.kind,
            threads=session.threads,
            per_device=session.per_device,
            limit=session.limit,
        )
        alive = {node.id for node in nodes}
        for name in [name for name, one in self._starting.items() if one.place.node_id not in alive]:
            del self._starting[name]
        now = time.monotonic()
        for place in wanted:
            pause = self._pauses.get(place.name)
            if place.name in self._workers or place.name in self._starting or (pause and now < pause.until):
                continue
            if session.limit is not None and len(self._workers) + len(self._starting) >= session.limit:
                break
            try:
                handle = actor.start(self._recipe, place)
            except ValueError:  # the name belongs to one that is ending; the next round may find it free
                self._looked_at = 0.0
                continue
            self._starting[place.name] = _Starting(place, handle, handle.describe.remote(), now)

    def _check_alive(self, now: float) -> None:
        if self._workers:
            self._alive_at = now
            return
        is_hopeless = self._session.is_local and not self._hosts  # a local Ray that lost its node has no other
        if is_hopeless or now - self._alive_at > _GIVE_UP_SECONDS:
            where = "this machine's Ray" if self._session.is_local else "the cluster"
            raise ClusterError(
                f"no worker is left and none has come back: {where} has lost them all (its logs say why); what is done "
                "is kept, so mend it and run the same command again"
            )

    def activity(self) -> Mapping[str, str]:
        """Worker -> the last line it reported."""
        return {name: worker.line for name, worker in self._workers.items() if worker.line}

    def _ask(self, now: float) -> None:
        """Ask now and then what the workers are doing, and never wait for an answer."""
        import ray

        asked = {worker.question: worker for worker in self._workers.values() if worker.question is not None}
        if asked:
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
            for reference in ready:
                worker = asked[reference]
                worker.question = None
                try:
                    line, silent = ray.get(reference)
                except ray.exceptions.RayError:
                    continue  # the loss itself arrives by its job or its vigil
                if worker.job is not None:
                    worker.line, worker.heard = line, max(worker.heard, now - silent)
        if now - self._asked_at > len(self._workers) / _MOST_QUESTIONS_PER_SECOND:
            self._asked_at = now
            for worker in self._workers.values():
                if worker.job is not None and worker.question is None:
                    worker.question = actor.watch(worker.handle.activity)

    def close(self) -> None:
        """Kill the actors; Ray itself ends with the session."""
        import ray

        handles = [worker.handle for worker in self._workers.values()]
        for handle in (*handles, *(starting.handle for starting in self._starting.values())):
            ray.kill(handle, no_restart=True)
        self._workers.clear()
        self._infos.clear()
        self._starting.clear()


def _last_line(error: Exception) -> str:
    return str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
