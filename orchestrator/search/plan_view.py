"""`bitatlas plan` of a search file: what there is to choose among, what it may cost, and nothing is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from evaluators.slices import UNIT_DOCUMENTS
from orchestrator.claim import claim_output
from orchestrator.config import PerplexityConfig, TaskConfig
from orchestrator.cost import makespan
from orchestrator.cost_store import observations_file
from orchestrator.errors import BitatlasError
from orchestrator.footprint import footprint
from orchestrator.forecast import Devices, Forecast, describe, devices_of, duration, forecast
from orchestrator.layout import Layout
from orchestrator.models.source import node_cache
from orchestrator.plan import Job, Plan, make_plan
from orchestrator.plan_view import plan_table, room_lines
from orchestrator.search.config import read_search
from orchestrator.search.prepare import Prepared, prepared, search_with_data
from orchestrator.search.sensitivity import FP, every_choice
from orchestrator.search.space import LEFT_ALONE
from orchestrator.search.starts import largest_uniform
from orchestrator.search.worker import TaskUnits
from orchestrator.sweep import finished_jobs
from orchestrator.work import forward_work, task_work

if TYPE_CHECKING:
    from collections.abc import Sequence

OK = 0
# With a base's hidden states kept, a probe runs the blocks from its own on.
_REUSED = 0.5


def plan_search(file: Path, *, out: Path | None, outline: bool) -> int:
    """Print what a search would do; the exit status.

    Raises:
        BitatlasError: whatever would stop the search before it begins; or an outline is asked for.
    """
    if outline:
        raise BitatlasError(f"--outline is of sweeps; a search needs the model and the texts of {file} at hand")
    console = Console()
    search, _ = search_with_data(read_search(file), str(file), console)
    layout = Layout.of(search.sweep.name, out)
    claim_output(layout, search.sweep)
    with console.status("reading the model and data (a packaged model is converted on first use) ..."):
        found = prepared(search, str(file))
    bank, bank_layout = found.bank_plan(), Layout(layout.root / "bank")
    cells = make_plan(found.final_sweep([]), found.inputs.identities)
    done = finished_jobs(bank_layout, bank) | finished_jobs(layout, cells)
    console.print(plan_table(f"{search.sweep.name}: the bank", bank, found.inputs, done & _ids(bank)))
    console.print(choices_table(found))
    console.print(plan_table(f"{search.sweep.name}: cells to compare with", cells, found.inputs, done & _ids(cells)))
    devices = devices_of(search.sweep.workers)
    jobs = [*bank.jobs, *cells.jobs]
    estimated = forecast(jobs, found.inputs, devices, events=[], kept=observations_file(node_cache()))
    if estimated.warning:
        console.print(f"warning: {estimated.warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    room = room_lines(footprint(jobs, found.inputs, devices.kind), str(layout.root))
    left = {"the bank": _left(bank, done), "the cells": _left(cells, done)}
    for line in [*time_lines(found, estimated, left, devices), *room]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return OK


def choices_table(found: Prepared) -> Table:
    """A row per budget: what it holds, and what every allocation holds at least and at most."""
    space, settings = found.space, found.search.settings
    free = [group for group in space.groups if len(group.choices) > 1]
    count = 1
    for group in free:
        count *= len(group.choices)
    title = (
        f"{len(space.groups)} groups ({len(free)} free), 10^{len(str(count)) - 1} allocations, "
        f"{space.bits_per_weight(space.least):.3f} to {space.bits_per_weight(space.most):.3f} bits/weight"
    )
    table = Table(title=title)
    table.add_column("budget")
    for heading in ("bytes", "bits/weight"):
        table.add_column(heading, justify="right")
    table.add_column("largest uniform allocation")
    for budget in found.budgets:
        uniform = largest_uniform(space, budget.stored_bytes)
        told = "none fits"
        if uniform is not None:
            told = f"{uniform.name} ({space.bits_per_weight(uniform.allocation):.3f})"
        bits = 8 * budget.stored_bytes / space.num_weights
        table.add_row(budget.name, f"{budget.stored_bytes:,}", f"{bits:.3f}", told)
    if settings.front is not None:
        table.add_row("front", "all sizes", "", "")
    return table


def window_forwards(found: Prepared) -> dict[str, float]:
    """What is run by part, in windows: sensitivities, and what budgets and the front may take at most."""
    settings, space = found.search.settings, found.space
    sensitivity, budgets = settings.sensitivity, len(found.budgets)
    probes = (
        sum(space.groups[place].choices[index].weight_bits != LEFT_ALONE for place, index in every_choice(space))
        * sensitivity.windows
    )
    reused = 1.0 if isinstance(found.windows, TaskUnits) else _REUSED
    parts: dict[str, float] = {}
    if settings.starts and budgets:
        tables = sum(1 if base == FP else budgets for base in sensitivity.bases)
        parts["sensitivities"] = probes * tables * reused
    if budgets:
        parts["budgets"] = float(budgets * settings.evaluations * settings.windows)
    if settings.front is not None:
        parts["the front"] = float(settings.front.evaluations * settings.windows)
    return parts


def time_lines(found: Prepared, estimated: Forecast, left: Mapping[str, Sequence[Job]], devices: Devices) -> list[str]:
    """How long it takes, by part, and what that rests on.

    Args:
        estimated: of all jobs of the bank and of the cells.
        left: those that are not done, by part.
    """
    seconds = {name: makespan(jobs, estimated.seconds, devices.count) for name, jobs in left.items()}
    per_window = _window_seconds(found, estimated)
    for name, windows in window_forwards(found).items():
        seconds[name] = windows * per_window / devices.count
    whole = sum(seconds.values())
    parts = ", ".join(f"{name} {duration(took)}" for name, took in seconds.items())
    plural = "" if devices.count == 1 else "s"
    jobs = [job for some in left.values() for job in some]
    return [
        f"estimated time: at most {duration(whole)} on {devices.count} {devices.kind} worker{plural} ({parts}), before "
        "the cells that are chosen; a budget ends earlier where its guard does not improve",
        *describe(estimated, jobs, (), devices)[-1:],
    ]


def _window_seconds(found: Prepared, estimated: Forecast) -> float:
    """Of one window of the search on one worker, by the rate of an evaluation like it."""
    shape = found.inputs.models[found.search.model].shape
    windows = found.windows
    like: type = PerplexityConfig
    if isinstance(windows, TaskUnits):
        work, like = task_work(shape, TaskConfig(name=windows.name, limit=UNIT_DOCUMENTS)), TaskConfig
    else:
        work = forward_work(shape, 1, windows.shape[1], head=True)
    cells = make_plan(found.final_sweep([]), found.inputs.identities)
    evaluations = [job for job in cells.jobs if job.evaluation is not None]
    job = next((one for one in evaluations if isinstance(one.evaluation, like)), evaluations[0])
    return work * estimated.seconds[job.id] / estimated.work[job.id]


def _left(plan: Plan, done: set[str]) -> list[Job]:
    return [job for job in plan.jobs if job.id not in done]


def _ids(plan: Plan) -> set[str]:
    return {job.id for job in plan.jobs}
