"""Work -> seconds, by rates that are fitted to finished jobs; and the time that jobs take together. Pure.

A rate is in seconds per floating-point operation of `work.py`, per device and kind of work. A kind seen n times gives
its own median the weight n / (n + 2) and the median of all that the device did the rest, on a logarithmic scale: a
median so that a job that was held up does not count, and the rest so that one job alone does not decide.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from orchestrator.work import kind_of, works

if TYPE_CHECKING:
    from orchestrator.inputs import Inputs
    from orchestrator.plan import Job

# Operations per second before anything was observed, meant to be too low rather than too high: per CPU core half of the
# slowest processor measured here (docs/design.md), per accelerator a few percent of a current one's bf16 peak.
NOMINAL = {"cpu": 25e9, "simulated-npu": 25e9, "cuda": 20e12, "npu": 20e12}
# Shorter jobs tell of starting and loading, not of work.
SHORTEST_SECONDS = 1.0
# So do jobs of so few operations, a second's at the nominal rate of a core, however long they take: a sweep's own tell
# of their kind, and the next sweep's model may be another one.
LEAST_KEPT_WORK = 25e9
_OWN_WEIGHT = 2
_MOST_SEEN = 1000  # of a kind on a device, the latest: a median of more is no better


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A finished job: on which device, what kind of work, seconds per operation, and how many operations."""

    device: str
    kind: str
    job_id: str
    rate: float
    work: float = math.inf


@dataclass(frozen=True)
class Observations:
    """device -> kind of work -> job id -> seconds per operation; of each kind the oldest first."""

    seen: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    def plus(self, more: Iterable[Observation]) -> Observations:
        """With more jobs; one that is known already is known by what was seen last."""
        seen = {device: {kind: dict(jobs) for kind, jobs in kinds.items()} for device, kinds in self.seen.items()}
        for item in more:
            jobs = seen.setdefault(item.device, {}).setdefault(item.kind, {})
            jobs.pop(item.job_id, None)
            jobs[item.job_id] = item.rate
        return Observations(seen)

    def count(self, device: str) -> int:
        """Jobs seen on a device."""
        return sum(len(jobs) for jobs in self.seen.get(device, {}).values())

    def rate(self, device: str, kind: str, nominal: float) -> float:
        """Seconds per operation; 1 / nominal where the device was never seen.

        Args:
            nominal: operations per second.
        """
        kinds = self.seen.get(device, {})
        everything = [rate for jobs in kinds.values() for rate in jobs.values()]
        if not everything:
            return 1 / nominal
        general, own = median(everything), list(kinds.get(kind, {}).values())
        if not own:
            return general
        weight = len(own) / (len(own) + _OWN_WEIGHT)
        return math.exp(weight * math.log(median(own)) + (1 - weight) * math.log(general))


def observe(
    events: Iterable[Mapping[str, Any]],
    jobs: Sequence[Job],
    inputs: Inputs,
    *,
    threads: int,
    work: Mapping[str, float] | None = None,
) -> list[Observation]:
    """What finished events tell of these jobs. Reused artifacts and very short jobs tell nothing.

    Args:
        events: rows of the events table, in order.
        jobs: all of the plan.
        threads: of each worker.
        work: of `works`, where it is known already.
    """
    work = works(jobs, inputs) if work is None else work
    by_id, seen, found = {job.id: job for job in jobs}, Counter[tuple[str, str]](), []
    for event in reversed(list(events)):
        name, device, seconds = event["job_id"], event["device"], event["seconds"]
        if event["event"] != "finished" or not device or work.get(name, 0) <= 0 or (seconds or 0) < SHORTEST_SECONDS:
            continue
        kind = kind_of(by_id[name])
        seen[device, kind] += 1
        if seen[device, kind] <= _MOST_SEEN:
            key, operations = device_key(device, threads), work[name]
            item = Observation(device=key, kind=kind, job_id=name, rate=seconds / operations, work=operations)
            found.append(item)
    return found[::-1]


def device_key(device: str, threads: int) -> str:
    """What rates are kept by: the device, and the threads of a worker where they are several."""
    return device if threads == 1 else f"{device}, {threads} threads"


def nominal_rate(device_kind: str, threads: int) -> float:
    """Operations per second of a worker of which nothing is known.

    Args:
        device_kind: a key of `NOMINAL`.
        threads: of the worker, which are its cores on processors.
    """
    return NOMINAL[device_kind] * (threads if device_kind in {"cpu", "simulated-npu"} else 1)


def estimate(
    jobs: Sequence[Job],
    inputs: Inputs,
    observations: Observations,
    *,
    device: str,
    nominal: float,
    work: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Job id -> estimated seconds on one worker.

    Args:
        jobs: all of the plan, in its order.
        device: as `device_key` names it.
        nominal: operations per second where nothing was observed.
        work: of `works`, where it is known already.
    """
    work = works(jobs, inputs) if work is None else work
    kinds = {job.id: kind_of(job) for job in jobs}
    rates = {kind: observations.rate(device, kind, nominal) for kind in set(kinds.values())}
    return {name: work[name] * rates[kind] for name, kind in kinds.items()}


def makespan(jobs: Iterable[Job], seconds: Mapping[str, float], workers: int) -> float:
    """Seconds that jobs take together: an even share of all of them, but no less than the longest chain.

    Args:
        jobs: those that are left; what they need and is not among them is done.
        seconds: by job id.
        workers: how many work side by side.
    """
    left = {job.id: job for job in jobs}
    if not left:
        return 0.0
    chains = (seconds[job.id] + (seconds[job.needs] if job.needs in left else 0.0) for job in left.values())
    return max(sum(seconds[name] for name in left) / max(workers, 1), *chains)
