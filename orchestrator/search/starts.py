"""What a search may start from: uniform allocations, and the knapsack's by each table of sensitivities. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.search.knapsack import solve
from orchestrator.search.space import Allocation, Choice, Space

_STEPS = (0.1, 0.25, 0.5, 1.0)  # of all groups, how many may change at once


@dataclass(frozen=True, kw_only=True)
class Start:
    """An allocation with a name: `knapsack fp`, `uniform 3-g64`."""

    name: str
    allocation: Allocation


def choice_name(choice: Choice) -> str:
    """`3-g64`, or `4-pc` per channel."""
    return f"{choice.weight_bits}-" + (f"g{choice.group_size}" if choice.group_size else "pc")


def uniform_allocations(space: Space) -> list[Start]:
    """Every choice that all free groups have, for all of them; in rising order of bytes."""
    free = [group for group in space.groups if len(group.choices) > 1]
    keys = [(choice.weight_bits, choice.group_size) for choice in free[0].choices] if free else []
    found = []
    for key in keys:
        allocation = []
        for group in space.groups:
            places = [
                index
                for index, choice in enumerate(group.choices)
                if len(group.choices) == 1 or (choice.weight_bits, choice.group_size) == key
            ]
            allocation += places[:1]
        if len(allocation) == len(space.groups):
            name = choice_name(Choice(weight_bits=key[0], group_size=key[1], stored_bytes=0))
            found.append(Start(name=f"uniform {name}", allocation=tuple(allocation)))
    return sorted(found, key=lambda start: space.stored_bytes(start.allocation))


def largest_uniform(space: Space, budget_bytes: int) -> Start | None:
    """The uniform allocation of the most bytes within a budget; None where none fits."""
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
