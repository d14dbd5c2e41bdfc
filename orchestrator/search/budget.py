"""The search under one budget: generation after generation, until its evaluations are spent or the guard stops it.

What a search lowers on its own tokens it may raise on others. So each new best allocation is measured on guard windows
too, which steer nothing: what is best there is what is chosen, and where that does not improve any more, it ends.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.search.config import SearchConfig
from orchestrator.search.evolve import Ended, Stage, begin, best_complete, generation
from orchestrator.search.objective import Objective
from orchestrator.search.sampler import allocation_of, params_of
from orchestrator.search.space import Allocation, Space
from orchestrator.search.starts import Start
from orchestrator.search.study import STAGED, STARTED, KeptStudy, budget_sampler, study_name
from orchestrator.search.switches import Losses

SPENT = "all evaluations are spent"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A budget with the name of its study.

    Args:
        name: "3.6 bits".
        stored_bytes: the most that all linears may take, scales and zeros included.
    """

    name: str
    stored_bytes: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a view shows after each generation."""

    trials: int
    window_forwards: int
    loss: float
    guard_loss: float


class BudgetSearch:
    """One study of one budget."""

    def __init__(
        self,
        *,
        space: Space,
        budget: Budget,
        settings: SearchConfig,
        objective: Objective,
        record: Callable[[list[dict[str, Any]]], None],
        told: Callable[[Progress], None],
        about: Callable[[Allocation], list[Start]],
        offspring: int,
    ) -> None:
        """Ready to run.

        Args:
            record: takes rows of the trials table, without the search's and the model's names.
            told: shown how it goes.
            about: an allocation -> others near it that may be better, within the budget.
            offspring: trials per generation of samplers that do not stage: as many as there are workers.
        """
        self._space, self._budget, self._settings = space, budget, settings
        self._name = study_name(budget.name, settings.sampler, settings.seed, alone=not settings.starts)
        self._objective, self._record, self._told = objective, record, told
        self._about, self._offspring = about, offspring

    def run(self, journal: Path, starts: Sequence[Start], losses: Losses | None = None) -> dict[str, Any]:
        """Search, or go on where an earlier session was ended; what `chosen.json` says of the study.

        Args:
            starts: allocations within the budget; the best is where the sampler begins. None only where the settings
                ask for none.
            losses: of single choices; guide level switches.
        """
        settings, name = self._settings, self._name
        self._began = time.monotonic()
        before = self._objective.window_forwards
        starts = list(starts)
        begun = self._losses(starts)
        for _ in range(settings.sensitivity.rounds if settings.sampler in STAGED else 0):
            near = self._about(starts[_least(begun)].allocation)
            found = self._losses(near)
            if not near or not found[_least(found)] < begun[_least(begun)]:  # also where it is no number
                break
            starts.append(near[_least(found)])
            begun.append(found[_least(found)])
        first = starts[_least(begun)].allocation if starts else None
        guards = self._objective.guard_losses([one.allocation for one in starts], f"{name}: starts")
        sampler = budget_sampler(
            settings.sampler,
            self._space,
            self._budget.stored_bytes,
            start=first,
            seed=settings.seed,
            losses=losses,
        )
        self._kept = KeptStudy(journal, name, sampler)
        self._study, progress = self._kept.study, self._kept.progress
        self._spent_before = int(progress.get("window_forwards", 0)) - before
        self._seconds_before = float(progress.get("seconds", 0.0))
        self._guards: dict[str, float] = dict(progress.get("guards", {}))
        is_enqueued = settings.sampler in STARTED and settings.sampler not in STAGED
        if first is not None and is_enqueued and not self._study.trials:
            self._study.enqueue_trial(params_of(self._space, first))
        stopped = self._go_on()
        return self._outcome(starts, begun, guards, stopped)

    def _losses(self, starts: Sequence[Start]) -> list[float]:
        allocations = [one.allocation for one in starts]
        return self._objective.losses(allocations, self._settings.windows, f"{self._name}: starts")

    def _go_on(self) -> str:
        settings = self._settings
        staged = settings.sampler in STAGED
        stages = [Stage(windows=one.windows, survivors=one.survivors) for one in settings.all_stages]
        offspring = settings.offspring if staged else self._offspring
        if not staged:
            stages = [Stage(windows=settings.windows, survivors=offspring)]
        limit = settings.evaluations * settings.windows
        self._note(begin(self._study, self._space, self._measure, settings.windows))
        while True:
            if self._spent() >= limit:
                return SPENT
            if self._stale() >= settings.patience:
                return f"the guard has not improved for {settings.patience} generations"
            ended = generation(self._study, self._space, self._measure, offspring=offspring, stages=stages)
            self._note(ended)

    def _measure(self, allocations: Sequence[Allocation], windows: int) -> Sequence[float]:
        best = best_complete(self._study)
        # Children share the first blocks with their parent; its hidden states pay where there are many of them.
        base = allocation_of(self._space, best.params) if best and len(allocations) > 4 else None
        return self._objective.losses(allocations, windows, f"{self._name}: trials", base=base)

    def _note(self, ended: Sequence[Ended]) -> None:
        """Measure a new best one on the guard windows, and record the generation."""
        if not ended:
            return
        best = best_complete(self._study)
        if best is not None and str(best.number) not in self._guards:
            allocation = allocation_of(self._space, best.params)
            (self._guards[str(best.number)],) = self._objective.guard_losses([allocation], f"{self._name}: guard")
        seconds, spent, before = self._seconds(), self._spent(), self._kept.progress
        generation_of_best = before.get("generation_of_best", 0)
        generations = int(before.get("generations", 0)) + 1
        least = min((loss for loss in self._guards.values() if not math.isnan(loss)), default=math.inf)
        if least < float(before.get("guard_loss", math.inf)):
            generation_of_best = generations
        self._kept.keep(
            {
                "guards": self._guards,
                "guard_loss": least,
                "generation_of_best": generation_of_best,
                "generations": generations,
                "window_forwards": spent,
                "seconds": seconds,
            }
        )
        self._record([self._row(one, spent, seconds) for one in ended])
        loss = math.nan if best is None else best.value
        self._told(Progress(trials=len(self._study.trials), window_forwards=spent, loss=loss, guard_loss=least))

    def _stale(self) -> int:
        """Generations since the guard was better than ever."""
        progress = self._kept.progress
        return int(progress.get("generations", 0)) - int(progress.get("generation_of_best", 0))

    def _spent(self) -> int:
        return self._spent_before + self._objective.window_forwards

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def _row(self, one: Ended, spent: int, seconds: float) -> dict[str, Any]:
        return {
            "study": self._name,
            "sampler": self._settings.sampler,
            "trial": one.number,
            "state": one.state,
            "loss": one.loss,
            "num_windows": one.windows,
            "guard_loss": self._guards.get(str(one.number)),
            "stored_bytes": self._space.stored_bytes(one.allocation),
            "bits_per_weight": self._space.bits_per_weight(one.allocation),
            "allocation": json.dumps(one.allocation),
            "window_forwards": spent,
            "seconds": seconds,
            "at": datetime.now(UTC),
        }

    def _outcome(
        self, starts: Sequence[Start], losses: Sequence[float], guards: Sequence[float], stopped: str
    ) -> dict[str, Any]:
        """The best on the guard windows, among what was best on the search's at some time, and the starts."""
        begun = [
            self._described(start.allocation, loss, guard) | {"name": start.name}
            for start, loss, guard in zip(starts, losses, guards, strict=True)
        ]
        tried = [
            self._described(allocation_of(self._space, trial.params), trial.value, self._guards[str(trial.number)])
            for trial in self._study.get_trials(deepcopy=False)
            if str(trial.number) in self._guards
        ]
        best = min([*tried, *begun], key=lambda one: (math.isnan(one["guard_loss"]), one["guard_loss"]))
        return {
            "study": self._name,
            "sampler": self._settings.sampler,
            "budget_bytes": self._budget.stored_bytes,
            **{key: value for key, value in best.items() if key != "name"},
            "starts": begun,
            "trials": len(self._study.trials),
            "window_forwards": self._spent(),
            "seconds": self._seconds(),
            "stopped": stopped,
        }

    def _described(self, allocation: Allocation, loss: float, guard_loss: float) -> dict[str, Any]:
        return {
            "allocation": list(allocation),
            "stored_bytes": self._space.stored_bytes(allocation),
            "bits_per_weight": self._space.bits_per_weight(allocation),
            "loss": loss,
            "guard_loss": guard_loss,
        }


def _least(losses: Sequence[float]) -> int:
    """Place of the least; what is no number comes last."""
    return min(range(len(losses)), key=lambda place: (math.isnan(losses[place]), losses[place]))
