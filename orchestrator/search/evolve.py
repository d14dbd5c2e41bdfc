"""The search itself, on an Optuna study: generations of trials in stages, more tokens for fewer of them.

Of each generation all trials are measured on few windows, the best of them on more, and the last one on all: that one
is a complete trial and may become the parent, the others are pruned. Tokens that decide between good allocations are
then spent on good ones. Source: Sieberling et al. 2024 (EvoPress), arXiv:2410.14649, section 3.2.
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


def begin(study: optuna.Study, space: Space, measure: Measure, windows: int) -> None:
    """Measure the first trial, the sampler's start, on all windows: what follows can only be better than that.

    Does nothing where a study that goes on has complete trials.
    """
    if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return
    trial = study.ask(distributions(space))
    (loss,) = measure([allocation_of(space, trial.params)], windows)
    _complete(study, space, [(trial, loss)])


def generation(
    study: optuna.Study, space: Space, measure: Measure, *, offspring: int, stages: Sequence[Stage]
) -> Allocation | None:
    """Ask for trials, measure them in stages, tell the study; the best complete one of these.

    Args:
        offspring: how many trials.
        stages: with rising windows and falling survivors.
    Returns:
        its allocation, or None where no loss was a number.
    """
    trials = [study.ask(distributions(space)) for _ in range(offspring)]
    for number, stage in enumerate(stages):
        losses = measure([allocation_of(space, trial.params) for trial in trials], stage.windows)
        ranked = sorted(zip(trials, losses, strict=True), key=lambda pair: (math.isnan(pair[1]), pair[1]))
        for trial, loss in ranked:
            trial.set_user_attr(f"loss_{stage.windows}", loss)
        if number == len(stages) - 1:
            return _complete(study, space, ranked)
        for trial, _ in ranked[stage.survivors :]:
            study.tell(trial, state=TrialState.PRUNED)
        trials = [trial for trial, _ in ranked[: stage.survivors]]
    return None


def _complete(study: optuna.Study, space: Space, ranked: Sequence[tuple[Trial, float]]) -> Allocation | None:
    for trial, loss in ranked:
        if math.isnan(loss):
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, loss)
    best, loss = ranked[0]
    return None if math.isnan(loss) else allocation_of(space, best.params)


def abandon_unfinished(study: optuna.Study) -> int:
    """After a driver was killed: trials that were asked for and never told are failed ones; how many there were."""
    unfinished = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
    for trial in unfinished:
        study.tell(trial.number, state=TrialState.FAIL)
    return len(unfinished)
