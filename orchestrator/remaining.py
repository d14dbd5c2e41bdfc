"""How long a run still takes, by its estimates and by what this session took so far. Pure: it is told the time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orchestrator.cost import makespan
from orchestrator.plan import Job
from orchestrator.schedule import Schedule


class Remaining:
    """Estimates of a session's jobs, corrected as they end."""

    def __init__(self, jobs: Iterable[Job], seconds: Mapping[str, float]) -> None:
        """Begin a session.

        Args:
            jobs: all of the plan.
            seconds: job id -> estimated seconds on one worker.
        """
        self._jobs = list(jobs)
        self._estimated = seconds
        self._since: dict[str, float] = {}
        self._took = self._expected = 0.0

    def start(self, job: Job, now: float) -> None:
        """A worker began a job; `now` in seconds of any clock."""
        self._since[job.id] = now

    def finish(self, job: Job, seconds: float) -> None:
        """A job was done, which took `seconds`. Not to be told of what was found done already."""
        self._took += seconds
        self._expected += self._estimated[job.id]

    @property
    def scale(self) -> float:
        """What this session's jobs took, relative to their estimates; 1 before the first one has ended."""
        return self._took / self._expected if self._expected > 0 else 1.0

    def seconds(self, schedule: Schedule, *, workers: int, now: float) -> float:
        """Seconds until all is done: what is left, shared by the workers, and at least the longest chain."""
        ended = schedule.finished | schedule.failed | schedule.skipped
        left = [job for job in self._jobs if job.id not in ended]
        running = {job.id for job in schedule.running.values()}
        expected = {
            job.id: max(
                self._estimated[job.id] * self.scale
                - (now - self._since.get(job.id, now) if job.id in running else 0.0),
                0.0,
            )
            for job in left
        }
        return makespan(left, expected, workers)
