"""Generations in stages, on real Optuna studies."""

import math

import optuna
import pytest

from orchestrator.search.evolve import Stage, begin, best_complete, generation
from orchestrator.search.sampler import LevelSwitchSampler

optuna.logging.set_verbosity(optuna.logging.ERROR)
STAGES = [Stage(windows=1, survivors=4), Stage(windows=4, survivors=2), Stage(windows=16, survivors=1)]


@pytest.fixture
def space(make_space_of):
    return make_space_of([[10, 20, 30]] * 10)


@pytest.fixture
def study(space):
    return optuna.create_study(sampler=LevelSwitchSampler(space, 200, start=(1,) * 10))


class Measure:
    """Groups differ in what their bits are worth; fewer windows see it through noise that is the allocation's own."""

    def __init__(self, noise=0.0):
        self.asked, self.noise = [], noise

    def __call__(self, allocations, windows):
        self.asked.append((len(allocations), windows))
        return [self.loss(allocation) + self.noise * math.sin(hash(allocation)) / windows for allocation in allocations]

    def loss(self, allocation):
        return sum((place + 1) / (1 + index) for place, index in enumerate(allocation))


def states(study):
    return [trial.state.name for trial in study.trials]


def test_more_windows_for_fewer_trials(study, space):
    measure = Measure()
    ended = generation(study, space, measure, offspring=8, stages=STAGES)
    assert measure.asked == [(8, 1), (4, 4), (2, 16)]
    assert sorted(states(study)) == ["COMPLETE"] * 2 + ["PRUNED"] * 6
    best = min(ended, key=lambda one: (-one.windows, one.loss))
    assert study.best_value == best.loss == measure.loss(best.allocation)
    assert best_complete(study).number == best.number
    assert [(one.state, one.windows) for one in ended] == [("pruned", 1)] * 4 + [("pruned", 4)] * 2 + [
        ("complete", 16)
    ] * 2
    for one in ended:
        attrs = study.trials[one.number].user_attrs
        assert attrs == {"windows": one.windows} | ({"loss": one.loss} if one.state == "pruned" else {})


def test_it_never_loses_what_it_had(study, space):
    """The start is complete before anything is compared on few windows."""
    measure = Measure(noise=30.0)
    begin(study, space, measure, 16)
    first, values = study.best_value, []
    for _ in range(6):
        generation(study, space, measure, offspring=8, stages=STAGES)
        values.append(study.best_value)
    assert measure.asked[0] == (1, 16)
    assert [first, *values] == sorted([first, *values], reverse=True)
    assert values[-1] < first


def test_a_study_that_goes_on_does_not_begin_again(study, space):
    measure = Measure()
    begin(study, space, measure, 16)
    begin(study, space, measure, 16)
    assert measure.asked == [(1, 16)]


def test_a_loss_that_is_no_number_never_wins(study, space):
    def broken(allocations, windows):
        return [math.nan if place else 5.0 for place in range(len(allocations))]

    generation(study, space, broken, offspring=6, stages=STAGES)
    assert study.best_value == 5.0
    assert states(study).count("FAIL") == 5

    def hopeless(allocations, windows):
        return [math.nan] * len(allocations)

    ended = generation(study, space, hopeless, offspring=6, stages=STAGES)
    assert [one.state for one in ended if one.windows == 16] == ["failed", "failed"]
    assert study.best_value == 5.0
