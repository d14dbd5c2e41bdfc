"""What a person sees while a sweep runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cluster.pool import Completion, WorkerInfo
from orchestrator.plan import Job, Plan
from orchestrator.schedule import Schedule

_LINE_SECONDS = 30.0
TimeLeft = Callable[[], float]
"""Estimated seconds until all is done."""


class View(Protocol):
    """Told of a run by the driver; never asked."""

    def begin(
        self, plan: Plan, schedule: Schedule, workers: Mapping[str, WorkerInfo], left: TimeLeft | None = None
    ) -> None:
        """The run starts; `left` tells how long the rest takes."""

    def update(self, schedule: Schedule, activity: Mapping[str, str]) -> None:
        """Called several times a second."""

    def attempted(self, job: Job, completion: Completion, *, retry: bool = False) -> None:
        """An attempt at a job came back; `retry`: it failed and will be tried again."""

    def warn(self, text: str) -> None:
        """Something that should be known before the night is spent."""

    def end(self, schedule: Schedule) -> None:
        """The run is over, however it ended."""


class QuietView:
    """Shows nothing; for tests and for callers that have their own display."""

    def begin(
        self, plan: Plan, schedule: Schedule, workers: Mapping[str, WorkerInfo], left: TimeLeft | None = None
    ) -> None:
        """Nothing."""

    def update(self, schedule: Schedule, activity: Mapping[str, str]) -> None:
        """Nothing."""

    def attempted(self, job: Job, completion: Completion, *, retry: bool = False) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def end(self, schedule: Schedule) -> None:
        """Nothing."""


def make_view(console: Console) -> View:
    """A live table on a terminal, plain lines elsewhere."""
    return LiveView(console) if console.is_terminal else LineView(console)


class _Counts:
    """Cells and jobs done, and the time that the rest may take."""

    def __init__(self, plan: Plan, left: TimeLeft | None) -> None:
        self._jobs_of_cell: dict[str, set[str]] = {}
        for job in plan.jobs:
            self._jobs_of_cell.setdefault(job.cell.id, set()).add(job.id)
        self._began = time.monotonic()
        self._left = left
        self.total_jobs = len(plan.jobs)
        self.total_cells = len(self._jobs_of_cell)

    def cells_done(self, schedule: Schedule) -> int:
        ended = schedule.finished | schedule.failed | schedule.skipped
        return sum(jobs <= ended for jobs in self._jobs_of_cell.values())

    def jobs_done(self, schedule: Schedule) -> int:
        return self.total_jobs - schedule.unfinished

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def remaining(self) -> str:
        return "?" if self._left is None else clock(self._left())


class LiveView:
    """A progress bar and one row per worker, redrawn in place."""

    def __init__(self, console: Console) -> None:
        """Draw on this console."""
        self._console = console
        self._activity: Mapping[str, str] = {}

    def begin(
        self, plan: Plan, schedule: Schedule, workers: Mapping[str, WorkerInfo], left: TimeLeft | None = None
    ) -> None:
        """Start drawing."""
        self._counts = _Counts(plan, left)
        self._workers = workers
        self._since: dict[str, tuple[str, float]] = {}
        self._bar = Progress(
            TextColumn("[bold]jobs"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task("jobs", total=self._counts.total_jobs, left="?")
        self._live = Live(console=self._console, refresh_per_second=4, get_renderable=lambda: self._draw(schedule))
        self._live.start()

    def update(self, schedule: Schedule, activity: Mapping[str, str]) -> None:
        """Remember what the workers do; the display redraws itself."""
        self._activity = activity

    def end(self, schedule: Schedule) -> None:
        """Leave the last picture standing."""
        self._activity = {}
        self._live.stop()

    def attempted(self, job: Job, completion: Completion, *, retry: bool = False) -> None:
        """Nothing: the schedule says what ended."""

    def warn(self, text: str) -> None:
        """Print it above the table, where it stays."""
        self._live.console.print(Text(f"warning: {text}", style="yellow"))

    def _draw(self, schedule: Schedule) -> Group:
        counts = self._counts
        self._bar.update(self._task, completed=counts.jobs_done(schedule), left="~" + counts.remaining())
        table = Table(box=None, padding=(0, 1), show_header=False, expand=True)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(no_wrap=True, ratio=1)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        for worker in sorted(self._workers):
            job = schedule.running.get(worker)
            label = job.label if job else "idle"
            if self._since.get(worker, ("", 0.0))[0] != label:
                self._since[worker] = (label, time.monotonic())
            busy = clock(time.monotonic() - self._since[worker][1]) if job else ""
            table.add_row(worker, label, self._activity.get(worker, "") if job else "", busy)
        failures = len(schedule.failed)
        line = Text(f"{counts.cells_done(schedule)} of {counts.total_cells} cells")
        if failures:
            line.append(f", {failures} failed", style="red")
        return Group(self._bar, table, line)


class LineView:
    """One line whenever a job ends, and one now and then in between."""

    def __init__(self, console: Console) -> None:
        """Print on this console."""
        self._console = console

    def begin(
        self, plan: Plan, schedule: Schedule, workers: Mapping[str, WorkerInfo], left: TimeLeft | None = None
    ) -> None:
        """Say what is to be done."""
        self._counts = _Counts(plan, left)
        self._labels = {job.id: job.label for job in plan.jobs}
        self._ended = set(schedule.finished)
        self._last = time.monotonic()
        self._print(
            f"{len(plan.cells)} cells, {self._counts.total_jobs} jobs, {self._counts.jobs_done(schedule)} done before; "
            f"workers: {', '.join(sorted(workers))}"
        )

    def update(self, schedule: Schedule, activity: Mapping[str, str]) -> None:
        """Print what has ended, or what goes on."""
        for job_id in (schedule.finished | schedule.failed) - self._ended:
            self._ended.add(job_id)
            word = "FAILED" if job_id in schedule.failed else "done"
            self._print(f"[{self._position(schedule)}] {word} {self._labels[job_id]}")
        if time.monotonic() - self._last > _LINE_SECONDS:
            doing = "; ".join(
                f"{worker}: {job.label} {activity.get(worker, '')}".rstrip() for worker, job in schedule.running.items()
            )
            self._print(f"[{self._position(schedule)}] left ~{self._counts.remaining()}; {doing}")

    def attempted(self, job: Job, completion: Completion, *, retry: bool = False) -> None:
        """Nothing: the schedule says what ended."""

    def warn(self, text: str) -> None:
        """Print it."""
        self._print(f"WARNING {text}")

    def end(self, schedule: Schedule) -> None:
        """Print what ended last."""
        self.update(schedule, {})

    def _position(self, schedule: Schedule) -> str:
        return f"{self._counts.jobs_done(schedule)}/{self._counts.total_jobs} {clock(self._counts.elapsed)}"

    def _print(self, line: str) -> None:
        self._last = time.monotonic()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
