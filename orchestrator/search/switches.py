"""Level switches: an allocation's neighbours within a budget. Pure; chance comes from a generator that is given.

Some groups go down a choice and others up, and what is left of the budget is spent: so a child is as large as its
parent may be. Source: Sieberling et al. 2024 (EvoPress), arXiv:2410.14649, section 3.1; theirs are of equal sizes and
by chance alone. Where losses of single choices are known, chance is guided here: what costs little goes down more
often, what gains much goes up more often, per byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from orchestrator.search.space import Allocation, Space

Losses = Sequence[Sequence[float]]
"""Of each group, of each of its choices; finite."""
_LEAST_SHARE = 0.01  # of the largest weight: what looks hopeless alone may be right among others


def mutated(
    space: Space,
    parent: Allocation,
    budget_bytes: int,
    chance: Random,
    *,
    most_switches: int = 3,
    losses: Losses | None = None,
) -> Allocation:
    """A neighbour of an allocation that differs from it wherever another one fits the budget.

    Args:
        parent: within the budget.
        most_switches: groups that go down; as many as chance says, few more often than many.
        losses: what guides chance; None leaves it alone.
    """
    child = list(parent)
    switches = min(chance.randint(1, most_switches), chance.randint(1, most_switches))
    lowered: set[int] = set()
    for _ in range(switches):
        places = [place for place, index in enumerate(child) if index > 0 and place not in lowered]
        if not places:
            break
        place = _drawn(places, [_down_weight(space, child, place, losses) for place in places], chance)
        child[place] -= 1
        lowered.add(place)
    spent = _spend(space, child, budget_bytes, chance, closed=lowered, losses=losses)
    if spent == parent:  # nothing was large enough to give way to another
        spent = _spend(space, child, budget_bytes, chance, closed=set(), losses=losses)
    return spent


def random_allocation(space: Space, budget_bytes: int, chance: Random) -> Allocation:
    """An allocation that spends a budget by chance: from the least, steps up as long as any fits."""
    return _spend(space, list(space.least), budget_bytes, chance, closed=set())


def fitted(space: Space, allocation: Allocation, budget_bytes: int, chance: Random) -> Allocation:
    """An allocation made to spend a budget: groups go down by chance until it fits, then up while any fits.

    Args:
        budget_bytes: at least that of `space.least`.
    """
    found = list(allocation)
    lowered: set[int] = set()
    while space.stored_bytes(tuple(found)) > budget_bytes:
        place = chance.choice([place for place, index in enumerate(found) if index > 0])
        found[place] -= 1
        lowered.add(place)
    return _spend(space, found, budget_bytes, chance, closed=lowered)


def _spend(
    space: Space,
    allocation: list[int],
    budget_bytes: int,
    chance: Random,
    *,
    closed: set[int],
    losses: Losses | None = None,
) -> Allocation:
    """Raise groups by a choice, in an order of chance, until nothing more fits."""
    found = list(allocation)
    left: float = budget_bytes - space.stored_bytes(tuple(found))
    is_open = [place for place in range(len(found)) if place not in closed]
    while True:
        is_open = [place for place in is_open if _step_up(space, found, place) <= left]
        if not is_open:
            return tuple(found)
        place = _drawn(is_open, [_up_weight(space, found, place, losses) for place in is_open], chance)
        left -= _step_up(space, found, place)
        found[place] += 1


def _step_up(space: Space, allocation: Sequence[int], place: int) -> float:
    """Bytes to the next choice; infinity where there is none."""
    choices, index = space.groups[place].choices, allocation[place]
    return choices[index + 1].stored_bytes - choices[index].stored_bytes if index + 1 < len(choices) else float("inf")


def _up_weight(space: Space, allocation: Sequence[int], place: int, losses: Losses | None) -> float:
    """How much loss the next choice takes away per byte; 1 where nothing guides."""
    if losses is None:
        return 1.0
    index = allocation[place]
    return max(0.0, losses[place][index] - losses[place][index + 1]) / _step_up(space, allocation, place)


def _down_weight(space: Space, allocation: Sequence[int], place: int, losses: Losses | None) -> float:
    """How many bytes the choice below frees per loss; 1 where nothing guides."""
    if losses is None:
        return 1.0
    choices, index = space.groups[place].choices, allocation[place]
    loss = losses[place][index - 1] - losses[place][index]
    return (choices[index].stored_bytes - choices[index - 1].stored_bytes) / max(loss, 1e-12)


def _drawn(places: Sequence[int], weights: Sequence[float], chance: Random) -> int:
    """One place by chance; square roots of weights, so that guidance is a preference and no rule."""
    most = max(weights)
    if most <= 0:
        return chance.choice(places)
    shares = [max(weight / most, _LEAST_SHARE) ** 0.5 for weight in weights]
    return chance.choices(places, shares)[0]
