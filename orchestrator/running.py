"""What starting something on a cluster takes: Ray and workers around it, a driver, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.pool import Pool
from cluster.witness import Witness
from orchestrator.config import Sweep
from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout
from orchestrator.plan import Plan

if TYPE_CHECKING:
    from orchestrator.inputs import Inputs
    from orchestrator.store import Store
    from orchestrator.sweep import Summary
    from orchestrator.view import View


def check_is_kept(option: str, directory: Path | None) -> None:
    """Raise where a directory to write to would be deleted after a submitted Ray job.

    Raises:
        BitatlasError: names the option and the remedy.
    """
    from cluster.job import is_in_a_copy

    if directory is not None and is_in_a_copy(directory):
        raise BitatlasError(
            f"{option} {directory} lies in a Ray job's copy of its working directory, which Ray deletes after the "
            f"job; give {option} an absolute path on storage that every node sees"
        )


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a sweep leaves what it makes.

    Args:
        cache: where it shares it, usable; None shares nothing.
    """

    layout: Layout
    cache: Path | None


def claimed_output(sweep: Sweep, out: Path | None, cache: Path | None) -> Output:
    """The output directory that was asked for, or the sweep's own, free or already this sweep's.

    Raises:
        BitatlasError: it is another sweep's, would be lost with a job, or the cache cannot be used.
    """
    from orchestrator.claim import claim_output
    from orchestrator.shared_cache import usable_cache

    layout = Layout.of(sweep.name, out)
    check_is_kept("--out", layout.root)
    check_is_kept("--cache", cache)
    claim_output(layout, sweep)
    return Output(layout=layout, cache=None if cache is None else usable_cache(cache, layout.root))


def same_again(command: str, file: Path, out: Path | None, cache: Path | None) -> str:
    """The command that goes on with what was stopped."""
    return f"bitatlas {command} {file}" + (f" --out {out}" if out else "") + (f" --cache {cache}" if cache else "")


def with_data(sweep: Sweep, file: str, console: Console) -> tuple[Sweep, Mapping[str, str]]:
    """A sweep that reads its bundle, if it has one, and the variables that its workers need for that.

    Raises:
        BitatlasError: the bundle lacks something, or was changed.
    """
    from orchestrator.bundle.use import use_bundle

    if sweep.data is None:
        return sweep, {}
    with console.status(f"verifying {sweep.data} (every file is read once per machine) ..."):
        return use_bundle(sweep, file)


@dataclass(frozen=True, kw_only=True)
class Running:
    """Workers that have started, and the file by which they tell whether they see the output directory."""

    pool: Pool
    witness: Witness


@contextmanager
def started_pool(
    sweep: Sweep,
    layout: Layout,
    factory: str,
    console: Console,
    *,
    address: str | None = None,
    workers: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Ray and the workers that a sweep's file asks for, until this is left.

    Args:
        factory: "module:attribute" of the worker class.
        address: of a running cluster.
        workers: how many, instead of what the file says.
        variables: for the workers' environment.
    Raises:
        BitatlasError, ClusterError: no such device, cluster or directory.
    """
    from cluster.devices import strict_variables
    from cluster.ray_pool import RayPool
    from cluster.session import ray_session
    from orchestrator.execution import check_device
    from orchestrator.witness import left_witness

    settings = sweep.workers
    with ray_session(
        device=settings.device,
        count=workers if workers is not None else settings.count,
        threads=settings.threads,
        per_device=settings.per_device,
        address=address,
    ) as session:
        check_device(sweep.evaluation.execution, session.kind.name)
        if session.joined:
            console.print(f"joined {session.joined}", highlight=False, markup=False, soft_wrap=True)
        if session.dashboard:
            console.print(
                f"Ray dashboard: {session.dashboard} (if it asks for a token: ray get-auth-token)", highlight=False
            )
        with left_witness(layout.root) as witness:
            with console.status(f"starting {session.count} {session.kind.name} workers ..."):
                pool = RayPool(
                    session,
                    factory,
                    {**(variables or {}), **strict_variables(session.kind, strict=settings.strict)},
                    stuck_seconds=60 * settings.stuck_minutes,
                    witness=witness,
                )
            try:
                yield Running(pool=pool, witness=witness)
            finally:
                pool.close()


def drive(
    sweep: Sweep,
    plan: Plan,
    inputs: Inputs,
    layout: Layout,
    store: Store,
    pool: Pool,
    console: Console,
    *,
    stop: threading.Event,
    cache: Path | None = None,
) -> Summary:
    """Run a plan, shown on a console and in the cluster's metrics.

    Args:
        stop: set when it is to stop.
        cache: what sweeps share; None is nothing.
    """
    from orchestrator.cost_store import observations_file
    from orchestrator.models.source import node_cache
    from orchestrator.sweep import Driver
    from orchestrator.view import make_view

    driver = Driver(
        sweep=sweep,
        plan=plan,
        inputs=inputs,
        layout=layout,
        store=store,
        pool=pool,
        kept=observations_file(node_cache()),
        cache=cache,
        stop=stop,
    )
    with _with_metrics(make_view(console), sweep, console) as view:
        return driver.run(view)


@contextmanager
def _with_metrics(view: View, sweep: Sweep, console: Console) -> Iterator[View]:
    """A view that also feeds the cluster's metrics; the view itself, with a warning, where Ray will not have them."""
    from cluster.errors import ClusterError
    from cluster.metrics_actor import MetricsSink
    from orchestrator.metrics_view import MetricsView

    try:
        sink = MetricsSink(f"bitatlas-metrics-{sweep.name}")
    except ClusterError as error:
        console.print(f"warning: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        yield view
        return
    try:
        yield MetricsView(view, sink, sweep.name)
    finally:
        sink.close()


@contextmanager
def interrupts(stop: threading.Event, console: Console) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) asks the driver to stop; a second one ends the process at once."""

    def ask(number: int, _: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        console.print("\nstopping: what is finished is kept (again to end at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
