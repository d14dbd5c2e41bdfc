"""A search from its bank to what it has chosen: sensitivities, then each budget, then the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

from cluster.pool import Pool
from orchestrator.errors import BitatlasError
from orchestrator.inputs import ModelInput
from orchestrator.plan import content_hash
from orchestrator.search.budget import Budget, BudgetSearch, Progress
from orchestrator.search.config import Search
from orchestrator.search.crew import Crew
from orchestrator.search.front import FrontSearch
from orchestrator.search.objective import Objective
from orchestrator.search.records import SENSITIVITY, TRIALS, Records, space_as_json
from orchestrator.search.sensitivity import FP, Place, base_of, every_choice, is_of_base, measured, steps_from, table
from orchestrator.search.space import Allocation, Space, make_space, matrix_group
from orchestrator.search.starts import Start, about, largest_uniform, neighbours, starts, uniform_allocations
from orchestrator.search.view import SearchView
from orchestrator.search.worker import Setting, TaskUnits, facts_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from orchestrator.search.mixtures import Key, Mixture
    from quantizers.grid import Grid


def space_of(search: Search, model: ModelInput, file: str) -> Space:
    """The space of a search.

    Raises:
        BitatlasError: a pattern of `pinned` fits no group, or a scheme no linear; or the head is the embedding.
    """
    from quantizers.errors import QuantizationError
    from quantizers.vocabulary import check_vocabulary

    shape = model.shape
    try:
        for role, grids in search.matrices.items():
            for grid in grids:
                check_vocabulary({} if grid is None else {role: grid}, shape.matrices, of=f" of {search.model}")
        matrices = [
            matrix_group(role, shape.matrices[role], grids, shape.bits_per_value)
            for role, grids in search.matrices.items()
        ]
        return make_space(shape.linears, search.bank, search.pinned, matrices, bits_per_value=shape.bits_per_value)
    except (BitatlasError, QuantizationError) as error:
        raise BitatlasError(f"{file}: search.{error}") from error


def budgets_of(search: Search, space: Space, model: ModelInput, file: str) -> list[Budget]:
    """The budgets in bytes of linears.

    Raises:
        BitatlasError: one is impossible, or there is nothing to choose.
    """
    found = []
    for index, budget in enumerate(search.settings.budgets):
        where = f"{file}: search.budgets[{index}]"
        if isinstance(budget, dict):
            total = budget["checkpoint_bytes"]
            untouched = model.shape.fp_bytes - space.num_weights * model.shape.bits_per_value // 8
            least = untouched + space.stored_bytes(space.least)
            if total < least:
                raise BitatlasError(
                    f"{where} of {total} bytes is too little: {untouched} are taken by what is not quantized "
                    f"({', '.join(_untouched(search, model))}); the least possible is {least} bytes"
                )
            found.append(Budget(name=f"{total} bytes", stored_bytes=space.check_budget(total - untouched, where)))
        else:
            found.append(Budget(name=f"{budget:g} bits", stored_bytes=space.budget(budget, where)))
    if search.settings.front is not None:
        space.check_budget(space.stored_bytes(space.most), f"{file}: search.front")
    names = [budget.name for budget in found]
    for name in names:
        if names.count(name) > 1:
            raise BitatlasError(f"{file}: search.budgets names {name} twice; name each budget once")
    return found


def _untouched(search: Search, model: ModelInput) -> list[str]:
    return [role for role in model.shape.matrices if role not in search.matrices] + ["norms"]


class SearchRun:
    """One search on one pool."""

    def __init__(
        self,
        *,
        search: Search,
        model: ModelInput,
        space: Space,
        budgets: Sequence[Budget],
        windows: NDArray[np.int64] | TaskUnits,
        artifacts: Mapping[Key, str],
        records: Records,
        pool: Pool,
        view: SearchView,
        stop: Event,
    ) -> None:
        """Gather what it needs; nothing starts yet."""
        self._search, self._space, self._budgets = search, space, budgets
        self._records, self._view = records, view
        facts = {"source": model.source, "dtype": model.dtype, "digest": model.digest}
        matrices: dict[str, dict[Key, Grid]] = {
            model.shape.matrices[role].name: {(grid.bits, grid.group_size): grid for grid in grids if grid is not None}
            for role, grids in search.matrices.items()
        }
        described = [
            facts["digest"],
            facts["dtype"],
            facts_of(windows),
            sorted(artifacts.values()),
            space_as_json(space),
            sorted(map(str, matrices.items())),
        ]
        setting = Setting(
            key=content_hash(described),
            model=facts,
            space=space,
            artifacts=artifacts,
            windows=windows,
            matrices=matrices,
        )
        self._crew = Crew(pool, setting, stop=stop, told=view.ran)
        settings = search.settings
        self._objective = Objective(
            self._crew, settings.objective, windows=settings.windows, guard_windows=settings.guard_windows
        )

    def run(self) -> dict[str, Any]:
        """Do what is not done; what is in `chosen.json` then.

        Raises:
            BitatlasError: allocations cannot be measured, or nothing can be recorded.
            InterruptedSearchError: told to stop.
        """
        records, search, settings = self._records, self._search, self._search.settings
        records.write_json(records.space, space_as_json(self._space))
        studies = []
        for budget in self._budgets:
            tables: dict[str, list[list[float]]] = (
                {base: self._table(base, budget) for base in settings.sensitivity.bases} if settings.starts else {}
            )
            begun = starts(self._space, budget.stored_bytes, tables) if settings.starts else []
            limit = settings.evaluations * settings.windows
            with self._view.phase(budget.name, limit):
                studies.append(
                    self._budget_search(budget).run(records.journal, begun, tables.get(settings.sensitivity.bases[0]))
                )
            self._view.say(_told(studies[-1]))
        if settings.front is not None:
            limit = settings.front.evaluations * settings.windows
            with self._view.phase("front", limit):
                front = FrontSearch(
                    space=self._space,
                    settings=settings.front,
                    objective=self._objective,
                    seed=settings.seed,
                    record=partial(self._add, TRIALS),
                    told=self._progress,
                    offspring=self._crew.size,
                )
                studies.append(front.run(records.journal, self._starts_of_front()))
        return {
            "search": search.sweep.name,
            "model": search.model,
            "objective": settings.objective_name,
            "num_windows": settings.windows,
            "guard_windows": settings.guard_windows,
            "studies": studies,
        }

    def _budget_search(self, budget: Budget) -> BudgetSearch:
        return BudgetSearch(
            space=self._space,
            budget=budget,
            settings=self._search.settings,
            objective=self._objective,
            record=partial(self._add, TRIALS),
            told=self._progress,
            about=partial(self._about, budget),
            offspring=self._crew.size,
        )

    def _starts_of_front(self) -> list[Start]:
        """Uniform allocations, and the knapsack's at every one's bytes where sensitivities are known."""
        uniform = uniform_allocations(self._space)
        found = list(uniform)
        rows = [row for row in self._records.rows(SENSITIVITY) if row["base"] == FP]
        if rows:
            losses: dict[str, list[list[float]]] = {FP: table(self._space, rows)}
            for one in uniform[1:-1]:
                found += starts(self._space, self._space.stored_bytes(one.allocation), losses)
        return found

    def _table(self, base: str, budget: Budget) -> list[list[float]]:
        """Sensitivities on a base."""
        uniform = largest_uniform(self._space, budget.stored_bytes)
        name = FP if base == FP or uniform is None else uniform.name
        if base != FP and uniform is None:
            self._view.say(f"no uniform allocation fits {budget.name}: its sensitivities are those of the float model")
        mixture = base_of(self._space, name, None if uniform is None else uniform.allocation)
        places = [place for place in every_choice(self._space) if not is_of_base(self._space, mixture, place)]
        with self._view.phase(f"sensitivity ({name})", self._sensitivity_windows * len(places)):
            rows = self._measured(name, mixture, places)
            (loss,) = self._objective.losses([mixture], self._sensitivity_windows, "sensitivity")
        return table(self._space, rows, loss)

    def _about(self, budget: Budget, allocation: Allocation) -> list[Start]:
        """Knapsacks about an allocation, by the loss of each step from it."""
        name = f"about {content_hash(list(allocation))[:8]}"
        rows = self._measured(name, allocation, steps_from(self._space, allocation))
        (loss,) = self._objective.losses([allocation], self._sensitivity_windows, name)
        losses = table(neighbours(self._space, allocation), rows, loss)
        return about(self._space, allocation, losses, budget.stored_bytes, "about the best")

    @property
    def _sensitivity_windows(self) -> int:
        return self._search.settings.sensitivity.windows

    def _measured(self, name: str, base: Mixture, places: Sequence[Place]) -> list[dict[str, Any]]:
        """The rows of a base, measured as far as they are not recorded."""
        windows = self._sensitivity_windows

        def recorded() -> list[dict[str, Any]]:
            rows = self._records.rows(SENSITIVITY)
            return [row for row in rows if (row["base"], row["num_windows"]) == (name, windows)]

        known = recorded()
        done = {(row["group"], row["weight_bits"], row["group_size"]) for row in known}
        if len(done) == len(places):
            return known
        measured(self._space, base, places, self._objective, windows, done, partial(self._add_sensitivities, name))
        return recorded()

    def _add_sensitivities(self, base: str, rows: list[dict[str, Any]]) -> None:
        self._add(SENSITIVITY, [row | {"base": base} for row in rows])

    def _add(self, name: Any, rows: list[dict[str, Any]]) -> None:
        common = {"search": self._search.sweep.name, "model": self._search.model}
        self._records.add(name, [common | row for row in rows])

    def _progress(self, progress: Progress) -> None:
        self._view.note(f"{progress.trials} tried, best {progress.loss:.4g} (guard {progress.guard_loss:.4g})")


def _told(study: Mapping[str, Any]) -> str:
    """One line on how a budget's search ended."""
    beside = ", ".join(f"{start['name']} {start['guard_loss']:.4g}" for start in study["starts"])
    return (
        f"{study['study']}: {study['guard_loss']:.4g} on the guard windows at {study['bits_per_weight']:.3f} stored "
        f"bits{f' ({beside})' if beside else ''}; {study['trials']} tried, {study['stopped']}"
    )
