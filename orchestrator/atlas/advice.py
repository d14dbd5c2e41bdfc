"""What to deploy, as the measurements have it: the smallest within a limit of fp, and the Pareto front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.atlas import labels

if TYPE_CHECKING:
    from collections.abc import Iterable

    from orchestrator.atlas.rows import Cell
    from orchestrator.atlas.tables import Column, ModelMap

LIMITS = (0.01, 0.05, 0.10)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """The smallest checkpoint within a limit of fp's perplexity."""

    column: Column
    limit: float
    cell: Cell
    change: float
    saving: float | None  # share of fp's checkpoint that is saved

    def headline(self, model_map: ModelMap) -> str:
        """The rule that this cell is the answer to."""
        return f"smallest within {self.limit:.0%} of fp perplexity on {model_map.column_labels[self.column]}"

    def answer(self, model_map: ModelMap) -> str:
        """The cell."""
        return model_map.cell_labels[self.cell.key]

    def detail(self, model_map: ModelMap) -> str:
        """What it costs and what it scores."""
        entry = model_map.entry(self.cell, self.column)
        saving = "" if self.saving is None else f" ({-100 * self.saving:+.0f}%)".replace("-", "−")
        size = f"{labels.megabytes(self.cell.checkpoint_bytes)} MB{saving}"
        return f"{size}, perplexity {entry.text} ({entry.difference})"


def deployments(model_map: ModelMap) -> list[Deployment]:
    """For each corpus the smallest cell within each limit; nothing where no cell is."""
    reference = model_map.reference
    fp_bytes = reference.checkpoint_bytes if reference else None
    found: list[Deployment] = []
    for column in model_map.columns:
        previous: Cell | None = None
        for limit in LIMITS if column.is_perplexity else ():
            candidates = [
                (cell.checkpoint_bytes, change, cell)
                for cell in model_map.cells
                if not cell.is_fp
                and cell.checkpoint_bytes is not None
                and (fp_bytes is None or cell.checkpoint_bytes < fp_bytes)
                and (change := model_map.entry(cell, column).change) is not None
                and change <= limit
            ]
            if not candidates:
                continue
            size, change, cell = min(candidates, key=lambda item: item[:2])
            if cell is not previous:  # a wider limit that buys nothing is not worth a line
                saving = 1 - size / fp_bytes if fp_bytes else None
                found.append(Deployment(column=column, limit=limit, cell=cell, change=change, saving=saving))
            previous = cell
    return found


def pareto_front(points: Iterable[tuple[float, float]], *, higher_is_better: bool) -> list[tuple[float, float]]:
    """Points (size, score) that no smaller-or-equal point matches or beats, from small to large."""
    front: list[tuple[float, float]] = []
    sign = -1.0 if higher_is_better else 1.0
    for size, score in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * score < sign * front[-1][1]:
            front.append((size, score))
    return front
