"""Level switches: an allocation's neighbours within a budget. Pure; chance comes from a generator that is given.

Some groups go down a choice and others up, and what is left of the budget is spent: so a child is as large as its
parent may be. Source: Sieberling et al. 2024 (EvoPress), arXiv:2410.14649, section 3.1; theirs are of equal sizes.
"""

from __future__ import annotations

from random import Random

from orchestrator.search.space import Allocation, Space


def mutated(
    space: Space, parent: Allocation, budget_bytes: int, chance: Random, *, most_switches: int = 3
) -> Allocation:
    """A neighbour of an allocation that differs from it wherever another one fits the budget.

    Args:
        parent: within the budget.
        most_switches: groups that go down; as many as chance says, few more often than many.
    """
    child = list(parent)
    switches = min(chance.randint(1, most_switches), chance.randint(1, most_switches))
    lowered = [place for place in chance.sample(range(len(child)), len(child)) if child[place] > 0][:switches]
    for place in lowered:
        child[place] -= 1
    spent = _spend(space, child, budget_bytes, chance, closed=set(lowered))
    if spent == parent:  # nothing was large enough to give way to another
        spent = _spend(space, child, budget_bytes, chance, closed=set())
    return spent


def random_allocation(space: Space, budget_bytes: int, chance: Random) -> Allocation:
    """An allocation that spends a budget by chance: from the least, steps up as long as any fits."""
    return _spend(space, list(space.least), budget_bytes, chance, closed=set())


def _spend(space: Space, allocation: list[int], budget_bytes: int, chance: Random, *, closed: set[int]) -> Allocation:
    """Raise groups by a choice, in an order of chance, until nothing more fits."""
    found = list(allocation)
    left = budget_bytes - space.stored_bytes(tuple(found))
    is_open = [place for place in range(len(found)) if place not in closed]
    while is_open:
        place = is_open[chance.randrange(len(is_open))]
        choices = space.groups[place].choices
        step = (
            choices[found[place] + 1].stored_bytes - choices[found[place]].stored_bytes
            if found[place] + 1 < len(choices)
            else None
        )
        if step is None or step > left:
            is_open.remove(place)
        else:
            found[place] += 1
            left -= step
    return tuple(found)
