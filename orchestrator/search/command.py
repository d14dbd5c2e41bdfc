"""`bitatlas search`: makes the bank, searches it, and runs the sweep that the chosen allocations are cells of."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from orchestrator.claim import write_sweep
from orchestrator.commands import INTERRUPTED, OK, SOME_FAILED, report_command
from orchestrator.config import Sweep, resolved
from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout
from orchestrator.plan import Plan, make_plan
from orchestrator.running import claimed_output, drive, interrupts, same_again, started_pool
from orchestrator.search.config import read_search
from orchestrator.search.crew import InterruptedSearchError
from orchestrator.search.prepare import Prepared, prepared, search_with_data
from orchestrator.search.records import Records
from orchestrator.search.run import SearchRun
from orchestrator.search.view import SearchView
from orchestrator.search.worker import FACTORY
from orchestrator.store import Store
from orchestrator.sweep import Summary, finished_jobs
from orchestrator.witness import remove_other_witnesses

if TYPE_CHECKING:
    from cluster.pool import Pool
    from orchestrator.search.mixtures import Key


def search_command(
    file: Path,
    *,
    out: Path | None,
    report: bool,
    address: str | None = None,
    workers: int | None = None,
    cache: Path | None = None,
) -> int:
    """Run a search, or go on with it; the exit status."""
    console = Console()
    search = read_search(file)
    search, variables = search_with_data(search, str(file), console)
    sweep = search.sweep
    output = claimed_output(sweep, out, cache)
    layout = output.layout
    with console.status("reading the model and data (a packaged model is converted on first use) ..."):
        found = prepared(search, str(file))
    records = Records(layout.root)
    _check_same(records, found.identity)
    again = same_again("search", file, out, cache)
    stop = threading.Event()
    summary = None
    with started_pool(
        sweep, layout, FACTORY, console, address=address, workers=workers, variables=variables
    ) as running:
        _check_seen(running.pool, layout)
        with Store(layout) as store, interrupts(stop, console), suppress(InterruptedSearchError):
            remove_other_witnesses(running.witness)
            summary = _Session(found, layout, records, running.pool, console, stop, output.cache).run(store)
    if summary is None or summary.interrupted:
        console.print(f"stopped: what is done is kept; go on with: {again}", highlight=False, soft_wrap=True)
        return INTERRUPTED
    if report:
        report_command(layout.root, console)
    for failure in summary.failures:
        console.print(f"failed: {failure}", style="red", highlight=False, markup=False)
    if summary.failed:
        console.print(f"try the failed ones again with: {again}", highlight=False, soft_wrap=True)
    return SOME_FAILED if summary.failed else OK


def _check_same(records: Records, identity: str) -> None:
    """Raise where what is recorded is of other tokens, another bank or another objective."""
    if not records.file.exists():
        return
    try:
        held = yaml.safe_load(records.file.read_text(encoding="utf-8"))["identity"]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise BitatlasError(f"{records.file} is not readable; choose another --out, or mend that file") from error
    if held != identity:
        raise BitatlasError(
            f"{records.directory} holds a search of another bank, other tokens or another objective; choose another "
            "--out (--cache shares the artifacts)"
        )


def _check_seen(pool: Pool, layout: Layout) -> None:
    blind = sorted({worker.node for worker in pool.workers.values() if not worker.sees_output})
    if blind:
        raise BitatlasError(
            f"{layout.root} is not seen by {', '.join(blind)}: every worker of a search reads the bank there; give "
            "--out a directory that all nodes share"
        )


class _Session:
    """The three parts of a search, on workers that stay."""

    def __init__(
        self,
        found: Prepared,
        layout: Layout,
        records: Records,
        pool: Pool,
        console: Console,
        stop: threading.Event,
        cache: Path | None,
    ) -> None:
        self._found, self._layout, self._records, self._pool = found, layout, records, pool
        self._console, self._stop, self._cache = console, stop, cache
        self._search, self._space = found.search, found.space

    def run(self, store: Store) -> Summary:
        """The bank, the search, the sweep; how the last of them to run ended."""
        write_sweep(self._layout, self._found.final_sweep([]))  # so that its status and report are there from now on
        self._records.write_json(self._records.file, self._described())
        view = SearchView(self._console)
        bank, plan = self._search.bank_sweep(), self._found.bank_plan()
        bank_layout = Layout(self._layout.root / "bank")
        if len(finished_jobs(bank_layout, plan)) < len(plan.jobs):
            view.say(f"the bank: {len(plan.jobs)} variants of every linear, in {bank_layout.root}")
            with Store(bank_layout) as bank_store:
                summary = self._drive(bank, plan, bank_layout, bank_store)
            if summary.interrupted or summary.failed:
                return summary
        chosen = SearchRun(
            search=self._search,
            model=self._found.inputs.models[self._search.model],
            space=self._space,
            budgets=self._found.budgets,
            windows=self._found.windows,
            artifacts=_artifacts(plan, bank_layout),
            records=self._records,
            pool=self._pool,
            view=view,
            stop=self._stop,
        ).run()
        sweep, plan = self._with_cells(chosen)
        self._records.write_json(self._records.chosen, chosen)
        return self._drive(sweep, plan, self._layout, store)

    def _drive(self, sweep: Sweep, plan: Plan, layout: Layout, store: Store) -> Summary:
        return drive(
            sweep,
            plan,
            self._found.inputs,
            layout,
            store,
            self._pool,
            self._console,
            stop=self._stop,
            cache=self._cache,
        )

    def _described(self) -> dict[str, Any]:
        settings = self._search.settings.model_dump(mode="json")
        return {"identity": self._found.identity, **yaml.safe_load(resolved(self._search.sweep)), "search": settings}

    def _with_cells(self, chosen: Mapping[str, Any]) -> tuple[Sweep, Plan]:
        """The sweep that evaluates what was chosen; each chosen allocation is told its cell."""
        described = []
        for study in chosen["studies"]:
            described += (
                [study] if study.get("front") is None else [one for one in study["front"] if "guard_loss" in one]
            )
            described += study["starts"] if self._search.settings.evaluate_starts else []
        schemes = [self._found.scheme(tuple(one["allocation"])) for one in described]
        sweep = self._found.final_sweep(schemes)
        plan = make_plan(sweep, self._found.inputs.identities)
        cells = {cell.scheme: cell.id for cell in plan.cells}
        for one, scheme in zip(described, schemes, strict=True):
            one["cell"] = cells[scheme]
        return sweep, plan


def _artifacts(plan: Plan, layout: Layout) -> dict[Key, str]:
    """Where each choice's artifact lies."""
    return {
        (job.cell.weight_bits, job.cell.scheme.group_size): str(layout.artifact(job.cell.key).absolute())
        for job in plan.jobs
        if job.cell.scheme is not None
    }
