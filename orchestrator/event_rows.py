"""Rows of the events table: what is tried, ends, fails, joins and leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from cluster.pool import WorkerInfo
from orchestrator.plan import Job


class EventRows:
    """Makes them for one session of a sweep.

    Attributes:
        workers: name -> worker, those that have left among them.
        now: the time, for rows beside events.
    """

    def __init__(
        self, *, sweep: str, session: str, workers: Mapping[str, WorkerInfo], now: Callable[[], datetime]
    ) -> None:
        """Begin a session.

        Args:
            sweep: its name.
            session: the store's.
            workers: that are there already.
            now: the store's clock, by which no event is earlier than the one before.
        """
        self.now = now
        self._sweep, self._session = sweep, session
        self.workers = dict(workers)

    def row(self, event: str, **more: Any) -> dict[str, Any]:
        """Something that happens now."""
        return {"sweep": self._sweep, "session": self._session, "event": event, "at": self.now()} | more

    def of_job(self, event: str, job: Job, worker: str, attempt: int, **more: Any) -> dict[str, Any]:
        """Something that happens to a job on a worker."""
        info = self.workers.get(worker)
        return self.row(
            event,
            job_id=job.id,
            cell_id=job.cell.id,
            job=job.label,
            attempt=attempt,
            worker=worker,
            device=info.device if info else None,
            **more,
        )

    def of_facts(self, facts: Iterable[Mapping[str, Any]], job: Job, worker: str, attempt: int) -> list[dict[str, Any]]:
        """What a worker did besides a job's result, as `facts.py` has it; told when the job came back."""
        return [self.of_job(fact["event"], job, worker, attempt, seconds=fact["seconds"]) for fact in facts]
