"""Progress of a sweep, read from its files alone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.config import read_sweep
from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout
from orchestrator.store import events_of
from orchestrator.view import clock

_ENDED = {"finished", "reused", "failed"}


def print_status(directory: Path, console: Console) -> int:
    """Print what is done, running and failed; 0, or 1 where something failed for good.

    Raises:
        BitatlasError: the directory holds no sweep.
    """
    layout = Layout(directory)
    if not layout.sweep.exists():
        raise BitatlasError(f"{directory} holds no sweep (no sweep.yaml); give the --out directory of `bitatlas run`")
    sweep = read_sweep(layout.sweep)
    events = events_of(directory)
    latest: dict[str, dict[str, Any]] = {event["job_id"]: event for event in events if event["job_id"]}
    ended = {job: event for job, event in latest.items() if event["event"] in _ENDED}
    failed = [event for event in ended.values() if event["event"] == "failed"]
    sessions = [event for event in events if event["event"] in {"session_started", "session_ended"}]
    alive = bool(sessions) and sessions[-1]["event"] == "session_started"
    session = sessions[-1]["session"] if alive else None  # what an earlier, killed driver started runs no more
    running = [event for event in latest.values() if event["event"] == "started" and event["session"] == session]
    running = running if alive else []
    console.print(
        f"{sweep.name}: {len(ended) - len(failed)} jobs done, {len(running)} running, {len(failed)} failed; "
        f"{_state(sessions)}{_left(sessions[-1]) if alive else ''}",
        highlight=False,
    )
    if running:
        table = Table(box=None, padding=(0, 1))
        for heading in ("worker", "job", "for"):
            table.add_column(heading)
        for event in running:
            table.add_row(event["worker"], event["job"], clock((datetime.now(UTC) - event["at"]).total_seconds()))
        console.print(table)
    warnings = [event for event in events if event["event"] == "warning"]
    for text in dict.fromkeys(f"warning: {event['job']}: {event['error']}" for event in warnings):
        console.print(text, style="yellow", markup=False, highlight=False)
    for event in failed:
        console.print(f"failed: {event['job']}: {event['error']}", style="red", markup=False, highlight=False)
    return 1 if failed else 0


def _state(sessions: list[dict[str, Any]]) -> str:
    if not sessions:
        return "not started"
    last = sessions[-1]
    if last["event"] == "session_started":
        return f"a driver started {last['at']:%Y-%m-%d %H:%M:%S} UTC and has not ended (running, or killed)"
    return f"{last['status']} {last['at']:%Y-%m-%d %H:%M:%S} UTC"


def _left(started: dict[str, Any]) -> str:
    """What is left of the time that a session was estimated to take when it started."""
    if started["seconds"] is None:
        return ""
    left = started["seconds"] - (datetime.now(UTC) - started["at"]).total_seconds()
    return f"; left ~{clock(left)} by its first estimate" if left > 0 else "; longer at work than first estimated"
