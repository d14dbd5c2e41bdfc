"""Neighbours of an allocation: within the budget to the byte, and spending it."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.search.switches import fitted, mutated, random_allocation
from tests.orchestrator.search.conftest import spaces_with_budgets


def can_grow(space, allocation, budget):
    left = budget - space.stored_bytes(allocation)
    return [
        place
        for place, (group, index) in enumerate(zip(space.groups, allocation, strict=True))
        if index + 1 < len(group.choices)
        and group.choices[index + 1].stored_bytes - group.choices[index].stored_bytes <= left
    ]


@given(spaces_with_budgets(), st.integers(0, 1000))
def test_a_random_allocation_fits_and_spends(case, seed):
    space, budget = case
    found = random_allocation(space, budget, Random(seed))
    assert space.stored_bytes(found) <= budget
    assert can_grow(space, found, budget) == []


@given(spaces_with_budgets(), st.integers(0, 1000))
def test_children_of_children_never_exceed_the_budget(case, seed):
    space, budget = case
    chance = Random(seed)
    allocation = random_allocation(space, budget, chance)
    for _ in range(10):
        losses = [[chance.random() for _ in group.choices] for group in space.groups]
        allocation = mutated(space, allocation, budget, chance, losses=chance.choice([None, losses]))
        assert space.stored_bytes(allocation) <= budget
        assert all(0 <= index < len(group.choices) for group, index in zip(space.groups, allocation, strict=True))


@given(spaces_with_budgets(), st.integers(0, 1000))
def test_whatever_is_proposed_is_made_to_fit(case, seed):
    space, budget = case
    chance = Random(seed)
    proposed = tuple(chance.randrange(len(group.choices)) for group in space.groups)
    found = fitted(space, proposed, budget, chance)
    assert space.stored_bytes(found) <= budget
    if space.stored_bytes(proposed) <= budget:
        assert all(index >= before for index, before in zip(found, proposed, strict=True))


def test_chance_is_guided_by_what_choices_cost(make_space_of):
    """Group 0 loses much by going down, group 5 gains much by going up."""
    space = make_space_of([[10, 20, 30]] * 6)
    parent = (1,) * 6
    losses = [[9.0, 0.1, 0.0], *([[0.5, 0.3, 0.2]] * 4), [0.6, 0.5, 0.0]]
    children = [mutated(space, parent, 120, Random(seed), losses=losses, most_switches=1) for seed in range(400)]
    by_chance = [mutated(space, parent, 120, Random(seed), most_switches=1) for seed in range(400)]
    assert sum(child[0] == 0 for child in children) < 0.3 * sum(child[0] == 0 for child in by_chance)
    assert sum(child[5] == 2 for child in children) > 1.3 * sum(child[5] == 2 for child in by_chance)
    assert any(child[0] == 0 for child in children)


def test_equal_sizes_are_switched_one_for_one(make_space_of):
    space = make_space_of([[10, 20, 30]] * 8)
    parent, chance = (1,) * 8, Random(0)
    for _ in range(50):
        child = mutated(space, parent, space.stored_bytes(parent), chance)
        assert child != parent
        assert space.stored_bytes(child) == space.stored_bytes(parent)


def test_what_is_left_is_spent_where_nothing_gives_way(make_space_of):
    """One group that can only go up, another pinned."""
    space = make_space_of([[10, 20], [7]])
    assert mutated(space, (0, 0), 27, Random(0)) == (1, 0)


def test_the_same_seed_gives_the_same_child(make_space_of):
    space = make_space_of([[10, 20, 35]] * 6)
    children = [mutated(space, (1,) * 6, 130, Random("3 7")) for _ in range(2)]
    assert children[0] == children[1]
