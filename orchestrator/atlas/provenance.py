"""How the numbers came about: protocols, calibration, devices, versions, sessions, and how much is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.atlas import labels
from orchestrator.atlas.rows import parse_object
from orchestrator.atlas.tables import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from orchestrator.atlas.rows import Atlas
    from orchestrator.atlas.tables import ModelMap


def protocol_lines(model_map: ModelMap) -> list[tuple[str, str]]:
    """(column, how it was measured) for every column."""
    lines = []
    for column in model_map.columns:
        counts = {entry.n for (_, other), entry in model_map.entries.items() if other == column and entry.n}
        unit = column.unit
        scored = ""
        if counts:
            low, high = min(counts), max(counts)
            scored = f"{low:,} {unit}s scored" if low == high else f"{low:,} to {high:,} {unit}s scored, not alike"
        parts = [labels.plain(column.metric), labels.pairs(parse_object(column.protocol)), scored]
        direction = "higher is better" if column.higher_is_better else "lower is better"
        text = "; ".join(part for part in [*parts, direction] if part)
        lines.append((model_map.column_labels[column], text))
    return lines


def provenance_lines(atlas: Atlas) -> list[tuple[str, str]]:
    """(subject, value) pairs on where the numbers come from; in brackets, how many rows where rows differ."""
    rows = atlas.measurements
    recipes = dict.fromkeys(labels.pairs(cell.calibration) for cell in atlas.cells if cell.calibration)
    started = [row.started_at for row in rows if row.started_at]
    finished = [row.finished_at for row in rows if row.finished_at]
    history = atlas.history
    sessions = [labels.counted(history.sessions, "session")] if history.sessions else []
    counts = ((history.retries, "repeated job"), (history.workers_lost, "lost worker"), (history.reused, "reused job"))
    sessions += [labels.counted(count, noun) for count, noun in counts if count]
    if atlas.superseded:
        sessions.append(f"{labels.counted(atlas.superseded, 'failure')} made good by a later attempt")
    if history.open:
        sessions.append(f"last session running or interrupted, last event {labels.moment(history.last_event_at)}")
    return [
        ("Calibration", " | ".join(recipes) or labels.UNKNOWN),
        ("Execution", labels.tally(row.execution for row in rows)),
        ("Device", labels.tally(row.device for row in rows)),
        ("Workers", labels.tally(row.worker for row in rows)),
        ("Seed", labels.tally(row.seed for row in rows)),
        ("Code version", labels.tally(row.code_version for row in rows)),
        ("First start", labels.moment(min(started, default=None))),
        ("Last finish", labels.moment(max(finished, default=None))),
        ("Sessions", ", ".join(sessions) or labels.UNKNOWN),
    ]


def census(maps: Iterable[ModelMap]) -> dict[State, int]:
    """How many cells are in each state, over all models."""
    counts = dict.fromkeys(State, 0)
    for model_map in maps:
        for cell in model_map.cells:
            counts[model_map.state(cell)] += 1
    return counts


def census_text(maps: Sequence[ModelMap]) -> str:
    """ "12 cells: 9 complete, 1 non-finite, 1 failed, 1 not run yet"."""
    counts = census(maps)
    words = {
        State.OK: "complete",
        State.NON_FINITE: "with non-finite values",
        State.FAILED: "with failures",
        State.PENDING: "with measurements to come",
    }
    parts = ", ".join(f"{count} {words[state]}" for state, count in counts.items() if count)
    return f"{labels.counted(sum(counts.values()), 'cell')}" + (f": {parts}" if parts else "")
