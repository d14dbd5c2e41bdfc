"""What a run looks like in numbers, for the metrics of `cluster/metrics.py`. Pure: it is told what happens and asked
for snapshots; a snapshot looks at what has ended since the last one, not at the whole plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.metrics import Snapshot, Tags
from cluster.pool import Completion
from orchestrator.plan import Job, Plan
from orchestrator.schedule import Schedule


class Telemetry:
    """Counts of one run."""

    def __init__(self, sweep: str, plan: Plan) -> None:
        """Nothing has happened yet.

        Args:
            sweep: its name, the first tag of every metric.
        """
        self._sweep = sweep
        self._jobs = len(plan.jobs)
        self._cell_of = {job.id: job.cell.id for job in plan.jobs}  # of jobs that have not ended yet
        self._left = Counter(self._cell_of.values())  # jobs of each cell that have not ended
        self._cells = len(self._left)
        self._begun: set[str] = set()  # cells with some jobs ended, none failed and others left
        self._finished = 0
        self._failed: set[str] = set()
        self._ended = 0  # how many of the schedule's `ended` are known
        self._workers: set[str] = set()
        self._peaks: dict[str, int] = {}
        self._rates: dict[str, tuple[int, float]] = {}  # stage -> tokens and seconds since the last snapshot
        self._tokens_per_second: dict[Tags, float] = {}
        self._tokens: Counter[Tags] = Counter()
        self._retries: Counter[Tags] = Counter()
        self._spent: dict[Tags, float] = {}
        self._seconds: list[tuple[Tags, float]] = []

    def attempted(self, job: Job, completion: Completion, *, retry: bool = False) -> None:
        """An attempt at a job came back.

        Args:
            retry: it failed and will be tried again.
        """
        stage = (self._sweep, job.task)
        if completion.seconds > 0:
            self._spent[stage] = self._spent.get(stage, 0.0) + completion.seconds
        if completion.failure is not None:
            if retry:
                self._retries[self._sweep, completion.failure.kind] += 1
            return
        outcome = completion.result
        if outcome.get("reused"):
            return  # found there already: it took no time, and the memory that it tells of is another worker's
        if outcome.get("peak_memory_bytes") is not None:
            self._peaks[completion.worker] = outcome["peak_memory_bytes"]
        self._seconds.append((stage, completion.seconds))
        tokens = tokens_of(outcome)
        if tokens:
            self._tokens[stage] += tokens
            before = self._rates.get(job.task, (0, 0.0))
            self._rates[job.task] = (before[0] + tokens, before[1] + completion.seconds)

    def snapshot(self, schedule: Schedule, workers: Iterable[str], *, remaining: float | None) -> Snapshot:
        """The values of now.

        Args:
            schedule: the same one every time.
            workers: names of those alive.
            remaining: estimated seconds until all is done; None where nobody estimates.
        """
        self._follow(schedule)
        alive = set(workers)
        for worker in (self._workers - alive) & self._peaks.keys():
            self._peaks[worker] = 0  # gone, and its memory with it
        self._workers = alive
        for stage, (tokens, seconds) in self._rates.items():
            if seconds > 0:
                self._tokens_per_second[self._sweep, stage] = tokens / seconds
        self._rates = {}
        observed, self._seconds = self._seconds, []
        gauges: dict[str, dict[Tags, float]] = {
            "bitatlas_jobs": self._by_state(self._job_states(schedule)),
            "bitatlas_cells": self._by_state(self._cell_states(schedule)),
            "bitatlas_workers": {(self._sweep,): len(alive)},
            "bitatlas_tokens_per_second": dict(self._tokens_per_second),
            "bitatlas_peak_memory_bytes": {(self._sweep, worker): peak for worker, peak in self._peaks.items()},
        }
        if remaining is not None:
            gauges["bitatlas_remaining_seconds"] = {(self._sweep,): remaining}
        return Snapshot(
            gauges=gauges,
            counters={
                "bitatlas_worker_seconds": dict(self._spent),
                "bitatlas_tokens": dict(self._tokens),
                "bitatlas_retries": dict(self._retries),
            },
            observed={"bitatlas_stage_seconds": observed} if observed else {},
        )

    def _by_state(self, states: Mapping[str, int]) -> dict[Tags, float]:
        return {(self._sweep, state): count for state, count in states.items()}

    def _job_states(self, schedule: Schedule) -> dict[str, int]:
        running, failed = len(schedule.running), len(schedule.failed) + len(schedule.skipped)
        return {
            "waiting": schedule.unfinished - running,
            "running": running,
            "finished": self._jobs - schedule.unfinished - failed,
            "failed": failed,
        }

    def _cell_states(self, schedule: Schedule) -> dict[str, int]:
        running = {job.cell.id for job in schedule.running.values()} - self._failed
        begun = len(self._begun | running)
        return {
            "waiting": self._cells - begun - self._finished - len(self._failed),
            "running": begun,
            "finished": self._finished,
            "failed": len(self._failed),
        }

    def _follow(self, schedule: Schedule) -> None:
        """Take in what has ended since the last time."""
        for name in schedule.ended[self._ended :]:
            cell = self._cell_of.pop(name, None)
            if cell is None:
                continue  # of the store and no longer of the plan, or done again
            self._left[cell] -= 1
            if name in schedule.failed or name in schedule.skipped:
                self._failed.add(cell)
                self._begun.discard(cell)
            elif cell not in self._failed:
                if self._left[cell]:
                    self._begun.add(cell)
                else:
                    self._begun.discard(cell)
                    self._finished += 1
        self._ended = len(schedule.ended)


def tokens_of(outcome: Mapping[str, Any]) -> int:
    """Tokens that a job's outcome accounts for: predicted ones of a perplexity, generated ones of a task or of a slice
    of one. 0 for quantizing and for scored choices, whose outcomes do not say how many were run."""
    items = outcome["slice"]["items"] if outcome.get("slice") else outcome.get("items", [])
    # A document has one item per metric, each with the same text.
    generated = {(item.get("subtask"), item["doc_id"]): item.get("answer_tokens") or 0 for item in items}
    return int(outcome.get("protocol", {}).get("tokens", 0)) + sum(generated.values())
