"""Workers as the driver sees them: one job in flight each, results as they come. Two twins implement `Pool`:
`InlinePool` here (same process, for tests and small machines) and `RayPool`.

A worker is an object made by a factory, named "module:attribute" and called with the claimed device, a number of
threads and a `report` function for one-line progress. Its `run(payload)` takes and returns plain data.
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.devices import KINDS, Claim, claim
from cluster.failures import Failure, classify

Payload = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """A worker's name (`cpu-0@host`) and device.

    Args:
        sees_output: whether it sees the file that was to tell it so (`witness.py`).
        software: as in its `Claim`; `cpu_fallback` likewise.
    """

    name: str
    device: str
    process_id: int
    sees_output: bool = True
    software: Mapping[str, str] = field(default_factory=dict)
    cpu_fallback: bool | None = None

    @property
    def node(self) -> str:
        """What the names of its node's workers have in common."""
        return self.name.rpartition("@")[2]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One job's end: a result or a failure."""

    worker: str
    result: Any = None
    failure: Failure | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Change:
    """A worker that joined or left the pool, or did not start.

    Args:
        reason: why it is not there; None where it joined.
    """

    worker: WorkerInfo
    reason: Failure | None = None


class Pool(Protocol):
    """What the driver needs of a cluster."""

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        """Workers that can take a job now or after the one they have: one mapping, which changes as they come and
        go."""

    def submit(self, worker: str, payload: Payload) -> None:
        """Give an idle worker a job."""

    def wait(self, seconds: float) -> list[Completion]:
        """Completions so far; waits up to `seconds` for the first. The job of a worker that was lost is a completion
        with a failure; the worker is replaced in time, under the same name, if the cluster allows.

        Raises:
            ClusterError: no worker is left, and none can be expected.
        """

    def changes(self) -> list[Change]:
        """Workers that joined or left since this was asked last."""

    def activity(self) -> Mapping[str, str]:
        """Worker -> the last line it reported."""

    def close(self) -> None:
        """Let all workers go."""


def make_worker(factory: str, device: Claim, threads: int, report: Callable[[str], None]) -> Any:
    """The worker object that `factory` ("module:attribute") makes."""
    module, _, attribute = factory.partition(":")
    return getattr(importlib.import_module(module), attribute)(device=device, threads=threads, report=report)


def attempt(worker: Any, payload: Payload) -> tuple[Any, Failure | None]:
    """Run a job; an exception becomes a `Failure`, so that it travels as plain data."""
    try:
        return worker.run(payload), None
    except Exception as error:
        return None, classify(error, traceback.format_exc())


class InlinePool:
    """One worker in this process; `wait` runs its job."""

    def __init__(self, factory: str, threads: int = 1) -> None:
        """Make the worker on the CPU."""
        self._line = ""
        device = claim(KINDS["cpu"])
        self._worker = make_worker(factory, device, threads, self._report)
        self._name = "cpu-0@inline"
        self._info = WorkerInfo(name=self._name, device=device.name, process_id=0, software=device.software)
        self._queue: deque[Payload] = deque()

    def _report(self, line: str) -> None:
        self._line = line

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        """The one worker."""
        return {self._name: self._info}

    def submit(self, worker: str, payload: Payload) -> None:
        """Queue a job."""
        if worker != self._name:
            raise AssertionError(f"no worker {worker!r}")
        self._queue.append(payload)

    def wait(self, seconds: float) -> list[Completion]:
        """Run the queued job here and now."""
        if not self._queue:
            time.sleep(seconds)
            return []
        started = time.perf_counter()
        result, failure = attempt(self._worker, self._queue.popleft())
        seconds = time.perf_counter() - started
        return [Completion(worker=self._name, result=result, failure=failure, seconds=seconds)]

    def changes(self) -> list[Change]:
        """None ever."""
        return []

    def activity(self) -> Mapping[str, str]:
        """The worker's last line."""
        return {self._name: self._line}

    def close(self) -> None:
        """Nothing to let go."""
