"""What went wrong with a job, and whether to try it again. Pure: exceptions are looked at by name and errno."""

from __future__ import annotations

import errno
from dataclasses import dataclass

# Kind -> how often a job is tried in all before it is a failed row.
ATTEMPTS = {"worker_lost": 3, "out_of_memory": 2, "disk": 1, "refused": 1, "error": 1}

_LOST = {
    "ActorDiedError",
    "ActorUnavailableError",
    "ActorUnschedulableError",
    "NodeDiedError",
    "OwnerDiedError",
    "RayActorError",
    "WorkerCrashedError",
}
_MEMORY = {"OutOfMemoryError", "MemoryError"}
_DISK = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG}
# Errors of our own packages that say exactly what is wrong with the input: trying again changes nothing.
_REFUSED = {"QuantizationError", "EvaluationError", "BitatlasError"}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failed attempt.

    Args:
        kind: a key of `ATTEMPTS`.
        message: one line for tables and terminals.
        detail: the traceback, for the log.
    """

    kind: str
    message: str
    detail: str = ""

    def retry(self, attempt: int) -> bool:
        """Whether another attempt should follow attempt number `attempt` (1 is the first)."""
        return attempt < ATTEMPTS[self.kind]

    @property
    def stops_sweep(self) -> bool:
        """Whether no other job would fare better."""
        return self.kind == "disk"


def classify(error: BaseException, detail: str = "") -> Failure:
    """The failure that an exception stands for."""
    names = {kind.__name__ for kind in type(error).__mro__}
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if names & _LOST:
        return Failure(kind="worker_lost", message=message, detail=detail)
    if names & _MEMORY:
        return Failure(kind="out_of_memory", message=message, detail=detail)
    if isinstance(error, OSError) and error.errno in _DISK:
        return Failure(kind="disk", message=message, detail=detail)
    if names & _REFUSED:
        return Failure(kind="refused", message=message, detail=detail)
    return Failure(kind="error", message=f"{type(error).__name__}: {message}", detail=detail)
