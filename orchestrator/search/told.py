"""How a search goes, from its files alone."""

from __future__ import annotations

import math
from pathlib import Path

from orchestrator.search.records import SENSITIVITY, TRIALS, Records


def search_lines(directory: Path) -> list[str]:
    """One line on sensitivities and one per study; none where the directory holds no search.

    Args:
        directory: the output directory of the sweep that the search ends in.
    Raises:
        DamagedPartError: a table cannot be read.
    """
    records = Records(directory)
    if not records.directory.is_dir():
        return []
    lines = []
    measured = len(records.rows(SENSITIVITY))
    if measured:
        lines.append(f"search: {measured} choices measured alone")
    studies: dict[str, list[dict[str, object]]] = {}
    for row in records.rows(TRIALS):
        studies.setdefault(row["study"], []).append(row)
    for study, rows in studies.items():
        losses = [float(str(row["loss"])) for row in rows if row["state"] == "complete"]
        guards = [float(str(row["guard_loss"])) for row in rows if row["guard_loss"] is not None]
        best = f"{min(losses):.4g}" if losses else "none yet"
        guard = f" (guard {min(guards):.4g})" if guards and math.isfinite(min(guards)) else ""
        spent = rows[-1]["window_forwards"]
        lines.append(f"search: {study}: {len(rows)} allocations tried on {spent} windows, best {best}{guard}")
    if records.chosen.exists():
        lines.append("search: allocations are chosen")
    return lines or ["search: its bank is being made"]
