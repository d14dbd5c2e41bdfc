"""One group at a time, on a base."""

import math

from orchestrator.search.sensitivity import FP, base_of, every_choice, measured, steps_from, table
from orchestrator.search.starts import neighbours
from tests.orchestrator.search.made_up import FormulaCrew, loss, objective_of


def all_of(space, base, crew, done=()):
    rows = []
    measured(space, base, every_choice(space), objective_of(crew), 2, done, rows.extend)
    return rows


def test_every_choice_of_every_group_that_has_one(make_space_of):
    space, crew = make_space_of([[1, 2, 3], [5], [4, 6]]), FormulaCrew(noise=0.0)
    base = base_of(space, FP, None)
    rows = all_of(space, base, crew)
    assert base == (None, None, None)
    assert [(request.mixture, request.base) for request in crew.requests if request.windows[0] == 0] == [
        (mixture, base)
        for mixture in [(0, None, None), (1, None, None), (2, None, None), (None, None, 0), (None, None, 1)]
    ]
    assert table(space, rows) == [
        [loss((index, None, None)) for index in range(3)],
        [0.0],
        [loss((None, None, index)) for index in range(2)],
    ]
    assert {row["num_windows"] for row in rows} == {2}


def test_on_top_of_a_uniform_allocation(make_space_of):
    space, crew = make_space_of([[1, 2], [1, 2]]), FormulaCrew(noise=0.0)
    base = base_of(space, "uniform 2-g64", (1, 1))
    assert table(space, all_of(space, base, crew)) == [
        [loss((0, 1)), loss((1, 1))],
        [loss((1, 0)), loss((1, 1))],
    ]


def test_what_was_measured_is_not_measured_again(make_space_of):
    space, crew = make_space_of([[1, 2], [1, 2]]), FormulaCrew()
    rows = all_of(space, (None, None), crew)
    done = [(row["group"], row["weight_bits"], row["group_size"]) for row in rows[:3]]
    assert [row["group"] for row in all_of(space, (None, None), FormulaCrew(), done)] == [rows[3]["group"]]


def test_a_choice_that_breaks_the_model_is_the_last_one_to_take(make_space_of):
    space = make_space_of([[1, 2], [1, 2]])
    rows = all_of(space, (None, None), FormulaCrew(noise=0.0))
    rows[0]["loss"] = math.nan
    found = table(space, rows)
    assert found[0][0] == 2 * max(found[0][1], *found[1])


def test_steps_from_an_allocation(make_space_of):
    space, crew, rows = make_space_of([[1, 2, 3, 4], [5], [1, 2]]), FormulaCrew(noise=0.0), []
    allocation = (2, 0, 0)
    places = steps_from(space, allocation)
    assert places == [(0, 1), (0, 3), (2, 1)]
    measured(space, allocation, places, objective_of(crew), 2, (), rows.extend)
    base_loss = loss(allocation)
    assert table(neighbours(space, allocation), rows, base_loss) == [
        [loss((1, 0, 0)), base_loss, loss((3, 0, 0))],
        [0.0],
        [base_loss, loss((2, 0, 1))],
    ]
