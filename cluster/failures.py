"""What went wrong with a job, and whether to try it again. Pure: exceptions are looked at by name, text and errno."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What follows a failed attempt.

    Args:
        attempts: how often a job may fail this way before it is given up.
        smaller: the next attempt is told to take less memory at a time.
        elsewhere_from: from this attempt on another worker takes it, if there is one.
        hurts_worker: the job is suspected of having brought its worker down.
        stops_sweep: no other job would fare better.
    """

    attempts: int = 1
    smaller: bool = False
    elsewhere_from: int | None = None
    hurts_worker: bool = False
    stops_sweep: bool = False


POLICIES = {
    # A smaller batch first, then a worker with perhaps more memory to spare.
    "out_of_memory": Policy(attempts=3, smaller=True, elsewhere_from=3),
    # Three dead workers are no accident: the job is quarantined.
    "worker_lost": Policy(attempts=3, hurts_worker=True),
    # No fault of the job; nodes that come and go must not use up its attempts.
    "node_lost": Policy(attempts=20),
    "stuck": Policy(attempts=2, elsewhere_from=2, hurts_worker=True),
    # What the job reads was damaged or is gone; whoever found it has set it aside, and it is made again.
    "damaged": Policy(attempts=3),
    # Another node may have what this one lacks.
    "data": Policy(attempts=2, elsewhere_from=2),
    "disk": Policy(stops_sweep=True),
    # Trying again changes nothing: numbers that a method cannot work with, bad input, a defect.
    "numerical": Policy(),
    "refused": Policy(),
    "error": Policy(),
}
QUARANTINED = "quarantined"
"""The kind of a job that was given up because it brings workers down."""

_LOST = {
    "ActorDiedError",
    "ActorUnavailableError",
    "ActorUnschedulableError",
    "NodeDiedError",
    "OwnerDiedError",
    "RayActorError",
    "WorkerCrashedError",
}
_NODE_DIED = ("its node has died", "node was terminated", "doesn't exist any more")
_NODE_OUT_OF_MEMORY = ("NODE_OUT_OF_MEMORY", "running low on memory")
# torch_npu raises some of them as plain RuntimeErrors, in words of its own. Not run on hardware.
_NPU_OUT_OF_MEMORY = ("NPU out of memory", "host out of memory")
_DISK = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG}
# By name, most special first; packages that must not know this one raise most of them.
_NAMED = {
    "OutOfMemoryError": "out_of_memory",
    "MemoryError": "out_of_memory",
    "DamagedFileError": "damaged",
    "NumericalError": "numerical",
    "LinAlgError": "numerical",
    "DataError": "data",
    "QuantizationError": "refused",
    "EvaluationError": "refused",
    "BitatlasError": "refused",
}
_PLAIN = {"out_of_memory", "damaged", "numerical", "data", "refused"}  # their messages need no exception's name


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failed attempt.

    Args:
        kind: a key of `POLICIES`.
        message: one line for tables and terminals.
        detail: the traceback, for the log.
    """

    kind: str
    message: str
    detail: str = ""

    @property
    def policy(self) -> Policy:
        """What is done about it."""
        return POLICIES[self.kind]


@dataclass
class Attempts:
    """How a job failed so far.

    Args:
        kinds: kind -> how often.
        workers: those on which it failed, the last one last.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    workers: list[str] = field(default_factory=list)

    def add(self, failure: Failure, worker: str) -> None:
        """Another attempt failed."""
        self.kinds[failure.kind] += 1
        self.workers.append(worker)

    def retry(self, failure: Failure) -> bool:
        """Whether the job should be tried again after `failure`, which was added already."""
        return self.kinds[failure.kind] < failure.policy.attempts

    def final(self, failure: Failure) -> Failure:
        """`failure` as the row of a job that is given up tells it."""
        count = self.kinds[failure.kind]
        if failure.policy.hurts_worker and count > 1:
            what = "brought down" if failure.kind == "worker_lost" else "hung on"
            told = f"{what} {count} workers, the last one so: {failure.message}"
            return Failure(kind=QUARANTINED, message=told, detail=failure.detail)
        tries = f" (tried {count} times)" if count > 1 else ""
        return Failure(kind=failure.kind, message=failure.message + tries, detail=failure.detail)

    def memory_share(self) -> float:
        """How much memory at a time the next attempt may take, of what the first one did."""
        smaller: Mapping[str, Policy] = {kind: policy for kind, policy in POLICIES.items() if policy.smaller}
        return float(0.5 ** sum(self.kinds[kind] for kind in smaller))

    def avoid(self, failure: Failure) -> frozenset[str]:
        """Workers that should not have the next attempt while there are others."""
        start = failure.policy.elsewhere_from
        return frozenset(self.workers if start is not None and self.kinds[failure.kind] + 1 >= start else ())


def classify(error: BaseException, detail: str = "") -> Failure:
    """The failure that an exception stands for."""
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    message = (text.strip().splitlines() or [type(error).__name__])[0]
    if names & _LOST:
        return Failure(kind=_kind_of_loss(names, text), message=message, detail=detail)
    if isinstance(error, OSError) and error.errno in _DISK:
        return Failure(kind="disk", message=message, detail=detail)
    kind = next((kind for name, kind in _NAMED.items() if name in names), "error")
    if is_out_of_memory(error):
        kind = "out_of_memory"
    told = message if kind in _PLAIN else f"{type(error).__name__}: {message}"
    return Failure(kind=kind, message=told, detail=detail)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the process had no memory left."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {name for name, kind in _NAMED.items() if kind == "out_of_memory"}:
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NPU_OUT_OF_MEMORY)


def _kind_of_loss(names: set[str], text: str) -> str:
    if any(sign in text for sign in _NODE_OUT_OF_MEMORY):
        return "out_of_memory"
    is_node = "NodeDiedError" in names or any(sign in text for sign in _NODE_DIED)
    return "node_lost" if is_node else "worker_lost"
