"""Progress of a sweep, read from its files alone: told once, or watched until it ends."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.config import read_sweep
from orchestrator.errors import BitatlasError
from orchestrator.facts import FACTS
from orchestrator.layout import Layout
from orchestrator.schema import EVENTS
from orchestrator.search.told import search_lines
from orchestrator.store import read_table
from orchestrator.view import clock

if TYPE_CHECKING:
    import pyarrow as pa

_ENDED = ["finished", "reused", "failed"]
_COLUMNS = ["session", "event", "job_id", "job", "worker", "status", "error", "seconds", "jobs", "at"]
_REFRESH_SECONDS = 2.0
_LATEST = 8  # jobs that ended, and troubles, that a watched screen has room for

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a sweep's events say.

    Attributes:
        done: jobs whose rows are there, failed ones left out.
        failed: the events of jobs that failed for good.
        running: the events by which running jobs started.
        ended: the events of the latest session's jobs that ended last, in order.
        warnings: each once.
        total: jobs of the plan; None where no session has said so yet.
        state: of the latest session, in words.
        left: what is left of the time, in words; empty where none can be told.
        is_over: whether the latest session has ended; one whose driver was killed has not.
        search: lines on the search that the sweep belongs to.
    """

    name: str
    done: int
    failed: Sequence[Event]
    running: Sequence[Event]
    ended: Sequence[Event]
    warnings: Sequence[str]
    total: int | None
    state: str
    left: str
    is_over: bool
    search: Sequence[str] = ()

    @property
    def headline(self) -> str:
        """One line."""
        of = "" if self.total is None else f" of {self.total}"
        return (
            f"{self.name}: {self.done}{of} jobs done, {len(self.running)} running, {len(self.failed)} failed; "
            f"{self.state}{self.left}"
        )


def read_progress(directory: Path) -> Progress:
    """What the files of a sweep say now.

    Raises:
        BitatlasError: the directory holds no sweep.
    """
    layout = Layout(directory)
    if not layout.sweep.exists():
        raise BitatlasError(f"{directory} holds no sweep (no sweep.yaml); give the --out directory of `bitatlas run`")
    events = read_table(directory, EVENTS, ["sweep", *_COLUMNS])
    names = events["sweep"].unique().drop_null()  # told by any event; reading a large sweep file takes a second
    name = str(names[0]) if len(names) else read_sweep(layout.sweep).name
    return replace(progress_of(name, events, datetime.now(UTC)), search=search_lines(directory))


def progress_of(name: str, events: pa.Table, now: datetime) -> Progress:
    """What events say. Pure. Of many events few become Python objects: those that are told one by one.

    Args:
        name: of the sweep.
        events: columns `_COLUMNS` of the events table.
        now: by which the time left is told.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    def of(*kinds: str) -> Any:
        return pc.field("event").isin(kinds)

    # What a worker did beside its job says nothing of how the job stands.
    events = events.filter(~of(*FACTS)).sort_by("at")
    numbered = events.select(["job_id"]).append_column("row", pa.array(range(events.num_rows), pa.int64()))
    by_job = numbered.filter(pc.field("job_id").is_valid()).group_by("job_id", use_threads=False)
    latest = events.take(by_job.aggregate([("row", "max")])["row_max"].sort())
    ended, failed = latest.filter(of(*_ENDED)), latest.filter(of("failed")).to_pylist()
    sessions = events.filter(of("session_started", "session_ended")).to_pylist()
    is_over = bool(sessions) and sessions[-1]["event"] == "session_ended"
    # Of the latest session: what an earlier, killed driver started runs no more.
    own = latest.filter(_is_of(sessions[-1]["session"])) if sessions else latest.slice(0, 0)
    warnings = events.filter(of("warning")).to_pylist()
    own_ended = own.filter(of(*_ENDED))
    return Progress(
        name=name,
        done=ended.num_rows - len(failed),
        failed=failed,
        running=[] if is_over else own.filter(of("started")).to_pylist(),
        ended=own_ended.slice(max(own_ended.num_rows - _LATEST, 0)).to_pylist(),
        warnings=list(dict.fromkeys(f"{event['job']}: {event['error']}" for event in warnings)),
        total=next((event["jobs"] for event in reversed(sessions) if event["jobs"] is not None), None),
        state=_state(sessions),
        left=_left(sessions[-1], now) if sessions and not is_over else "",
        is_over=is_over,
    )


def _is_of(session: str | None) -> Any:
    import pyarrow.compute as pc

    return pc.field("session").is_null() if session is None else pc.field("session") == session


def print_status(directory: Path, console: Console) -> int:
    """Print what is done, running and failed; 0, or 1 where something failed for good.

    Raises:
        BitatlasError: the directory holds no sweep.
    """
    progress = read_progress(directory)
    for part in _parts(progress):
        console.print(part, highlight=False, soft_wrap=isinstance(part, Text))
    return 1 if progress.failed else 0


def watch_status(directory: Path, console: Console) -> int:
    """Show the same in place, anew every two seconds, until the sweep's session ends or the user has seen enough.

    Waits for a sweep that has not begun.

    Raises:
        BitatlasError: the directory holds no sweep.
    """
    progress = read_progress(directory)
    try:
        with Live(_screen(progress), console=console, auto_refresh=False) as live:
            while not progress.is_over:
                time.sleep(_REFRESH_SECONDS)
                progress = read_progress(directory)
                live.update(_screen(progress), refresh=True)
    except KeyboardInterrupt:
        pass  # the sweep goes on; what was last seen stays on the screen
    return 1 if progress.failed else 0


def _parts(progress: Progress) -> Iterator[RenderableType]:
    yield Text(progress.headline)
    yield from map(Text, progress.search)
    yield from _running(progress)
    yield from _troubles(progress)


def _screen(progress: Progress) -> RenderableType:
    """The same, with a bar and what ended last, and no longer than a screen."""
    parts: list[RenderableType] = [Text(progress.headline), *map(Text, progress.search)]
    if progress.total:
        bar = ProgressBar(total=progress.total, completed=min(progress.done, progress.total), width=60)
        parts += [bar, Text()]  # the bar does not end its line
    parts += _running(progress)
    if progress.ended:
        parts.append(_table(("ended", "job", "took"), map(_ended, reversed(progress.ended))))
    troubles = list(_troubles(progress))
    if len(troubles) > _LATEST:
        parts.append(Text(f"{len(troubles) - _LATEST} more before these: `bitatlas status` shows all"))
    return Group(*parts, *troubles[-_LATEST:])


def _running(progress: Progress) -> Iterator[RenderableType]:
    now = datetime.now(UTC)
    rows = [(event["worker"], event["job"], clock((now - event["at"]).total_seconds())) for event in progress.running]
    if rows:
        yield _table(("worker", "job", "for"), rows)


def _troubles(progress: Progress) -> Iterator[Text]:
    for warning in progress.warnings:
        yield Text(f"warning: {warning}", style="yellow")
    for event in progress.failed:
        yield Text(f"failed: {event['job']}: {event['error']}", style="red")


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(box=None, padding=(0, 1))
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _ended(event: Event) -> tuple[str, ...]:
    took = "" if event["seconds"] is None else clock(event["seconds"])
    what = "" if event["event"] == "finished" else f" ({event['event']})"
    return f"{event['at']:%H:%M:%S}", event["job"] + what, took


def _state(sessions: Sequence[Event]) -> str:
    if not sessions:
        return "not started"
    last = sessions[-1]
    if last["event"] == "session_started":
        return f"a driver started {last['at']:%Y-%m-%d %H:%M:%S} UTC and has not ended (running, or killed)"
    why = f": {last['error']}" if last["error"] else ""
    return f"{last['status']} {last['at']:%Y-%m-%d %H:%M:%S} UTC{why}"


def _left(started: Event, now: datetime) -> str:
    """What is left of the time that a session was estimated to take when it started."""
    if started["seconds"] is None:
        return ""
    left = started["seconds"] - (now - started["at"]).total_seconds()
    return f"; left ~{clock(left)} by its first estimate" if left > 0 else "; longer at work than first estimated"
