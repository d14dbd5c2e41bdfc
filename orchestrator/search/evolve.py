"""The search itself, on an Optuna study: generations of trials in stages, more tokens for fewer of them.

Of each generation all trials are measured on few windows, the best of them on more, and the last ones on all: those are
complete trials and may become parents, the others are pruned. Tokens that decide between good allocations are then
spent on good ones. Source: Sieberling et al. 2024 (EvoPress), arXiv:2410.14649, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import Trial, TrialState

from orchestrator.search.sampler import allocation_of, distributions
from orchestrator.search.space import Allocation, Space

Measure = Callable[[Sequence[Allocation], int], Sequence[float]]
"""(allocations, windows) -> their losses on the first so many windows; may work on all of them at once."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a generation.

    Args:
        windows: on how many windows trials are measured.
        survivors: how many go on to the next stage; of the last stage all are complete.
    """

    windows: int
    survivors: int


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A trial that the study was told of.

    Args:
        state: complete, pruned or failed.
        loss: over its `windows`.
    """

    number: int
    allocation: Allocation
    state: str
    loss: float
    windows: int


def begin(study: optuna.Study, space: Space, measure: Measure, windows: int) -> list[Ended]:
    """Measure the first trial, the sampler's start, on all windows: what follows can only be better than that.

    Does nothing where a study that goes on has complete trials.
    """
    if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return []
    return generation(study, space, measure, offspring=1, stages=[Stage(windows=windows, survivors=1)])


def generation(
    study: optuna.Study, space: Space, measure: Measure, *, offspring: int, stages: Sequence[Stage]
) -> list[Ended]:
    """Ask for trials, measure them in stages, then tell the study: a driver that is killed meanwhile leaves trials that
    were never told, and no half of a generation.

    Args:
        offspring: how many trials.
        stages: with rising windows and falling survivors.
    """
    trials = [study.ask(distributions(space)) for _ in range(offspring)]
    decided: list[tuple[Trial, float, int, bool]] = []
    for number, stage in enumerate(stages):
        losses = measure([allocation_of(space, trial.params) for trial in trials], stage.windows)
        ranked = sorted(zip(trials, losses, strict=True), key=lambda pair: (math.isnan(pair[1]), pair[1]))
        keep = 0 if number == len(stages) - 1 else stage.survivors
        decided += [(trial, loss, stage.windows, keep == 0) for trial, loss in ranked[keep:]]
        trials = [trial for trial, _ in ranked[:keep]]
    return [_end(study, space, trial, loss, windows, complete=complete) for trial, loss, windows, complete in decided]


def _end(study: optuna.Study, space: Space, trial: Trial, loss: float, windows: int, *, complete: bool) -> Ended:
    """Tell the study; a loss that is no number is a failed trial, and one on few windows no value of the objective."""
    trial.set_user_attr("windows", windows)
    if math.isnan(loss):
        study.tell(trial, state=TrialState.FAIL)
        state = "failed"
    elif complete:
        study.tell(trial, loss)
        state = "complete"
    else:
        trial.set_user_attr("loss", loss)
        study.tell(trial, state=TrialState.PRUNED)
        state = "pruned"
    allocation = allocation_of(space, trial.params)
    return Ended(number=trial.number, allocation=allocation, state=state, loss=loss, windows=windows)


def best_complete(study: optuna.Study) -> optuna.trial.FrozenTrial | None:
    """The complete trial of the least loss, the first of equals."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(complete, key=lambda trial: (trial.value, trial.number), default=None)
