"""The front of bytes against loss, by a sampler of two objectives: no budget, and every trial on all windows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from orchestrator.search.budget import SPENT, Progress
from orchestrator.search.config import FrontConfig
from orchestrator.search.objective import Objective
from orchestrator.search.sampler import allocation_of, distributions, params_of
from orchestrator.search.space import Allocation, Space
from orchestrator.search.starts import Start
from orchestrator.search.study import KeptStudy, front_sampler, study_name

NAME = "front"


class FrontSearch:
    """One study of two objectives: the loss, and stored bits per weight."""

    def __init__(
        self,
        *,
        space: Space,
        settings: FrontConfig,
        objective: Objective,
        seed: int,
        record: Callable[[list[dict[str, Any]]], None],
        told: Callable[[Progress], None],
        offspring: int,
    ) -> None:
        """Ready to run; arguments as of `BudgetSearch`."""
        self._space, self._settings, self._objective, self._seed = space, settings, objective, seed
        self._record, self._told, self._offspring = record, told, offspring
        self._name = study_name(NAME, settings.sampler, seed)

    def run(self, journal: Path, starts: Sequence[Start]) -> dict[str, Any]:
        """Search, or go on; what `chosen.json` says of the study.

        Args:
            starts: allocations of all sizes, which are tried first.
        """
        sampler = front_sampler(self._settings.sampler, self._seed)
        kept = KeptStudy(journal, self._name, sampler, ["minimize", "minimize"])
        study = kept.study
        before = int(kept.progress.get("window_forwards", 0)) - self._objective.window_forwards
        seconds, began = float(kept.progress.get("seconds", 0.0)), time.monotonic()
        for start in starts:
            study.enqueue_trial(params_of(self._space, start.allocation), skip_if_exists=True)
        while self._ended(study) < self._settings.evaluations:
            rows = self._generation(study)
            spent, passed = before + self._objective.window_forwards, seconds + time.monotonic() - began
            kept.keep({"window_forwards": spent, "seconds": passed})
            self._record([row | {"window_forwards": spent, "seconds": passed} for row in rows])
            least = min((row["loss"] for row in rows if not math.isnan(row["loss"])), default=math.nan)
            self._told(Progress(trials=len(study.trials), window_forwards=spent, loss=least, guard_loss=math.nan))
        front = self._front(study)
        return {
            "study": self._name,
            "sampler": self._settings.sampler,
            "budget_bytes": None,
            "front": front,
            "starts": [],
            "trials": len(study.trials),
            "window_forwards": before + self._objective.window_forwards,
            "seconds": seconds + time.monotonic() - began,
            "stopped": SPENT,
        }

    def _ended(self, study: optuna.Study) -> int:
        return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def _generation(self, study: optuna.Study) -> list[dict[str, Any]]:
        trials = [study.ask(distributions(self._space)) for _ in range(self._offspring)]
        allocations = [allocation_of(self._space, trial.params) for trial in trials]
        losses = self._objective.losses(allocations, self._objective.windows, f"{self._name}: trials")
        rows = []
        for trial, allocation, loss in zip(trials, allocations, losses, strict=True):
            bits = self._space.bits_per_weight(allocation)
            if math.isnan(loss):
                study.tell(trial, state=TrialState.FAIL)
            else:
                study.tell(trial, [loss, bits])
            rows.append(
                {
                    "study": self._name,
                    "sampler": self._settings.sampler,
                    "trial": trial.number,
                    "state": "failed" if math.isnan(loss) else "complete",
                    "loss": loss,
                    "num_windows": self._objective.windows,
                    "stored_bytes": self._space.stored_bytes(allocation),
                    "bits_per_weight": bits,
                    "allocation": json.dumps(allocation),
                    "at": datetime.now(UTC),
                }
            )
        return rows

    def _front(self, study: optuna.Study) -> list[dict[str, Any]]:
        """Trials that none is better than in both, in rising order of bytes; some of them are marked as chosen."""
        best: dict[Allocation, float] = {}
        for trial in study.best_trials:
            best.setdefault(allocation_of(self._space, trial.params), trial.values[0])
        ranked = sorted(best, key=self._space.stored_bytes)
        chosen = spread(len(ranked), self._settings.cells)
        found = [
            {
                "allocation": list(allocation),
                "stored_bytes": self._space.stored_bytes(allocation),
                "bits_per_weight": self._space.bits_per_weight(allocation),
                "loss": best[allocation],
            }
            for allocation in ranked
        ]
        guards = self._objective.guard_losses([ranked[place] for place in chosen], f"{self._name}: guard")
        for place, guard in zip(chosen, guards, strict=True):
            found[place]["guard_loss"] = guard
        return found


def spread(count: int, wanted: int) -> list[int]:
    """So many places out of `count`, evenly, without the ends where there are others: those are the uniform ones."""
    if count <= wanted:
        return list(range(count))
    step = (count - 1) / (wanted + 1)
    return sorted({round(step * (number + 1)) for number in range(wanted)})
