"""An Optuna sampler that stays within a budget: the best allocation so far, with some bits moved between groups.

Other samplers know nothing of the budget and propose what does not fit; here every trial does, and spends it. A (1 +
lambda) evolution: trials that were only measured on few tokens are pruned ones to Optuna and are never parents. The
study is all of its memory, so that a search goes on where it was killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from orchestrator.search.space import Allocation, Space
from orchestrator.search.switches import Losses, fitted, mutated, random_allocation

_TRIES = 20  # to find an allocation that was not asked for yet


class _GroupSampler(BaseSampler):  # type: ignore[misc]  # optuna is not followed by the type checker
    """All parameters are groups' and are drawn together: one alone says nothing of a budget."""

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Parameters of no group are not searched.

        Raises:
            ValueError: always; names the parameter.
        """
        del study, trial, param_distribution
        raise ValueError(f"{param_name} is no group of the space that is searched")


class LevelSwitchSampler(_GroupSampler):
    """Level switches from the best complete trial; the first trial is the start, usually the knapsack's solution."""

    def __init__(
        self,
        space: Space,
        budget_bytes: int,
        *,
        start: Allocation,
        seed: int = 0,
        most_switches: int = 3,
        losses: Losses | None = None,
    ) -> None:
        """Begin.

        Args:
            space: the groups; a trial has one whole number per group, by the group's name.
            budget_bytes: no trial stores more.
            start: within the budget.
            seed: the same trials are asked for, as long as the same values are told.
            most_switches: groups that give way at once.
            losses: of single choices, which guide chance; None leaves it alone.
        Raises:
            ValueError: the start does not fit the budget.
        """
        if space.stored_bytes(start) > budget_bytes:
            raise ValueError(f"the start takes {space.stored_bytes(start)} bytes, the budget is {budget_bytes}")
        self._space, self._budget_bytes, self._start = space, budget_bytes, start
        self._seed, self._most_switches, self._losses = seed, most_switches, losses

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """One whole number per group that has a choice."""
        del study, trial
        return distributions(self._space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A neighbour of the best complete trial that no trial was yet, where there is one."""
        del search_space
        asked = [allocation_of(self._space, other.params) for other in study.get_trials(deepcopy=False) if other.params]
        if not asked:
            return params_of(self._space, self._start)
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
        best = min(complete, key=lambda other: (sign * other.value, other.number), default=None)
        parent = self._start if best is None else allocation_of(self._space, best.params)
        chance, known = Random(f"{self._seed} {trial.number}"), set(asked)
        child = parent
        for _ in range(_TRIES):
            child = mutated(
                self._space,
                child,
                self._budget_bytes,
                chance,
                most_switches=self._most_switches,
                losses=self._losses,
            )
            if child not in known:
                break
        return params_of(self._space, child)


class Within(_GroupSampler):
    """Another sampler's proposals, made to fit a budget: those that know of no budget propose what does not fit.

    What is too much is taken from groups by chance, what is left is spent by chance, and the trial has the parameters
    that are then measured, so that the other sampler learns from what was.
    """

    def __init__(self, inner: BaseSampler, space: Space, budget_bytes: int, *, seed: int = 0) -> None:
        """Begin.

        Args:
            inner: proposes whole numbers, one per group.
        """
        self._inner, self._space, self._budget_bytes, self._seed = inner, space, budget_bytes, seed

    def reseed_rng(self) -> None:
        """The other sampler's."""
        self._inner.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """One whole number per group that has a choice."""
        self._inner.infer_relative_search_space(study, trial)  # it may keep something for `sample_relative`
        return distributions(self._space)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """The other sampler's."""
        self._inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """The other sampler's."""
        self._inner.after_trial(study, trial, state, values)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Its proposal, within the budget; where it has none yet, an allocation by chance."""
        chance = Random(f"{self._seed} {trial.number}")
        proposed = self._inner.sample_relative(study, trial, search_space)
        if len(proposed) < len(search_space):
            return params_of(self._space, random_allocation(self._space, self._budget_bytes, chance))
        return params_of(
            self._space, fitted(self._space, allocation_of(self._space, proposed), self._budget_bytes, chance)
        )


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """A search's parameters: the index of each group's choice, of groups that have more than one."""
    return {group.name: IntDistribution(0, len(group.choices) - 1) for group in space.groups if len(group.choices) > 1}


def params_of(space: Space, allocation: Allocation) -> dict[str, int]:
    """An allocation as a trial's parameters."""
    pairs = zip(space.groups, allocation, strict=True)
    return {group.name: index for group, index in pairs if len(group.choices) > 1}


def allocation_of(space: Space, params: Mapping[str, Any]) -> Allocation:
    """A trial's parameters as an allocation."""
    return tuple(int(params[group.name]) if len(group.choices) > 1 else 0 for group in space.groups)
