"""The sampler in real Optuna studies."""

import itertools
from random import Random

import optuna
import pytest
from optuna.trial import TrialState

from orchestrator.search.sampler import LevelSwitchSampler, allocation_of, distributions, params_of
from orchestrator.search.switches import random_allocation

optuna.logging.set_verbosity(optuna.logging.ERROR)
BUDGET = 340


@pytest.fixture
def space(make_space_of):
    return make_space_of([[10, 20, 30, 45]] * 12 + [[25]])


@pytest.fixture
def start():
    return (1,) * 12 + (0,)


def loss(allocation):
    """Later groups matter more; not additive: neighbours that are both low cost extra."""
    own = sum((index + 1) / (1 + choice) for index, choice in enumerate(allocation[:12]))
    return own + sum(3.0 for low, other in itertools.pairwise(allocation[:12]) if low == other == 0)


def search(space, start, trials, *, seed=0, storage=None):
    sampler = LevelSwitchSampler(space, BUDGET, start=start, seed=seed)
    study = optuna.create_study(sampler=sampler, storage=storage, study_name="search", load_if_exists=True)
    while len(study.trials) < trials:
        trial = study.ask(distributions(space))
        study.tell(trial, loss(allocation_of(space, trial.params)))
    return study


def test_it_starts_at_the_start_and_stays_within_the_budget(space, start):
    study = search(space, start, 80)
    asked = [allocation_of(space, trial.params) for trial in study.trials]
    assert asked[0] == start
    assert len(set(asked)) == len(asked)
    assert all(space.stored_bytes(allocation) <= BUDGET for allocation in asked)
    assert study.best_value < 0.8 * loss(start)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_better_than_chance(space, start, seed):
    """As many allocations that spend the same budget, drawn at random."""
    chance = Random(seed)
    drawn = min(loss(random_allocation(space, BUDGET, chance)) for _ in range(120))
    assert search(space, start, 120, seed=seed).best_value < drawn


def test_the_same_seed_asks_for_the_same_trials(space, start):
    studies = [search(space, start, 30, seed=seed) for seed in (1, 1, 2)]
    params = [[trial.params for trial in study.trials] for study in studies]
    assert params[0] == params[1] != params[2]


def test_a_search_that_was_cut_goes_on_as_it_would_have(space, start, tmp_path):
    whole = search(space, start, 40)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    search(space, start, 15, storage=storage)
    resumed = search(space, start, 40, storage=storage)
    assert [trial.params for trial in resumed.trials] == [trial.params for trial in whole.trials]


def test_many_trials_in_flight(space, start):
    """Asked before any is told: all differ and fit."""
    study = optuna.create_study(sampler=LevelSwitchSampler(space, BUDGET, start=start))
    asked = [allocation_of(space, study.ask(distributions(space)).params) for _ in range(12)]
    assert len(set(asked)) == 12
    assert all(space.stored_bytes(allocation) <= BUDGET for allocation in asked)


def test_pruned_trials_are_never_parents(space, start):
    """The last survivor of few tokens may look better than it is."""
    study = optuna.create_study(sampler=LevelSwitchSampler(space, BUDGET, start=start, most_switches=1))
    first = study.ask(distributions(space))
    study.tell(first, 10.0)
    for _ in range(10):
        trial = study.ask(distributions(space))
        trial.report(0.0, step=1)
        study.tell(trial, state=TrialState.PRUNED)
    child = allocation_of(space, study.ask(distributions(space)).params)
    assert sum(index < before for index, before in zip(child, start, strict=True)) <= 20
    assert len([trial for trial in study.trials if trial.state == TrialState.PRUNED]) == 10


def test_a_larger_value_may_be_the_better_one(space, start):
    sampler = LevelSwitchSampler(space, BUDGET, start=start)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    for _ in range(60):
        trial = study.ask(distributions(space))
        study.tell(trial, -loss(allocation_of(space, trial.params)))
    assert study.best_value > -0.85 * loss(start)


def test_allocations_and_parameters(space, start):
    params = params_of(space, start)
    assert len(params) == 12, "a group with one choice is no parameter"
    assert allocation_of(space, params) == start


def test_a_start_that_does_not_fit_is_refused(space):
    with pytest.raises(ValueError, match="the start takes 565 bytes, the budget is 340"):
        LevelSwitchSampler(space, BUDGET, start=space.most)


def test_parameters_of_no_group_are_refused(space, start):
    study = optuna.create_study(sampler=LevelSwitchSampler(space, BUDGET, start=start))
    with pytest.raises(ValueError, match="alpha is no group of the space that is searched"):
        study.ask().suggest_float("alpha", 0.0, 1.0)
