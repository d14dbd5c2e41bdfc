"""Progress of a sweep, read from its files alone: told once, or watched until it ends."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.config import read_sweep
from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout
from orchestrator.store import events_of
from orchestrator.view import clock

_ENDED = {"finished", "reused", "failed"}
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
        ended: the events of the latest session's ended jobs, in order.
        warnings: each once.
        total: jobs of the plan; None where no session has said so yet.
        state: of the latest session, in words.
        left: what is left of the time, in words; empty where none can be told.
        is_over: whether the latest session has ended; one whose driver was killed has not.
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
    return progress_of(read_sweep(layout.sweep).name, events_of(directory), datetime.now(UTC))


def progress_of(name: str, events: Sequence[Event], now: datetime) -> Progress:
    """What events say. Pure.

    Args:
        name: of the sweep.
        events: in the order in which they happened.
        now: by which the time left is told.
    """
    latest: dict[str, Event] = {event["job_id"]: event for event in events if event["job_id"]}
    ended = [event for event in latest.values() if event["event"] in _ENDED]
    failed = [event for event in ended if event["event"] == "failed"]
    sessions = [event for event in events if event["event"] in {"session_started", "session_ended"}]
    is_over = bool(sessions) and sessions[-1]["event"] == "session_ended"
    # Of the latest session: what an earlier, killed driver started runs no more.
    own = [event for event in latest.values() if sessions and event["session"] == sessions[-1]["session"]]
    warnings = [event for event in events if event["event"] == "warning"]
    return Progress(
        name=name,
        done=len(ended) - len(failed),
        failed=failed,
        running=[] if is_over else [event for event in own if event["event"] == "started"],
        ended=sorted((event for event in own if event["event"] in _ENDED), key=lambda event: event["at"]),
        warnings=list(dict.fromkeys(f"{event['job']}: {event['error']}" for event in warnings)),
        total=next((event["jobs"] for event in reversed(sessions) if event["jobs"] is not None), None),
        state=_state(sessions),
        left=_left(sessions[-1], now) if sessions and not is_over else "",
        is_over=is_over,
    )


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
    yield from _running(progress)
    yield from _troubles(progress)


def _screen(progress: Progress) -> RenderableType:
    """The same, with a bar and what ended last, and no longer than a screen."""
    parts: list[RenderableType] = [Text(progress.headline)]
    if progress.total:
        parts.append(ProgressBar(total=progress.total, completed=min(progress.done, progress.total), width=60))
    parts += _running(progress)
    if progress.ended:
        parts.append(_table(("ended", "job", "took"), map(_ended, reversed(progress.ended[-_LATEST:]))))
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
    return f"{last['status']} {last['at']:%Y-%m-%d %H:%M:%S} UTC"


def _left(started: Event, now: datetime) -> str:
    """What is left of the time that a session was estimated to take when it started."""
    if started["seconds"] is None:
        return ""
    left = started["seconds"] - (now - started["at"]).total_seconds()
    return f"; left ~{clock(left)} by its first estimate" if left > 0 else "; longer at work than first estimated"
