"""The front of two objectives."""

import optuna
import pytest

from orchestrator.search.config import FrontConfig
from orchestrator.search.front import FrontSearch, spread
from orchestrator.search.starts import uniform_allocations
from tests.orchestrator.search.made_up import FormulaCrew, KilledError, objective_of

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def space(make_space_of):
    return make_space_of([[20, 30, 40]] * 8)


def searched(space, directory, *, crew=None, rows=None, **settings):
    search = FrontSearch(
        space=space,
        settings=FrontConfig.model_validate({"evaluations": 60, "cells": 2} | settings),
        objective=objective_of(crew or FormulaCrew(), windows=4),
        seed=0,
        record=(rows if rows is not None else []).extend,
        told=lambda _: None,
        offspring=4,
    )
    return search.run(directory / "study.journal", uniform_allocations(space))


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "random"])
def test_nothing_on_it_is_beaten_and_the_ends_are_uniform(space, tmp_path, sampler):
    rows = []
    found = searched(space, tmp_path, rows=rows, sampler=sampler)
    front = found["front"]
    sizes, losses = [one["stored_bytes"] for one in front], [one["loss"] for one in front]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(losses, reverse=True)
    assert front[0]["allocation"] == [0] * 8
    assert front[-1]["allocation"] == [2] * 8
    for row in rows:
        assert any(one["stored_bytes"] <= row["stored_bytes"] and one["loss"] <= row["loss"] for one in front)
    assert sum("guard_loss" in one for one in front) == 2
    assert found["trials"] == len(rows) == 60


def test_a_killed_driver_goes_on(space, tmp_path):
    rows = []
    with pytest.raises(KilledError):
        searched(space, tmp_path, crew=FormulaCrew(fails_after=5), rows=rows)
    assert len(rows) == 20
    found = searched(space, tmp_path, rows=rows)
    assert len(rows) == 60
    assert found["window_forwards"] > 60 * 4 - 4 * 4


def test_cells_are_spread_over_the_front():
    assert spread(2, 3) == [0, 1]
    assert spread(11, 1) == [5]
    assert spread(9, 3) == [2, 4, 6]
