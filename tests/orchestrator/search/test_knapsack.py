"""The additive model, against all allocations of small spaces."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import BitatlasError
from orchestrator.search.knapsack import solve
from tests.orchestrator.search.conftest import spaces_with_budgets


def every(space):
    return itertools.product(*(range(len(group.choices)) for group in space.groups))


def total(losses, allocation):
    return sum(group[index] for group, index in zip(losses, allocation, strict=True))


@given(spaces_with_budgets(), st.data())
def test_it_is_the_best_of_all_that_fit(case, data):
    space, budget = case
    losses = [[data.draw(st.floats(0, 10, width=16)) for _ in group.choices] for group in space.groups]
    found = solve(space, losses, budget)
    assert space.stored_bytes(found) <= budget
    best = min(total(losses, allocation) for allocation in every(space) if space.stored_bytes(allocation) <= budget)
    assert total(losses, found) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_size_of_losses_does_not_matter(make_space_of, scale):
    space = make_space_of([[100, 200], [100, 200], [100, 200]])
    losses = [[3.0 * scale, 0.0], [2.0 * scale, 0.0], [1.0 * scale, 0.0]]
    assert solve(space, losses, 500) == (1, 1, 0)


def test_to_the_byte(make_space_of):
    space = make_space_of([[10_000_000, 10_000_001], [10_000_000, 10_000_001]])
    losses = [[1.0, 0.0], [1.1, 0.0]]
    assert solve(space, losses, 20_000_001) == (0, 1)
    assert solve(space, losses, 20_000_002) == (1, 1)
    assert solve(space, losses, 20_000_000) == (0, 0)


def test_more_bytes_may_be_a_worse_choice(make_space_of):
    """Losses need not fall with bytes."""
    assert solve(make_space_of([[1, 2, 3]]), [[1.0, 0.5, 0.7]], 3) == (1,)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(make_space_of, loss):
    with pytest.raises(BitatlasError, match="the knapsack needs a finite loss of every choice"):
        solve(make_space_of([[1, 2]]), [[loss, 0.0]], 2)


def test_nothing_fits(make_space_of):
    with pytest.raises(BitatlasError, match="no allocation fits 1 bytes"):
        solve(make_space_of([[2, 3]]), [[1.0, 0.0]], 1)
