"""What a search may start from: uniform allocations, and the knapsack's by each table of sensitivities. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.search.knapsack import solve
from orchestrator.search.space import LEFT_ALONE, Allocation, Choice, Group, Space

_STEPS = (0.1, 0.25, 0.5, 1.0)  # of all groups, how many may change at once


@dataclass(frozen=True, kw_only=True)
class Start:
    """An allocation with a name: `knapsack fp`, `uniform 3-g64`."""

    name: str
    allocation: Allocation


def choice_name(choice: Choice) -> str:
    """`3-g64`, or `4-pc` per channel; `16` is left alone."""
    if choice.weight_bits == LEFT_ALONE:
        return str(LEFT_ALONE)
    return f"{choice.weight_bits}-" + (f"g{choice.group_size}" if choice.group_size else "pc")


def uniform_allocations(space: Space) -> list[Start]:
    """Every choice that all free groups of linears have, for all of them, with every choice of embedding and head; in
    rising order of bytes, those of the linears first."""
    linears = [group for group in space.groups if not group.role]
    matrices = [group for group in space.groups if group.role]
    found: dict[Allocation, str] = {}
    for name, shared in _uniform(linears):
        for indices in itertools.product(*(range(len(group.choices)) for group in matrices)):
            words = [name]
            for group, index in zip(matrices, indices, strict=True):
                if len(group.choices) > 1:
                    words.append(f"{group.role} {choice_name(group.choices[index])}")
            own, others = iter(shared), iter(indices)
            allocation = tuple(next(others) if group.role else next(own) for group in space.groups)
            found[allocation] = f"uniform {', '.join(words)}"
    return [Start(name=name, allocation=allocation) for allocation, name in found.items()]


def _uniform(groups: Sequence[Group]) -> list[tuple[str, Allocation]]:
    """Name and indices of every choice that all of the groups have, or that is pinned; in rising order of bytes."""
    free = [group for group in groups if len(group.choices) > 1]
    if not free:
        return [("pinned", (0,) * len(groups))]
    found = []
    for choice in free[0].choices:
        key = (choice.weight_bits, choice.group_size)
        allocation = []
        for group in groups:
            places = [
                index
                for index, one in enumerate(group.choices)
                if len(group.choices) == 1 or (one.weight_bits, one.group_size) == key
            ]
            allocation += places[:1]
        if len(allocation) == len(groups):
            found.append((choice_name(choice), tuple(allocation)))
    own = Space(tuple(groups))
    return sorted(found, key=lambda one: own.stored_bytes(one[1]))


def largest_uniform(space: Space, budget_bytes: int) -> Start | None:
    """Within a budget the uniform allocation that has the most bytes for linears, and then for embedding and head; None
    where none fits."""
    fitting = [one for one in uniform_allocations(space) if space.stored_bytes(one.allocation) <= budget_bytes]
    return fitting[-1] if fitting else None


def starts(space: Space, budget_bytes: int, tables: Mapping[str, Sequence[Sequence[float]]]) -> list[Start]:
    """All starts within a budget, each allocation once.

    Args:
        tables: name of a base -> losses of each group's choices, finite.
    """
    found = [
        Start(name=f"knapsack {base}", allocation=solve(space, losses, budget_bytes)) for base, losses in tables.items()
    ]
    uniform = largest_uniform(space, budget_bytes)
    if uniform is not None:
        found.append(uniform)
    return list({start.allocation: start for start in reversed(found)}.values())[::-1]


def neighbours(space: Space, allocation: Allocation) -> Space:
    """The space of a step up or down from an allocation, where there is one; its choices keep their order."""
    groups = []
    for group, index in zip(space.groups, allocation, strict=True):
        groups.append(replace(group, choices=group.choices[max(0, index - 1) : index + 2]))
    return Space(tuple(groups))


def about(
    space: Space, allocation: Allocation, losses: Sequence[Sequence[float]], budget_bytes: int, name: str
) -> list[Start]:
    """Knapsacks about an allocation: the additive model holds near where it was measured, so the steps are of several
    lengths.

    Args:
        losses: of each group's choices in `neighbours`, with all others as in the allocation.
        name: what to call the allocation: "best".
    """
    near = neighbours(space, allocation)
    lowest = [max(0, index - 1) for index in allocation]
    own = tuple(index - low for index, low in zip(allocation, lowest, strict=True))
    found = []
    for share in _STEPS:
        changes = max(2, round(share * len(space.groups)))
        step = solve(near, losses, budget_bytes, about=own, most_changes=changes)
        moved = tuple(low + index for low, index in zip(lowest, step, strict=True))
        found.append(Start(name=f"knapsack {name}, {changes} steps", allocation=moved))
    different = {start.allocation: start for start in reversed(found) if start.allocation != allocation}
    return list(different.values())[::-1]
