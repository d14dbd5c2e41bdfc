"""Losses over windows: each measured once, parted between workers, in the objective that was asked for."""

import math

import pytest

from orchestrator.search.objective import Objective
from tests.orchestrator.search.made_up import FormulaCrew, loss, objective_of

A, B = (0, 1, 2), (2, 1, 0)


def test_means_over_the_windows_that_were_asked_for():
    crew = FormulaCrew(noise=0.1)
    objective = objective_of(crew)
    found = objective.losses([A, B], 3, "x")
    expected = [sum(crew._one(mixture, window)[0] for window in range(3)) / 3 for mixture in (A, B)]
    assert found == pytest.approx(expected, rel=1e-12)
    guards = objective.guard_losses([A], "x")
    assert guards == pytest.approx([sum(crew._one(A, window)[0] for window in range(8, 12)) / 4], rel=1e-12)


def test_a_window_is_never_run_twice():
    crew = FormulaCrew()
    objective = objective_of(crew)
    objective.losses([A, B, A], 2, "x")
    objective.losses([A], 8, "x")
    objective.losses([B, A], 8, "x")
    ran = [(request.mixture, window) for request in crew.requests for window in request.windows]
    assert sorted(ran) == sorted((mixture, window) for mixture in (A, B) for window in range(8))
    assert objective.window_forwards == 16


def test_one_mixture_is_parted_between_all_workers():
    crew = FormulaCrew(size=3)
    objective_of(crew).losses([A], 8, "x")
    assert [request.windows for request in crew.requests] == [(0, 1, 2), (3, 4, 5), (6, 7)]
    crew = FormulaCrew(size=3)
    objective_of(crew).losses([A, B, (0, 0, 0)], 8, "x")
    assert [request.windows for request in crew.requests] == [tuple(range(8))] * 3


def test_perplexity_is_the_exponential_of_the_mean():
    objective = objective_of(FormulaCrew(noise=0.0), kind="perplexity")
    assert objective.losses([A], 4, "x") == pytest.approx([math.exp(3.0 + loss(A))])


def test_the_base_travels_with_every_request():
    crew = FormulaCrew()
    base = (None, None, None)
    objective_of(crew).losses([(0, None, None)], 1, "x", base=base)
    assert [request.base for request in crew.requests] == [base]


def test_what_is_no_number_stays_so():
    class Broken(FormulaCrew):
        def _one(self, mixture, window):
            return math.nan, math.inf

    assert math.isnan(Objective(Broken(), "kl_divergence", windows=2, guard_windows=1).losses([A], 2, "x")[0])
    assert Objective(Broken(), "perplexity", windows=2, guard_windows=1).losses([A], 2, "x") == [math.inf]
