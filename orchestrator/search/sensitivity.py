"""Which groups hurt: the loss of each choice of each group, one at a time, on top of a base that the others keep.

The base's hidden states before each block are kept by workers, so that a probe runs the blocks from its own on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from orchestrator.search.mixtures import Mixture
from orchestrator.search.objective import Objective
from orchestrator.search.space import LEFT_ALONE, Allocation, Space

FP = "fp"
_AT_ONCE = 48  # then they are recorded: what a killed driver loses
Place = tuple[int, int]
"""(group's place, index of its choice)."""
Told = Callable[[list[dict[str, Any]]], None]


def base_of(space: Space, name: str, uniform: Mixture | None) -> Mixture:
    """The mixture that a base's name stands for."""
    if name == FP or uniform is None:
        return (None,) * len(space.groups)
    return uniform


def every_choice(space: Space) -> list[Place]:
    """All choices of all groups that have more than one."""
    return [
        (place, index)
        for place, group in enumerate(space.groups)
        for index in range(len(group.choices))
        if len(group.choices) > 1
    ]


def is_of_base(space: Space, base: Mixture, place: Place) -> bool:
    """Whether the base has this choice already; in the float model it is that of leaving a matrix alone."""
    group, index = place
    if base[group] is None:
        return space.groups[group].choices[index].weight_bits == LEFT_ALONE
    return base[group] == index


def steps_from(space: Space, allocation: Allocation) -> list[Place]:
    """The choices a step up or down from an allocation."""
    return [(place, index) for place, index in every_choice(space) if abs(index - allocation[place]) == 1]


def measured(
    space: Space,
    base: Mixture,
    places: Sequence[Place],
    objective: Objective,
    windows: int,
    done: Iterable[tuple[str, int, int]],
    told: Told,
) -> None:
    """Measure what is missing, a few at a time.

    Args:
        places: the choices, each alone on top of the base.
        windows: search windows.
        done: (group's name, weight_bits, group_size) that were measured before.
        told: given the columns of each choice that was measured: group, weight_bits, group_size, loss.
    """
    known = set(done)
    missing = [(place, index) for place, index in places if _key(space, place, index) not in known]
    for start in range(0, len(missing), _AT_ONCE):
        some = missing[start : start + _AT_ONCE]
        mixtures = [(*base[:place], index, *base[place + 1 :]) for place, index in some]
        losses = objective.losses(mixtures, windows, "sensitivity", base=base)
        rows = []
        for (place, index), loss in zip(some, losses, strict=True):
            group, weight_bits, group_size = _key(space, place, index)
            rows.append(
                {
                    "group": group,
                    "weight_bits": weight_bits,
                    "group_size": group_size,
                    "loss": loss,
                    "num_windows": windows,
                    "at": datetime.now(UTC),
                }
            )
        told(rows)


def _key(space: Space, place: int, index: int) -> tuple[str, int, int]:
    group, choice = space.groups[place], space.groups[place].choices[index]
    return group.name, choice.weight_bits, choice.group_size


def table(space: Space, rows: Sequence[Mapping[str, Any]], base_loss: float = math.nan) -> list[list[float]]:
    """Rows of one base as the knapsack takes them: by group and choice; 0 for a group that has no choice.

    A choice whose loss is no number gets the worst loss of all, twice: it breaks the model.

    Args:
        base_loss: of choices that have no row because they are the base's own.
    """
    losses = {(row["group"], row["weight_bits"], row["group_size"]): float(row["loss"]) for row in rows}
    finite = [loss for loss in losses.values() if abs(loss) < math.inf]
    worst = 2 * max(finite, default=1.0)
    found = []
    for group in space.groups:
        if len(group.choices) == 1:
            found.append([0.0])
            continue
        values = [losses.get((group.name, one.weight_bits, one.group_size), base_loss) for one in group.choices]
        found.append([value if abs(value) < math.inf else worst for value in values])
    return found
