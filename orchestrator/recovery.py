"""What the driver does about jobs that fail, and about workers that come and go."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import datetime
from typing import Any

from cluster.failures import Attempts, Failure
from cluster.pool import Change, Completion, WorkerInfo
from orchestrator.event_rows import EventRows
from orchestrator.plan import Job, Plan
from orchestrator.rows import failure_row
from orchestrator.schedule import SHARED, Schedule

Rows = dict[str, list[dict[str, Any]]]

# How long artifacts that only one node sees wait for a worker there; a process that died is started again meanwhile.
_AWAIT_SECONDS = 60.0


class Recovery:
    """Counts failed attempts, has jobs tried again or given up, and writes down both.

    Attributes:
        told: a line per job that was given up.
        redone: ids of finished jobs that are to be done again, whose rows no longer count; the driver empties it.
    """

    def __init__(self, sweep: str, plan: Plan, events: EventRows) -> None:
        """Begin a run, in which nothing has failed yet."""
        self._sweep, self._events = sweep, events
        self._jobs = {job.id: job for job in plan.jobs}
        self._attempts: dict[str, Attempts] = {}
        self._with_row: set[str] = set()  # ids of wholes that have their failed row
        self._lost_nodes: set[str] = set()
        self._deserted: dict[str, float] = {}  # homes of artifacts without a worker -> since when
        self.told: list[str] = []
        self.redone: list[str] = []

    def memory_share(self, job: Job) -> float:
        """How much the next attempt may compute at a time, of what suits the device."""
        attempts = self._attempts.get(job.id)
        return attempts.memory_share() if attempts else 1.0

    def failed(
        self, completion: Completion, failure: Failure, schedule: Schedule, started_at: datetime, rows: Rows
    ) -> bool:
        """A worker's job failed: try it again, or give it up; whether it is tried again.

        Args:
            completion: whose `failure` it is.
            failure: never None.
            schedule: told what is to be done again.
            started_at: when the attempt began.
            rows: added to.
        """
        job = schedule.running[completion.worker]
        attempts = self._attempts.setdefault(job.id, Attempts())
        attempts.add(failure, completion.worker)
        attempt, retry = schedule.attempts[job.id], attempts.retry(failure)
        schedule.fail(completion.worker, retry=retry, avoid=attempts.avoid(failure))
        told = failure if retry else attempts.final(failure)
        facts = {"error_kind": told.kind, "error": told.message, "seconds": completion.seconds}
        if not retry:
            facts["status"] = "failed"
        event = "retried" if retry else "failed"
        rows["events"].append(self._events.of_job(event, job, completion.worker, attempt, **facts))
        if not retry:
            self._give_up(job, completion.worker, told, started_at, rows)
        elif failure.kind == "damaged" and job.needs is not None:
            needed = self._jobs[job.needs]
            if schedule.redo(needed):
                self.redone.append(needed.id)
                redone = self._events.of_job("redone", needed, completion.worker, attempt, error=failure.message)
                rows["events"].append(redone)
        return retry

    def _give_up(self, job: Job, worker: str, failure: Failure, started_at: datetime, rows: Rows) -> None:
        self.told.append(f"{job.label}: {failure.message}")
        if job.whole.id in self._with_row:
            return  # another slice of the task has failed already: one row says it
        self._with_row.add(job.whole.id)
        where = "" if job.slice is None else f"slice {job.slice}: "
        rows["results"].append(
            failure_row(
                self._sweep,
                job.whole,
                replace(failure, message=where + failure.message),
                worker=self._events.workers.get(worker),
                started_at=started_at,
                finished_at=self._events.now(),
            )
        )

    def settle(self, worker: WorkerInfo, schedule: Schedule) -> None:
        """Tell the schedule where a worker's artifacts lie."""
        self._lost_nodes.discard(worker.node)
        schedule.settle(worker.name, SHARED if worker.sees_output else worker.node)

    def redo_deserted(self, schedule: Schedule, workers: Collection[str], now: float, rows: Rows) -> None:
        """Have made again what lies where no worker is left: at once where the node is lost, else after a minute.

        To be told of every loss and every failure first.

        Args:
            workers: that are alive; while there are none, nothing is decided.
            now: seconds of any clock.
        """
        homes = schedule.deserted(workers) if workers else set()
        self._deserted = {home: self._deserted.get(home, now) for home in homes}
        for home, since in self._deserted.items():
            if home not in self._lost_nodes and now - since < _AWAIT_SECONDS:
                continue
            where = "in the output directory, which no worker sees" if home == SHARED else f"on {home}, without workers"
            for needed in map(self._jobs.__getitem__, schedule.left_at(home)):
                schedule.redo(needed)
                self.redone.append(needed.id)
                facts = {"job_id": needed.id, "cell_id": needed.cell.id, "job": needed.label}
                rows["events"].append(self._events.row("redone", error=f"its artifact lies {where}", **facts))

    def note(self, change: Change, schedule: Schedule, rows: Rows) -> None:
        """A worker joined or left; to be told before the failure of the job that it had."""
        worker, reason = change.worker, change.reason
        self._events.workers[worker.name] = worker
        facts: dict[str, Any] = {"worker": worker.name, "device": worker.device}
        if reason is None:
            self.settle(worker, schedule)
            rows["events"].append(self._events.row("worker_joined", **facts))
            return
        schedule.forget_worker(worker.name)
        if reason.kind == "node_lost":
            self._lost_nodes.add(worker.node)
        facts |= {"error_kind": reason.kind, "error": reason.message}
        job = schedule.running.get(worker.name)
        if job is not None:
            facts |= {"job_id": job.id, "cell_id": job.cell.id, "job": job.label, "attempt": schedule.attempts[job.id]}
        rows["events"].append(self._events.row("worker_lost", **facts))
