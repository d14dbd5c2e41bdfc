"""What calibration seeds do to a score: mean and standard deviation over cells that differ in the seed alone. Pure."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.atlas import labels
from orchestrator.atlas.tables import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.atlas.rows import Cell
    from orchestrator.atlas.tables import Column, ModelMap

SEED = "seed"
NOTE = (
    "Mean ± standard deviation over cells that differ in the calibration seed alone. In brackets: difference of the "
    "mean to fp."
)


@dataclass(frozen=True, kw_only=True)
class SeedRow:
    """Cells that differ in the calibration seed alone, as texts."""

    label: str
    seeds: str  # "0, 1, 2"
    scores: tuple[str, ...]  # one per column of the map


def seed_rows(model_map: ModelMap) -> list[SeedRow]:
    """One row per group of at least two seeds, in the order of the map's cells."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in model_map.cells:
        if SEED in cell.calibration:
            groups[_identity(cell)].append(cell)
    return [_row(model_map, cells) for cells in groups.values() if len({_seed(cell) for cell in cells}) > 1]


def _identity(cell: Cell) -> str:
    recipe = {name: value for name, value in cell.calibration.items() if name != SEED}
    scheme = [cell.method, cell.weight_bits, cell.activation_bits, cell.group_size, cell.symmetric, cell.options]
    return json.dumps([scheme, recipe], sort_keys=True, default=str)


def _seed(cell: Cell) -> str:
    return str(cell.calibration[SEED])


def _row(model_map: ModelMap, cells: Sequence[Cell]) -> SeedRow:
    first = cells[0]
    return SeedRow(
        label=model_map.cell_labels[first.key].replace(f" {SEED}={_seed(first)}", ""),
        seeds=", ".join(sorted((_seed(cell) for cell in cells), key=labels.natural)),
        scores=tuple(_score(model_map, cells, column) for column in model_map.columns),
    )


def _score(model_map: ModelMap, cells: Sequence[Cell], column: Column) -> str:
    entries = [model_map.entry(cell, column) for cell in cells]
    values = [entry.value for entry in entries if entry.state is State.OK and entry.value is not None]
    missing = labels.tally(entry.text for entry in entries if entry.state is not State.OK)
    if not values:
        return missing
    percent, mean = column in model_map.percent, statistics.fmean(values)
    text = labels.quality(mean, statistics.stdev(values) if len(values) > 1 else None, percent=percent)
    fp = model_map.fp_entry(column)
    if fp is not None and fp.value is not None:
        text += f" ({labels.difference(mean, fp.value, percent=percent)})"
    return text if len(values) == len(entries) else f"{text}; {missing}"
