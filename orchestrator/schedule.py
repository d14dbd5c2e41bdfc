"""Which job next, on which worker. Pure state: no Ray, no clock, no files."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.plan import Job


class Schedule:
    """Jobs that are waiting, running, finished and failed."""

    def __init__(self, jobs: Iterable[Job], finished: Iterable[str] = ()) -> None:
        """Plan the jobs that are not finished yet.

        Args:
            jobs: in the order in which they should start.
            finished: ids of jobs whose rows are already in the store.
        """
        self.finished = set(finished)
        self.failed: set[str] = set()
        self.skipped: set[str] = set()
        self.attempts: dict[str, int] = {}
        self.running: dict[str, Job] = {}
        self._waiting = {job.id: job for job in jobs if job.id not in self.finished}
        self._cell_of: dict[str, str] = {}

    @property
    def unfinished(self) -> int:
        """Jobs that are waiting or running."""
        return len(self._waiting) + len(self.running)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self.unfinished

    def next_for(self, worker: str) -> Job | None:
        """Start the best job for an idle worker; None if none is ready.

        In order of preference: an evaluation of the cell whose weights the worker holds, a job of a cell that no
        other worker holds, any ready job.
        """
        ready = [job for job in self._waiting.values() if job.needs is None or job.needs in self.finished]
        if not ready:
            return None
        own = self._cell_of.get(worker)
        others = {cell for name, cell in self._cell_of.items() if name != worker}

        def preference(job: Job) -> int:
            if job.kind == "evaluate" and job.cell.key == own:
                return 0
            return 1 if job.cell.key not in others else 2

        job = min(ready, key=preference)  # min keeps the plan's order among equals
        del self._waiting[job.id]
        self.running[worker] = job
        self.attempts[job.id] = self.attempts.get(job.id, 0) + 1
        self._cell_of[worker] = job.cell.key
        return job

    def finish(self, worker: str) -> Job:
        """The worker's job is finished."""
        job = self.running.pop(worker)
        self.finished.add(job.id)
        return job

    def fail(self, worker: str, *, retry: bool) -> Job:
        """The worker's job failed; without `retry` it is given up, and so is what needs it."""
        job = self.running.pop(worker)
        if retry:
            self._waiting = {job.id: job, **self._waiting}
            return job
        self.failed.add(job.id)
        for dependent in [other for other in self._waiting.values() if other.needs == job.id]:
            del self._waiting[dependent.id]
            self.skipped.add(dependent.id)
        return job

    def forget_worker(self, worker: str) -> None:
        """The worker lost what it held in memory."""
        self._cell_of.pop(worker, None)
