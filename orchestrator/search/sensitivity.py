"""Which groups hurt: the divergence of each choice of each group, one at a time, as the knapsack's losses. Pure but for
what measures."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.search.space import Space

Measure = Callable[[int, int], float]
"""(group's place, index of its choice) -> loss of that choice alone."""
Told = Callable[[int, int], None]


def sensitivities(space: Space, measure: Measure, told: Told | None = None) -> list[list[float]]:
    """Losses by group and choice. A group with one choice is not measured: it is the same in every allocation.

    Args:
        told: called with (measured, of how many) after each.
    """
    total = sum(len(group.choices) for group in space.groups if len(group.choices) > 1)
    done, table = 0, []
    for place, group in enumerate(space.groups):
        losses = [0.0]
        if len(group.choices) > 1:
            losses = []
            for index in range(len(group.choices)):
                losses.append(measure(place, index))
                done += 1
                if told:
                    told(done, total)
        table.append(losses)
    return table
