"""The Ray actor that is a worker: owns one device, or its share of one, and does one job at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.devices import Claim, DeviceKind, claim, limit_memory
from cluster.failures import Failure
from cluster.placement import Place
from cluster.pool import Payload, attempt, make_worker
from cluster.witness import Witness

# Threads of their own for what must answer while a job runs: `activity`, and `vigil`, which never returns.
_WATCH = "watch"
_WATCH_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How every worker of a pool is made.

    Args:
        factory: "module:attribute" of the worker class.
        kind: of its device.
        threads: its CPU cores.
        per_device: workers that share a device.
        environment: variables for its process.
        witness: what it is to look for when it starts; None is nothing.
    """

    factory: str
    kind: DeviceKind
    threads: int
    per_device: int
    environment: Mapping[str, str]
    witness: Witness | None = None


class WorkerActor:
    """Lives in the worker process."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        """Make sure of the device; the worker does the rest when its first job comes.

        Raises:
            ClusterError: the device is not there.
        """
        self._name = name
        self._witness = recipe.witness
        self._line = ""
        self._beat = time.monotonic()
        device = claim(recipe.kind)
        limit_memory(device, 1 / recipe.per_device)
        self._device = device
        self._worker = make_worker(recipe.factory, device, recipe.threads, self._report)

    def __repr__(self) -> str:
        """The worker's name, as Ray's dashboard and logs show it."""
        return self._name

    def _report(self, line: str) -> None:
        self._line = line
        self._beat = time.monotonic()

    def describe(self) -> tuple[Claim, int, bool]:
        """The device, this process's id, and whether it sees the witness (where there is none to see, it does)."""
        return self._device, os.getpid(), self._witness is None or self._witness.is_seen

    def run(self, payload: Payload) -> tuple[Any, Failure | None, float]:
        """Do a job; what it made or why it failed, and its seconds."""
        started = self._beat = time.monotonic()
        result, failure = attempt(self._worker, payload)
        self._line = ""
        return result, failure, time.monotonic() - started

    def activity(self) -> tuple[str, float]:
        """The last line that the job reported, and seconds since it showed any progress."""
        return self._line, time.monotonic() - self._beat

    def vigil(self) -> None:
        """Never return: the caller learns of the process's end, also while it is idle."""
        threading.Event().wait()


def start(recipe: Recipe, place: Place) -> Any:
    """An actor at its place, by its name; a handle, while it is still starting.

    Raises:
        ValueError: the name is taken still, by an actor that is about to end.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {
        "name": place.name,
        "num_cpus": recipe.threads,
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(place.node_id, soft=False),
    }
    if recipe.kind.resource == "NPU":
        options["resources"] = {"NPU": 1 / recipe.per_device}
    elif recipe.kind.resource == "GPU":
        options["num_gpus"] = 1 / recipe.per_device
    if recipe.environment:
        options["runtime_env"] = {"env_vars": dict(recipe.environment)}
    return ray.remote(concurrency_groups={_WATCH: _WATCH_THREADS}, **options)(WorkerActor).remote(recipe, place.name)


def watch(method: Any) -> Any:
    """Call a method of an actor on a thread that a running job leaves free; a reference."""
    # No task events: questions would push the jobs out of what the dashboard remembers.
    return method.options(concurrency_group=_WATCH, enable_task_events=False).remote()


def end(handle: Any, node_id: str, process_id: int | None) -> None:
    """End an actor for sure: Ray asks its process to leave, which one that hangs in native code never hears."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.kill(handle, no_restart=True)
    if process_id is not None:
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(_kill).remote(process_id)


def _kill(process_id: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)
