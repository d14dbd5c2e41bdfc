"""How long a run still takes, by its estimates and by what this session took so far. Pure: it is told the time.

Asked again and again, it looks at what has ended since, and at what runs; not at all that is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from orchestrator.plan import Job
from orchestrator.schedule import Schedule


class Remaining:
    """Estimates of a session's jobs, corrected as they end."""

    def __init__(self, jobs: Sequence[Job], seconds: Mapping[str, float]) -> None:
        """Begin a session.

        Args:
            jobs: all of the plan.
            seconds: job id -> estimated seconds on one worker.
        """
        self._left = {job.id: seconds[job.id] for job in jobs}
        self._sum = sum(self._left.values())
        self._dependents: dict[str, list[str]] = {}
        for job in jobs:
            if job.needs is not None:
                self._dependents.setdefault(job.needs, []).append(job.id)
        self._ended = 0  # how many of the schedule's `ended` are known
        self._by_chain: list[tuple[float, str]] = []  # what may be waiting, the longest chain last
        self._since: dict[str, float] = {}
        self._took = self._expected = 0.0
        self._estimated = seconds

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
        """Seconds until all is done: what is left, shared by the workers, and at least the longest chain.

        Args:
            schedule: the same one every time.
            workers: how many work side by side.
            now: by the clock of `start`.
        """
        is_first = not self._by_chain
        for name in schedule.ended[self._ended :]:
            self._sum -= self._left.pop(name, 0.0)
        self._ended = len(schedule.ended)
        if not self._left:
            return 0.0
        if is_first:
            self._by_chain = sorted((self._chain(name), name) for name in self._left)
        running = {job.id for job in schedule.running.values()}
        over = {name: min(now - self._since.get(name, now), self.scale * self._left[name]) for name in running}
        chains = (self.scale * self._chain(name) - over[name] for name in running)
        together = (self.scale * self._sum - sum(over.values())) / max(workers, 1)
        return max(together, self.scale * self._longest_waiting(running), *chains)

    def _chain(self, name: str) -> float:
        """Seconds of a job and of the longest left that needs it, as estimated."""
        needing = (self._left[other] for other in self._dependents.get(name, ()) if other in self._left)
        return self._left[name] + max(needing, default=0.0)

    def _longest_waiting(self, running: set[str]) -> float:
        while self._by_chain and self._by_chain[-1][1] not in self._left:
            self._by_chain.pop()
        return next(self._waiting(running), 0.0)

    def _waiting(self, running: set[str]) -> Iterator[float]:
        return (chain for chain, name in reversed(self._by_chain) if name in self._left and name not in running)
