"""Starting a local Ray, or joining a running one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.devices import KINDS, DeviceKind
from cluster.errors import ClusterError
from cluster.job import surrounding_job

_CONNECT_SECONDS = 20
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}


@dataclass(frozen=True, kw_only=True)
class Session:
    """A connection to Ray.

    Args:
        kind: the device kind that workers get; `auto` has been settled.
        count: how many workers there is room for now.
        limit: the most workers; None is all that there is room for, also later.
        threads: CPU cores of each.
        per_device: workers that share a device.
        dashboard: its address, or None.
        is_local: this process started Ray, and no node will join it.
        joined: the cluster that was there before, for a person to read; None where a local one was started.
    """

    kind: DeviceKind
    count: int
    limit: int | None
    threads: int
    per_device: int
    dashboard: str | None
    is_local: bool
    joined: str | None = None


@contextmanager
def ray_session(
    *, device: str, count: int | str, threads: int, per_device: int = 1, address: str | None = None
) -> Iterator[Session]:
    """Connect, and disconnect on leaving. A local Ray ends with this process; its dashboard listens on localhost only.

    Args:
        device: a key of `devices.KINDS`, or "auto": NPUs if the cluster has any, else GPUs, else CPU cores.
        count: workers, or "auto": one per device.
        threads: CPU cores (and torch threads) of each worker.
        per_device: workers that share a device; 1 on CPUs.
        address: of a running cluster; None joins the one whose submitted job this process is, or starts a local one.
    Raises:
        ClusterError: nobody answers at `address`, or the cluster lacks the devices.
    """
    _set_defaults()
    import ray

    job = surrounding_job() if address is None else None
    joined = f"the Ray cluster at {address}" if address not in {None, "local"} else None
    if job is not None:
        address, joined = job.address, f"the Ray cluster at {job.address}, whose job {job.submission} this is"
    dashboard = _connect(device, count, threads, per_device, address)
    try:
        resources = ray.cluster_resources()
        kind = _settle(device, resources)
        yield Session(
            kind=kind,
            count=_count(kind, count, threads, per_device, resources),
            limit=None if count == "auto" else int(count),
            threads=threads,
            per_device=per_device,
            dashboard=dashboard,
            is_local=joined is None,
            joined=joined,
        )
    finally:
        ray.shutdown()


@contextmanager
def visit(address: str) -> Iterator[None]:
    """Connect to a running cluster, only to look at it, and disconnect on leaving.

    Raises:
        ClusterError: nobody answers at `address`.
    """
    _set_defaults()
    import ray

    _join(address)
    try:
        yield
    finally:
        ray.shutdown()


def _set_defaults() -> None:
    """Before ray is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _join(address: str) -> str | None:
    import ray

    _check_answers(address)
    try:
        context = ray.init(address=address, **_QUIET)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ClusterError(f"no Ray cluster answers at --address {address} ({reason})") from error
    return _dashboard(context)


def _connect(device: str, count: int | str, threads: int, per_device: int, address: str | None) -> str | None:
    import ray

    if address is not None:
        return _join(address)
    cores = os.cpu_count() or 1
    wanted = int(count) * threads if isinstance(count, int) and not KINDS.get(device, KINDS["npu"]).simulated else 0
    resources = {}
    if device == "simulated-npu":
        resources["NPU"] = -(-count // per_device) if isinstance(count, int) else cores
    if device == "cpu" and wanted > cores:
        raise ClusterError(
            f"{count} CPU workers of {threads} threads need {wanted} cores and this machine has {cores}; "
            "lower workers.count or workers.threads"
        )
    context = ray.init(
        address="local",  # without it Ray would join whatever cluster it finds on this machine, or a stale trace of one
        num_cpus=max(cores, int(resources.get("NPU", 0)) * per_device * threads),  # as many as simulated workers need
        resources=resources or None,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        **_QUIET,
    )
    return _dashboard(context)


def _check_answers(address: str) -> None:
    """A plain TCP connect first: Ray itself would retry for half a minute and then end the process."""
    import socket

    if address in {"auto", "local"} or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ClusterError(f"--address {address} is not HOST:PORT, such as 10.0.0.1:6379")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS):
            pass
    except OSError as error:
        raise ClusterError(
            f"nobody answers at --address {address} ({error.strerror or error}); start one there with "
            "`ray start --head`, or leave --address out to run on this machine"
        ) from error


def _dashboard(context: object) -> str | None:
    url = getattr(context, "dashboard_url", None)
    return f"http://{url}" if url else None


def _settle(device: str, resources: dict[str, float]) -> DeviceKind:
    if device == "auto":
        return next(kind for kind in KINDS.values() if not kind.simulated and resources.get(kind.resource, 0) >= 1)
    kind = KINDS[device]
    if resources.get(kind.resource, 0) < 1:
        have = ", ".join(
            f"{int(resources[name])} {name}" for name in ("NPU", "GPU", "CPU") if resources.get(name, 0) >= 1
        )
        raise ClusterError(
            f"workers.device = {device!r}, but this Ray cluster has no {kind.resource} (it has {have}); "
            "use device: auto, or start Ray where the devices are"
        )
    return kind


def _count(kind: DeviceKind, count: int | str, threads: int, per_device: int, resources: dict[str, float]) -> int:
    if kind.resource == "CPU" and per_device > 1:
        raise ClusterError(
            f"workers.per_device = {per_device} is for accelerators, and these workers are CPU cores: leave it out"
        )
    units = int(resources.get(kind.resource, 0))
    available = units // threads if kind.resource == "CPU" else units * per_device
    if count == "auto":
        if available < 1:
            raise ClusterError(f"{threads} threads per worker do not fit the cluster's {int(resources['CPU'])} cores")
        return available
    if int(count) > available:
        raise ClusterError(
            f"workers.count = {count}, but this Ray cluster has room for {available} {kind.name} workers"
        )
    return int(count)
