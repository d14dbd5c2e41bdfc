"""A search with everything that could be wrong looked at, before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator.config import Sweep
from orchestrator.inputs import Inputs, prepare
from orchestrator.plan import Plan, content_hash, make_plan
from orchestrator.running import with_data
from orchestrator.scheme import Scheme, parse_scheme
from orchestrator.search.budget import Budget
from orchestrator.search.config import Search
from orchestrator.search.records import space_as_json
from orchestrator.search.run import budgets_of, space_of
from orchestrator.search.space import LEFT_ALONE, Allocation, Space
from orchestrator.search.starts import largest_uniform
from orchestrator.search.tokens import search_windows, task_units
from orchestrator.search.worker import TaskUnits, facts_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A search with everything that could be wrong looked at.

    Args:
        windows: of the search, then of the guard; or units of a task.
        identity: content hash of the space, the tokens and what allocations are judged by: what is recorded of one
            identity says nothing of another.
    """

    search: Search
    inputs: Inputs
    space: Space
    budgets: list[Budget]
    windows: NDArray[np.int64] | TaskUnits
    identity: str

    def bank_plan(self) -> Plan:
        """The jobs that make the bank: every choice is quantized, nothing is evaluated."""
        plan = make_plan(self.search.bank_sweep(), self.inputs.identities)
        return Plan(cells=plan.cells[1:], jobs=tuple(job for job in plan.jobs if job.kind == "quantize"))

    def final_sweep(self, schemes: Sequence[Scheme]) -> Sweep:
        """The sweep that the search ends in.

        Args:
            schemes: of what was chosen, beside the uniform cells of the file, or else the largest of each budget.
        """
        uniform = self.search.sweep.grid or tuple(
            self.scheme(start.allocation)
            for start in (largest_uniform(self.space, budget.stored_bytes) for budget in self.budgets)
            if start is not None
        )
        grid = tuple(dict.fromkeys([*uniform, *schemes])) or self.search.schemes[:1]
        return self.search.sweep.model_copy(update={"grid": grid})

    def scheme(self, allocation: Allocation) -> Scheme:
        """The scheme of a cell: quantized in sequence, as any other cell is."""
        given = zip(self.space.groups, self.space.choices(allocation), strict=True)
        common = Counter(
            (choice.weight_bits, choice.group_size)
            for group, choice in given
            if not group.role and choice.weight_bits != LEFT_ALONE
        ).most_common(1)[0][0]
        base = replace(self.search.schemes[0], weight_bits=common[0], group_size=common[1])
        return parse_scheme(self.space.entry(base, allocation), "search")


def search_with_data(search: Search, file: str, console: Console) -> tuple[Search, Mapping[str, str]]:
    """A search that reads its bundle, if it has one, and the variables that its workers need for that.

    Raises:
        BitatlasError: the bundle lacks something, or was changed.
    """
    from orchestrator.bundle.manifest import read_manifest
    from orchestrator.bundle.use import Copies

    sweep, variables = with_data(search.sweep, file, console)
    if search.sweep.data is None:
        return search, variables
    directory = Path(search.sweep.data)
    copies = Copies(read_manifest(directory, f"{file}: data"), directory)
    corpora = tuple(copies.corpus(text.corpus, f"{file}: {text.where}") for text in search.reads.texts)
    settings = search.settings.model_copy(update={"corpus": corpora})
    return replace(search, sweep=sweep, settings=settings), variables


def prepared(search: Search, file: str) -> Prepared:
    """Look at everything that a search needs; nothing is written.

    Raises:
        BitatlasError: one sentence with the field.
    """
    grid = tuple(dict.fromkeys([*search.bank_sweep().grid, *search.schemes, *search.sweep.grid]))
    inputs = prepare(search.sweep.model_copy(update={"grid": grid}), file)
    model = inputs.models[search.model]
    space = space_of(search, model, file)
    budgets = budgets_of(search, space, model, file)
    windows = task_units(search, file) or search_windows(search, model, file)
    facts = [
        model.digest,
        model.dtype,
        [scheme.as_entry() for scheme in search.bank],
        space_as_json(space),
        facts_of(windows),
        search.settings.windows,
        search.settings.objective,
    ]
    identity = content_hash(facts)
    return Prepared(search=search, inputs=inputs, space=space, budgets=budgets, windows=windows, identity=identity)
