"""Which groups of linears hurt: sensitivities by choice, ranked, and how much of the loss a few of them make. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.atlas import labels
from orchestrator.atlas.search_grid import Grid, choice_name
from orchestrator.atlas.search_rows import FP_BASE, is_finite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.atlas.search_rows import Search

WORST_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Level:
    """One choice of bits and groups, measured on one group of linears after the other."""

    base: str
    weight_bits: int
    group_size: int
    losses: Mapping[str, float]  # by group, in the model's order; may be non-finite
    adds_up: bool  # whether a loss is of this choice alone, so that a sum of them says something

    @property
    def name(self) -> str:
        """ "2 bits, g64"; what it stands on where that is not the float model."""
        base = labels.plain(self.base)
        on = "" if base == FP_BASE else f", {base}" if base.startswith("about ") else f", the rest {base}"
        return choice_name(self.weight_bits, self.group_size) + on

    @property
    def total(self) -> float | None:
        """The sum of the losses; None where a sum says nothing, or one of them is not finite."""
        values = [max(0.0, loss) for loss in self.losses.values()]
        total = sum(values)
        return total if self.adds_up and is_finite(total) and total > 0 else None

    def share(self, group: str) -> float | None:
        """Of the total, what one group makes."""
        return None if self.total is None else max(0.0, self.losses[group]) / self.total


def levels(search: Search) -> list[Level]:
    """What was measured, of each base the fewest bits and the coarsest groups first."""
    found: dict[tuple[int, int, float], dict[str, float]] = {}
    bases = search.bases
    for row in search.sensitivities:
        key = (bases.index(row.base), row.weight_bits, -(row.group_size or math.inf))
        found.setdefault(key, {})[row.group] = row.loss
    order = {name: place for place, name in enumerate(grid_of(search).names)}
    return [
        Level(
            base=bases[base],
            weight_bits=bits,
            group_size=0 if math.isinf(coarse) else int(-coarse),
            # A divergence is nothing in the float model; other losses are those of the whole model.
            adds_up=bases[base] == FP_BASE and search.objective in ("kl_divergence", ""),
            losses=dict(sorted(found[base, bits, coarse].items(), key=lambda item: order[item[0]])),
        )
        for base, bits, coarse in sorted(found)
    ]


def grid_of(search: Search) -> Grid:
    """The groups that the search knows of: those of its space, and such as only sensitivities name."""
    of_space = [group.name for group in search.space.groups] if search.space else []
    return Grid(tuple(dict.fromkeys([*of_space, *(row.group for row in search.sensitivities)])))


@dataclass(frozen=True, kw_only=True)
class Worst:
    """One group at one choice."""

    level: Level
    group: str
    loss: float
    share: float | None  # of the losses of all groups at this choice


def worst(found: list[Level]) -> list[Worst]:
    """The groups and choices that cost most, on the first base; what is not finite is worst of all."""
    rows = [
        Worst(level=level, group=group, loss=loss, share=level.share(group))
        for level in found
        if level.base == found[0].base
        for group, loss in level.losses.items()
    ]
    rows.sort(key=lambda row: -row.loss if is_finite(row.loss) else -math.inf)
    return rows[:WORST_SHOWN]


def heaviest(level: Level) -> list[str]:
    """The fewest groups that make half of a level's total, the worst first; none where it has none."""
    if level.total is None:
        return []
    ranked = sorted(level.losses, key=lambda group: -level.losses[group])
    taken: list[str] = []
    while sum(max(0.0, level.losses[group]) for group in taken) < level.total / 2:
        taken.append(ranked[len(taken)])
    return taken
