"""What a search may start from."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.search.space import Choice, Group, Space
from orchestrator.search.starts import about, largest_uniform, neighbours, starts, uniform_allocations
from orchestrator.search.switches import random_allocation
from tests.orchestrator.search.conftest import spaces_with_budgets


def test_uniform_allocations_in_rising_order(make_space_of):
    space = make_space_of([[10, 20, 30]] * 3 + [[7]])
    found = uniform_allocations(space)
    assert [one.name for one in found] == ["uniform 1-g64", "uniform 2-g64", "uniform 3-g64"]
    assert [one.allocation for one in found] == [(0, 0, 0, 0), (1, 1, 1, 0), (2, 2, 2, 0)]
    assert largest_uniform(space, 67).allocation == (1, 1, 1, 0)
    assert largest_uniform(space, 66).allocation == (0, 0, 0, 0)
    assert largest_uniform(space, 36) is None


def test_a_choice_that_some_groups_lack_is_no_uniform_one():
    def group(name, keys):
        choices = tuple(Choice(weight_bits=bits, group_size=size, stored_bytes=10 * bits) for bits, size in keys)
        return Group(linears=(name,), num_weights=80, choices=choices)

    space = Space((group("a", [(2, 0), (4, 64)]), group("b", [(2, 0), (3, 64), (4, 64)])))
    assert [(one.name, one.allocation) for one in uniform_allocations(space)] == [
        ("uniform 2-pc", (0, 0)),
        ("uniform 4-g64", (1, 2)),
    ]


@given(spaces_with_budgets())
def test_no_start_exceeds_the_budget(case):
    space, budget = case
    losses = [[1.0 / (1 + index) for index in range(len(group.choices))] for group in space.groups]
    found = starts(space, budget, {"fp": losses})
    assert found
    assert all(space.stored_bytes(one.allocation) <= budget for one in found)
    assert len({one.allocation for one in found}) == len(found)


@given(spaces_with_budgets(), st.integers(0, 1000))
def test_steps_about_an_allocation_keep_the_budget_and_are_one_choice_long(case, seed):
    space, budget = case
    chance = Random(seed)
    allocation = random_allocation(space, budget, chance)
    losses = [[chance.random() for _ in group.choices] for group in neighbours(space, allocation).groups]
    found = about(space, allocation, losses, budget, "best")
    for one in found:
        assert space.stored_bytes(one.allocation) <= budget
        assert one.allocation != allocation
        assert all(abs(index - before) <= 1 for index, before in zip(one.allocation, allocation, strict=True))


def test_short_steps_change_few_groups(make_space_of):
    space = make_space_of([[10, 20, 30]] * 20)
    allocation = (1,) * 20
    losses = [[0.3 + place / 100, 0.2, 0.1 - place / 100] for place in range(20)]
    found = about(space, allocation, losses, space.stored_bytes(allocation), "best")
    changed = [sum(index != 1 for index in one.allocation) for one in found]
    assert changed == [2, 4, 10, 20]
    assert found[0].allocation == (0, *(1,) * 18, 2)
