"""The driver: one loop that hands jobs to workers and commits what they return. The only writer of a sweep."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.failures import Failure
from cluster.pool import Completion, Pool, WorkerInfo
from orchestrator.artifacts import remove_unfinished
from orchestrator.claim import write_sweep
from orchestrator.config import Sweep
from orchestrator.cost import observe
from orchestrator.cost_store import add_observations
from orchestrator.errors import BitatlasError
from orchestrator.event_rows import EventRows
from orchestrator.facts import facts_of, troubles_of
from orchestrator.forecast import Devices, forecast
from orchestrator.history import read_history
from orchestrator.inputs import Inputs
from orchestrator.layout import Layout
from orchestrator.plan import Job, Plan
from orchestrator.recovery import Recovery
from orchestrator.remaining import Remaining
from orchestrator.rows import outcome_rows
from orchestrator.schedule import Schedule
from orchestrator.schema import SLICES, TABLES
from orchestrator.slices import merged_outcome, slice_row, workers_of
from orchestrator.store import Store, job_states, read_rows, read_table
from orchestrator.view import View
from orchestrator.worker import payload_of

_POLL_SECONDS = 0.5
# Rows are committed at once where jobs are long. Where they are short, together: not more often than so, unless they
# are so many, or so much work (per worker), that a driver killed before the commit would lose more than it saved.
_COMMIT_SECONDS = 5.0
_COMMIT_ROWS = 5000
_COMMIT_WORK_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a run ended.

    Args:
        reused: jobs that were finished before this run.
        finished: jobs that this run finished.
        failed: jobs that failed for good, with those that needed them.
        left: jobs that were not tried, because the run was stopped.
    """

    reused: int
    finished: int
    failed: int
    left: int
    seconds: float
    interrupted: bool = False
    failures: tuple[str, ...] = field(default=())


def finished_jobs(layout: Layout, plan: Plan, states: Mapping[str, str] | None = None) -> set[str]:
    """Ids of the plan's jobs that need not be done again: their rows are in the store (a slice's own, or its whole
    task's), and a quantizing job's artifact is still there where an evaluation is missing, or none is planned.

    Args:
        states: of `job_states`, where they are known already.
    """
    if states is None:
        states = job_states(layout.root) if layout.sweep.exists() else {}
    kept = set(read_table(layout.root, SLICES, ["job_id"])["job_id"].to_pylist())
    finished = {
        job.id
        for job in plan.jobs
        if states.get(job.whole_id or job.id) == "finished" or (job.id in kept and states.get(job.id) == "finished")
    }
    needed = {job.needs for job in plan.jobs}
    wanted = {job.needs for job in plan.jobs if job.id not in finished} | {
        job.id
        for job in plan.jobs
        if job.id not in needed  # a plan that ends in artifacts
    }
    return {
        job.id
        for job in plan.jobs
        if job.id in finished
        and (job.kind != "quantize" or job.id not in wanted or layout.artifact(job.cell.key).exists())
    }


class Driver:
    """Runs a plan on a pool until everything is finished, failed, or told to stop."""

    def __init__(
        self,
        *,
        sweep: Sweep,
        plan: Plan,
        inputs: Inputs,
        layout: Layout,
        store: Store,
        pool: Pool,
        kept: Path | None = None,
        cache: Path | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Gather what a run needs; nothing starts yet.

        Args:
            kept: the file of what earlier sweeps' jobs took, read for estimates and added to in the end; None is none.
            cache: a directory in which equal work of other sweeps is found; None is none.
            stop: set when the run is to stop; None: the driver's own, `Driver.stop`.
        """
        self._sweep, self._plan, self._inputs, self._layout = sweep, plan, inputs, layout
        self._store, self._pool, self._kept, self._cache = store, pool, kept, cache
        self._events = EventRows(sweep=sweep.name, session=store.session, workers=pool.workers, now=store.now)
        self._recovery = Recovery(sweep.name, plan, self._events)
        self._started: dict[str, datetime] = {}
        self._warnings: list[str] = []
        self._work: Mapping[str, float] | None = None
        self._blind: set[str] = set()  # nodes that do not see the output directory, told already
        self._finished = 0
        self._slices: dict[str, list[Job]] = {}  # by the whole's id
        for job in plan.jobs:
            if job.slice is not None:
                self._slices.setdefault(job.whole.id, []).append(job)
        self._new_batch()
        self.stop = stop or threading.Event()

    def run(self, view: View) -> Summary:
        """Run to the end.

        Raises:
            BitatlasError: the disk is full or read-only; what was committed stays.
        """
        began = time.monotonic()
        self._view = view
        write_sweep(self._layout, self._sweep)
        remove_unfinished(self._layout.artifacts)
        states = self._store.history.states()
        done = finished_jobs(self._layout, self._plan, states)
        self._store.forget(
            name for job in self._plan.jobs if job.id not in done for name in (job.id, job.whole_id or job.id)
        )
        self._forget_merged_slices(states)
        estimates = self._estimates()
        schedule = Schedule(self._plan.jobs, done, estimates)
        self._remaining = Remaining(self._plan.jobs, estimates)
        estimated = self._time_left(schedule)
        begun = self._events.row("session_started", seconds=estimated, jobs=len(self._plan.jobs))
        self._store.commit({"events": [begun]})
        view.begin(self._plan, schedule, self._pool.workers, lambda: self._time_left(schedule))
        for text in self._store.warnings:
            view.warn(text)
        interrupted = False
        try:
            for worker in self._pool.workers.values():
                self._recovery.settle(worker, schedule)
            self._note_changes(schedule)
            self._hand_out(schedule)
            while not schedule.done:
                if self.stop.is_set():
                    interrupted = True
                    break
                self._collect(schedule)
                self._hand_out(schedule)  # before the disk is waited for
                if self._is_due():
                    self._commit()
                view.update(schedule, self._pool.activity())
                while self._warnings:
                    view.warn(self._warnings.pop(0))
            self._commit()
            self._keep_observations(view)
        except BaseException as error:
            with suppress(BitatlasError):  # what is wrong is told already
                self._commit()
                broken = self._events.row("session_ended", status="broken", error=str(error) or type(error).__name__)
                self._store.commit({"events": [broken]})
            raise
        finally:
            view.end(schedule)
        left = schedule.unfinished
        self._store.commit(
            {"events": [self._events.row("session_ended", status="interrupted" if interrupted else "ended")]}
        )
        warning = None if interrupted else self._store.compact()
        if warning:
            view.warn(warning)
        return Summary(
            reused=len(done),
            finished=self._finished,
            failed=len(schedule.failed) + len(schedule.skipped),
            left=left,
            seconds=time.monotonic() - began,
            interrupted=interrupted,
            failures=tuple(self._recovery.told),
        )

    def _estimates(self) -> dict[str, float]:
        """Job id -> estimated seconds on a worker of the kind that most are."""
        infos = self._pool.workers.values()
        name, count = next(iter(Counter(info.device for info in infos).most_common(1)), (None, 1))
        kinds = (info.name.partition("@")[0].rpartition("-")[0] for info in infos)
        devices = Devices(kind=next(kinds, "cpu"), name=name, count=count, threads=self._sweep.workers.threads)
        events = self._store.history.observed()
        found = forecast(self._plan.jobs, self._inputs, devices, events=events, kept=self._kept)
        self._work = found.work
        if found.warning:
            self._warnings.append(found.warning)
        return found.seconds

    def _time_left(self, schedule: Schedule) -> float:
        return self._remaining.seconds(schedule, workers=len(self._pool.workers), now=time.monotonic())

    def _keep_observations(self, view: View) -> None:
        """Leave what this session's jobs took for the next sweep's estimates."""
        events = read_history(self._layout.root, self._store.session).observed()
        new = observe(events, self._plan.jobs, self._inputs, threads=self._sweep.workers.threads, work=self._work)
        warning = add_observations(self._kept, new) if self._kept is not None and new else None
        if warning:
            view.warn(warning)

    def _forget_merged_slices(self, states: Mapping[str, str]) -> None:
        """Drop what is left of slices whose tasks have their rows."""
        kept = read_table(self._layout.root, SLICES, ["job_id", "whole_id"]).to_pylist()
        self._store.forget((row["job_id"] for row in kept if states.get(row["whole_id"]) == "finished"), [SLICES])

    def _new_batch(self) -> None:
        """What is not committed yet: rows, tasks put together among them, and how much work; when the last was."""
        self._rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        self._merged: list[str] = []
        self._rows_work = 0.0
        self._committed_at = time.monotonic()

    def _is_due(self) -> bool:
        return bool(self._rows["events"]) and (
            time.monotonic() - self._committed_at >= _COMMIT_SECONDS
            or self._rows_work >= _COMMIT_WORK_SECONDS * len(self._pool.workers)
            or sum(map(len, self._rows.values())) >= _COMMIT_ROWS
        )

    def _commit(self) -> None:
        rows, merged = self._rows, self._merged
        self._new_batch()  # first: what fails halfway is not committed twice
        if rows["events"]:
            self._store.commit(rows)
            warning = self._store.tidy()
            if warning:
                self._warnings.append(warning)
        if merged:
            self._store.forget((job.id for whole in merged for job in self._slices[whole]), [SLICES])

    def _hand_out(self, schedule: Schedule) -> None:
        workers = self._pool.workers
        for worker in sorted(set(workers) - set(schedule.running)):
            job = schedule.next_for(worker, workers)
            if job is None:
                continue
            self._started[job.id] = self._store.now()
            self._remaining.start(job, time.monotonic())
            share = self._recovery.memory_share(job)
            payload = payload_of(
                job,
                self._inputs,
                self._layout,
                memory_share=share,
                cache=self._cache,
                sees_output=workers[worker].sees_output,
            )
            self._pool.submit(worker, payload)
            self._rows["events"].append(self._events.of_job("started", job, worker, schedule.attempts[job.id]))

    def _note_changes(self, schedule: Schedule) -> None:
        for change in self._pool.changes():
            self._recovery.note(change, schedule, self._rows)
        self._tell_who_sees_no_output()

    def _tell_who_sees_no_output(self) -> None:
        blind = {worker.node for worker in self._pool.workers.values() if not worker.sees_output} - self._blind
        if blind:
            self._blind |= blind
            self._warnings.append(
                f"{self._layout.root} is not seen by {', '.join(sorted(blind))}: what is quantized there stays in that "
                "node's cache, and only its workers evaluate it; share --out between all nodes, and any worker goes on"
            )

    def _collect(self, schedule: Schedule) -> None:
        stopping: Failure | None = None
        rows = self._rows
        completions = self._pool.wait(_POLL_SECONDS)
        self._note_changes(schedule)  # first: they say which job a lost worker had
        for completion in completions:
            self._rows_work += completion.seconds
            if completion.failure is None:
                self._finish(schedule, completion, rows)
            else:
                job = schedule.running[completion.worker]
                retry = self._recovery.failed(completion, completion.failure, schedule, self._started[job.id], rows)
                self._view.attempted(job, completion, retry=retry)
                stopping = completion.failure if completion.failure.policy.stops_sweep else stopping
        self._recovery.redo_deserted(schedule, self._pool.workers, time.monotonic(), rows)
        for whole in dict.fromkeys(row["whole_id"] for row in rows["slices"]):
            if self._merge(whole, schedule, rows):
                self._merged.append(whole)
        if self._recovery.redone:
            self._commit()
            self._store.forget(self._recovery.redone)
            self._recovery.redone.clear()
        if stopping:
            raise BitatlasError(
                f"a worker could not write to {self._layout.root} ({stopping.message}); what is done is kept and "
                "readable: mend the disk and run the same command again"
            )

    def _finish(self, schedule: Schedule, completion: Completion, rows: dict[str, list[dict[str, Any]]]) -> None:
        job = schedule.finish(completion.worker)
        self._view.attempted(job, completion)
        self._finished += 1
        worker, times = self._events.workers[completion.worker], (self._started[job.id], self._store.now())
        # What another sweep measured was measured on that device, which need not be this worker's very own.
        worker = replace(worker, device=completion.result.get("device", worker.device))
        event, status = "reused" if completion.result.get("reused") else "finished", "ok"
        if event == "finished":
            self._remaining.finish(job, completion.seconds)
        attempt = schedule.attempts[job.id]
        # Before the job's own end: nothing of a job comes after that.
        rows["events"] += self._events.of_facts(facts_of(completion.result), job, completion.worker, attempt)
        for text in troubles_of(completion.result):
            self._warn(job, text, rows)
        if job.slice is None:
            status = self._add_rows(job, completion.result, worker, times, rows)
        else:
            rows["slices"].append(
                slice_row(
                    self._sweep.name,
                    job,
                    completion.result,
                    worker=worker,
                    started_at=times[0],
                    finished_at=times[1],
                )
            )
        peak = completion.result.get("peak_memory_bytes") if event == "finished" else None
        rows["events"].append(
            self._events.of_job(
                event,
                job,
                completion.worker,
                attempt,
                status=status,
                seconds=completion.seconds,
                peak_memory_bytes=peak,
            )
        )

    def _add_rows(
        self,
        job: Job,
        outcome: dict[str, Any],
        worker: WorkerInfo,
        times: tuple[datetime, datetime],
        rows: dict[str, list[dict[str, Any]]],
    ) -> str:
        """Add what a job measured, with its warnings; the status of its event."""
        new = outcome_rows(
            self._sweep.name,
            job,
            outcome,
            model=self._inputs.models[job.cell.model],
            worker=worker,
            started_at=times[0],
            finished_at=times[1],
        )
        for table, added in new.items():
            rows[table] += added
        for warning in outcome.get("warnings", ()):
            self._warn(job, warning, rows)
        return "non_finite" if "non_finite" in {row["status"] for row in new["results"]} else "ok"

    def _warn(self, job: Job, text: str, rows: dict[str, list[dict[str, Any]]]) -> None:
        self._warnings.append(f"{job.label}: {text}")
        rows["events"].append(self._events.row("warning", cell_id=job.cell.id, job=job.label, error=text))

    def _merge(self, whole_id: str, schedule: Schedule, rows: dict[str, list[dict[str, Any]]]) -> bool:
        """Put a task together once its last slice is among `rows`; whether it was.

        The task's rows take the place of that slice's, in the same batch: either both are finished or neither is.
        """
        jobs = self._slices[whole_id]
        if not {job.id for job in jobs} <= schedule.finished:
            return False
        earlier = read_rows(self._layout.root, SLICES, "whole_id", whole_id)
        new = [row for row in rows["slices"] if row["whole_id"] == whole_id]
        by_id = {row["job_id"]: row for row in (*earlier, *new)}
        parts, whole = [by_id[job.id] for job in jobs], jobs[0].whole
        rows["slices"] = [row for row in rows["slices"] if row["whole_id"] != whole_id]
        outcome = merged_outcome(whole, parts)
        times = min(part["started_at"] for part in parts), max(part["finished_at"] for part in parts)
        worker = workers_of(parts)
        status = self._add_rows(whole, outcome, worker, times, rows)
        rows["events"].append(
            self._events.row(
                "merged",
                job_id=whole.id,
                cell_id=whole.cell.id,
                job=whole.label,
                worker=worker.name,
                device=worker.device,
                status=status,
                seconds=outcome["seconds"],
            )
        )
        return True
