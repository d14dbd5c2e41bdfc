"""A sweep's estimated time: reads what was seen before, asks this machine what it has, and says what it rests on."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.devices import KINDS
from orchestrator.config import WorkersConfig
from orchestrator.cost import Observations, device_key, estimate, makespan, nominal_rate, observe
from orchestrator.cost_store import read_observations
from orchestrator.work import works

if TYPE_CHECKING:
    from orchestrator.inputs import Inputs
    from orchestrator.plan import Job

_CLUSTER_SIZES = (1, 8, 64)


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What a sweep is to run on.

    Args:
        kind: a key of `cluster.devices.KINDS`.
        name: of the device, as events have it; None where it is not in this machine.
        count: workers.
        threads: of each worker.
        assumed: whether `count` is a guess, for want of such devices here.
    """

    kind: str
    name: str | None
    count: int
    threads: int = 1
    assumed: bool = False

    @property
    def is_accelerator(self) -> bool:
        """Whether a cluster of other sizes would be the question."""
        return self.kind in {"cuda", "npu"}


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Estimated seconds of every job on one worker.

    Args:
        seconds: by job id.
        jobs_seen: finished jobs on this device that rates were fitted to; 0 is a nominal rate.
        device: as rates name it.
        nominal: operations per second of a worker of which nothing is known.
        work: job id -> floating-point operations.
        warning: what was wrong with the kept rates, if anything.
    """

    seconds: dict[str, float]
    jobs_seen: int
    device: str | None
    nominal: float
    work: Mapping[str, float]
    warning: str | None = None


def forecast(
    jobs: Sequence[Job], inputs: Inputs, devices: Devices, *, events: Sequence[Mapping[str, Any]], kept: Path | None
) -> Forecast:
    """Estimate a plan's jobs.

    Args:
        jobs: all of the plan, in its order.
        devices: the first device in `events` stands in where their name is not known.
        events: of this sweep, in order.
        kept: the file of earlier sweeps' observations; None is none.
    """
    known, warning = (Observations(), None) if kept is None else read_observations(kept)
    nominal = nominal_rate(devices.kind, devices.threads)
    on_host = nominal_rate("cpu", devices.threads)
    work = works(jobs, inputs, host_cost=nominal / on_host if devices.is_accelerator else 1.0)
    known = known.plus(observe(events, jobs, inputs, threads=devices.threads, work=work))
    name = devices.name or next((event["device"] for event in events if event["device"]), None)
    device = None if name is None else device_key(name, devices.threads)
    return Forecast(
        seconds=estimate(jobs, inputs, known, device=device or "", nominal=nominal, work=work),
        jobs_seen=0 if device is None else known.count(device),
        device=device,
        nominal=nominal,
        work=work,
        warning=warning,
    )


def devices_of(settings: WorkersConfig) -> Devices:
    """What the workers of a sweep file would be on this machine, told without Ray."""
    import torch

    from cluster.devices import claim

    kind = settings.device
    if kind == "auto":
        kind = next((name for name in ("npu", "cuda") if _device_count(name)), "cpu")
    if kind in {"cuda", "npu"}:
        found = _device_count(kind)
        name = str(torch.get_device_module(kind).get_device_name(0)) if found else None
        count = settings.count if isinstance(settings.count, int) else max(found, 1) * settings.per_device
        assumed = settings.count == "auto" and not found
        return Devices(kind=kind, name=name, count=count, threads=settings.threads, assumed=assumed)
    name = claim(KINDS["cpu"]).name
    per_worker = 1 if kind == "simulated-npu" else settings.threads
    count = settings.count if isinstance(settings.count, int) else max((os.cpu_count() or 1) // per_worker, 1)
    if kind == "simulated-npu":
        name = f"simulated NPU on {name}"
    return Devices(kind=kind, name=name, count=count, threads=settings.threads)


def _device_count(kind: str) -> int:
    import importlib.util

    import torch

    if kind == "npu":
        if importlib.util.find_spec("torch_npu") is None:
            return 0
        try:
            import torch_npu  # noqa: F401
        except (ImportError, RuntimeError):  # CANN is not set up here; workers say so in their own words
            return 0
    module = torch.get_device_module(kind)
    return int(module.device_count()) if module.is_available() else 0


def describe(found: Forecast, jobs: Sequence[Job], done: Collection[str], devices: Devices) -> list[str]:
    """The lines of `bitatlas plan` on time.

    Args:
        jobs: all of the plan.
        done: ids of those that are finished.
    """
    left = [job for job in jobs if job.id not in done]
    if not left:
        return []
    plural = "" if devices.count == 1 else "s"
    assumed = ", assumed: none of these is in this machine" if devices.assumed else ""
    lines = [
        f"estimated time: {duration(makespan(left, found.seconds, devices.count))} on {devices.count} {devices.kind} "
        f"worker{plural}{assumed}; {duration(sum(found.seconds[job.id] for job in left))} of one worker's time"
    ]
    if devices.is_accelerator:
        times = (f"{duration(makespan(left, found.seconds, size))} on {size}" for size in _CLUSTER_SIZES)
        lines.append(f"by number of {devices.kind} devices: {', '.join(times)}")
    if found.jobs_seen:
        lines.append(f"fitted to {found.jobs_seen} job{'' if found.jobs_seen == 1 else 's'} seen on {found.device}")
    else:
        lines.append(
            f"analytic, not yet fitted to this machine: at a nominal {found.nominal / 1e9:.0f} GFLOP/s per worker, "
            "chosen low; the first run measures it"
        )
    return lines


def duration(seconds: float) -> str:
    """Roughly, as an estimate deserves: `under 1 min`, `25 min`, `3.2 h`."""
    if seconds < 60:
        return "under 1 min"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
