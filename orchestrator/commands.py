"""What each command does, once the command line is parsed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator.config import Sweep, read_sweep
from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout
from orchestrator.plan import Plan, make_plan

if TYPE_CHECKING:
    from orchestrator.inputs import Inputs
    from orchestrator.sweep import Summary

OK, SOME_FAILED, INTERRUPTED = 0, 1, 130


def _read(file: Path, console: Console) -> tuple[Sweep, Mapping[str, str]]:
    """A sweep, and the variables that its workers need where its data is a bundle."""
    from orchestrator.running import with_data

    return with_data(read_sweep(file), str(file), console)


def _prepare(sweep: Sweep, file: Path, console: Console) -> tuple[Inputs, Plan]:
    from orchestrator.inputs import prepare

    with console.status("reading models and data (a packaged model is converted on first use) ..."):
        inputs = prepare(sweep, str(file))
    return inputs, make_plan(sweep, inputs.identities)


def run_command(
    file: Path,
    *,
    out: Path | None,
    report: bool,
    address: str | None = None,
    workers: int | None = None,
    cache: Path | None = None,
) -> int:
    """Run or resume a sweep; the exit status."""
    from orchestrator.damage import damaged_parts
    from orchestrator.running import claimed_output, drive, interrupts, same_again, started_pool
    from orchestrator.store import Store
    from orchestrator.sweep import finished_jobs
    from orchestrator.witness import remove_other_witnesses
    from orchestrator.worker import FACTORY

    console = Console()
    sweep, variables = _read(file, console)
    output = claimed_output(sweep, out, cache)
    layout = output.layout
    inputs, plan = _prepare(sweep, file, console)
    # A damaged part is for the driver to set aside, and its jobs are then not done.
    if layout.sweep.exists() and not damaged_parts(layout) and len(finished_jobs(layout, plan)) == len(plan.jobs):
        console.print(f"all {len(plan.jobs)} jobs of {layout.root} are done already")
        if report:
            report_command(layout.root, console)
        return OK
    stop = threading.Event()
    with (
        started_pool(sweep, layout, FACTORY, console, address=address, workers=workers, variables=variables) as running,
        Store(layout) as store,
        interrupts(stop, console),
    ):
        remove_other_witnesses(running.witness)
        summary = drive(sweep, plan, inputs, layout, store, running.pool, console, stop=stop, cache=output.cache)
    again = same_again("run", file, out, cache)
    return _conclude(summary, again, layout, console, report=report)


def _conclude(summary: Summary, again: str, layout: Layout, console: Console, *, report: bool) -> int:
    """Say how a run ended; `again` is the command that goes on with it."""
    from orchestrator.view import clock

    if summary.interrupted:
        done = summary.reused + summary.finished
        console.print(
            f"stopped: {done} jobs are done, {summary.left} are left; go on with: {again}",
            highlight=False,
            soft_wrap=True,
        )
        return INTERRUPTED
    if report:
        report_command(layout.root, console)
    console.print(
        f"{summary.finished} jobs in {clock(summary.seconds)}"
        + (f", {summary.reused} done before" if summary.reused else "")
        + (f", [red]{summary.failed} failed[/red]" if summary.failed else ""),
        highlight=False,
    )
    for failure in summary.failures:
        console.print(f"failed: {failure}", style="red", highlight=False, markup=False)
    if summary.failed:
        console.print(f"try the failed ones again with: {again}", highlight=False, soft_wrap=True)
    return SOME_FAILED if summary.failed else OK


def plan_command(file: Path, *, out: Path | None, outline: bool = False) -> int:
    """Print what a sweep or a search would do."""
    from orchestrator.reads import is_search

    if is_search(file):
        from orchestrator.search.plan_view import plan_search

        return plan_search(file, out=out, outline=outline)
    from orchestrator.claim import claim_output
    from orchestrator.cost_store import observations_file
    from orchestrator.footprint import footprint
    from orchestrator.forecast import describe, devices_of, forecast
    from orchestrator.history import read_history
    from orchestrator.models.source import node_cache
    from orchestrator.plan_view import plan_table, room_lines
    from orchestrator.sweep import finished_jobs

    console = Console()
    sweep, _ = _read(file, console)
    layout = Layout.of(sweep.name, out)
    claim_output(layout, sweep)
    inputs, plan = _outlined(sweep, file) if outline else _prepare(sweep, file, console)
    history = read_history(layout.root)
    done = set() if outline else finished_jobs(layout, plan, history.states())
    console.print(plan_table(sweep.name, plan, inputs, None if outline else done))
    devices = devices_of(sweep.workers)
    found = forecast(plan.jobs, inputs, devices, events=history.observed(), kept=observations_file(node_cache()))
    if found.warning:
        console.print(f"warning: {found.warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    lines = [
        *describe(found, plan.jobs, done, devices),
        *room_lines(footprint(plan.jobs, inputs, devices.kind), str(layout.root)),
    ]
    if outline:
        lines.append(
            "an outline, by configurations alone: what is done already is not looked at, sizes of data are rough"
        )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return OK


def _outlined(sweep: Sweep, file: Path) -> tuple[Inputs, Plan]:
    from orchestrator.outline import outline

    inputs = outline(sweep, str(file))
    return inputs, make_plan(sweep, inputs.identities)


def status_command(directory: Path, *, watch: bool = False) -> int:
    """Print progress and failures of a sweep from its files, once or until it ends."""
    from orchestrator.status import print_status, watch_status

    return (watch_status if watch else print_status)(directory, Console())


def report_command(directory: Path, console: Console | None = None) -> int:
    """Print the map; write the page and its text twin."""
    from orchestrator.atlas import print_report, write_report

    console = console or Console()
    print_report(directory, console)
    try:
        paths = write_report(directory)
    except OSError as error:
        raise BitatlasError(f"cannot write the report into {directory} ({error.strerror or error})") from error
    console.print(f"wrote {paths.html} and {paths.markdown}", highlight=False)
    return OK


def export_command(directory: Path, cell: str, form: str, to: Path) -> int:
    """Write the checkpoint of a cell."""
    from orchestrator.export.dense import export_dense

    if form != "dense":
        raise BitatlasError(f"--format {form} is unknown; use dense")
    layout, console = Layout(directory), Console()
    if layout.sweep.exists():
        _read(layout.sweep, console)
    size = export_dense(layout, cell, to)
    console.print(f"wrote {to} ({size / 1e6:.1f} MB)", highlight=False)
    return OK


def render_command(file: Path, to: Path) -> int:
    """Render a cluster's description into a directory."""
    from orchestrator.deployment import render_cluster

    names = render_cluster(file, to)
    console = Console()
    for name in names:
        console.print(f"wrote {to / name}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"begin with {to / names[0]}", highlight=False, markup=False, soft_wrap=True)
    return OK


def fetch_command(file: Path, to: Path) -> int:
    """Gather what a sweep needs into a bundle."""
    from orchestrator.bundle.gather import fetch
    from orchestrator.reads import read_either

    console = Console()
    sweep, reads = read_either(file)
    manifest = fetch(sweep, str(file), to, console, reads)
    console.print(
        f"{to} holds {len(manifest.files)} files, {manifest.size / 1e6:.1f} MB: copy it with its links (rsync -a, cp "
        f"-a or tar), and {file.name} beside it; add `data: {to.name}` to that file, and nothing else is read",
        highlight=False,
        soft_wrap=True,
    )
    return OK
