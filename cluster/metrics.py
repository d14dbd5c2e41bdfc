"""Every metric that a sweep exports, declared once, and the plain data that carries their values. No Ray here.

Ray puts `ray_` before a name; a counter gets `_total` behind it, a histogram `_bucket`, `_count` and `_sum`, which adds
up the middles of buckets. Each series also says `NodeAddress`, `WorkerId` and `SessionName` by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]
Tags = tuple[str, ...]
"""Values of a metric's tags, in the order of its declaration."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One declaration.

    Args:
        description: for Prometheus, one sentence; it says where a figure is not the obvious one.
        tags: names of its labels.
        boundaries: upper ends of a histogram's buckets.
    """

    name: str
    kind: Kind
    description: str
    tags: Tags
    boundaries: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """The names of its series at a node's metrics endpoint."""
        name = f"ray_{self.name}"
        suffixes = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
        return tuple(name + suffix for suffix in suffixes[self.kind])


METRICS = (
    Metric(
        name="bitatlas_jobs",
        kind="gauge",
        description="Jobs by state: waiting, running, finished (in earlier runs too), failed (or given up with one).",
        tags=("sweep", "state"),
    ),
    Metric(
        name="bitatlas_cells",
        kind="gauge",
        description="Cells by state: waiting (none of its jobs begun), running (some), finished (all), failed (any).",
        tags=("sweep", "state"),
    ),
    Metric(
        name="bitatlas_workers",
        kind="gauge",
        description="Workers alive, each with one device.",
        tags=("sweep",),
    ),
    Metric(
        name="bitatlas_remaining_seconds",
        kind="gauge",
        description="Estimated seconds until all jobs are done.",
        tags=("sweep",),
    ),
    Metric(
        name="bitatlas_stage_seconds",
        kind="histogram",
        description="Seconds that finished jobs took on their workers, loading included; by stage: a task, a corpus.",
        tags=("sweep", "stage"),
        boundaries=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0),
    ),
    Metric(
        name="bitatlas_worker_seconds",
        kind="counter",
        description="Seconds that workers spent on attempts, failed ones included; by stage.",
        tags=("sweep", "stage"),
    ),
    Metric(
        name="bitatlas_tokens",
        kind="counter",
        description="Tokens of finished jobs: predicted ones of a perplexity, generated ones of a task; else none.",
        tags=("sweep", "stage"),
    ),
    Metric(
        name="bitatlas_tokens_per_second",
        kind="gauge",
        description="Tokens per second of one worker, over the stage's latest finished jobs, loading included.",
        tags=("sweep", "stage"),
    ),
    Metric(
        name="bitatlas_peak_memory_bytes",
        kind="gauge",
        description="Peak memory of the worker's latest finished job, of its device or, on CPU, of its process.",
        tags=("sweep", "worker"),
    ),
    Metric(
        name="bitatlas_retries",
        kind="counter",
        description="Attempts that failed and are followed by another, by kind of failure.",
        tags=("sweep", "kind"),
    ),
)
MAX_OBSERVED = 10_000  # kept for an actor that does not answer
BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Values of one moment, by metric and tags.

    Args:
        gauges: as they are now.
        counters: since the sweep began, so that a snapshot that was lost costs nothing.
        observed: what a histogram has not been told yet.
    """

    gauges: dict[str, dict[Tags, float]] = field(default_factory=dict)
    counters: dict[str, dict[Tags, float]] = field(default_factory=dict)
    observed: dict[str, list[tuple[Tags, float]]] = field(default_factory=dict)

    def after(self, earlier: Snapshot) -> Snapshot:
        """This one, with what an earlier one that was never sent had observed; the latest, where it is too much."""
        names = [*earlier.observed, *self.observed]
        both = {name: (earlier.observed.get(name, []) + self.observed.get(name, []))[-MAX_OBSERVED:] for name in names}
        return Snapshot(gauges=self.gauges, counters=self.counters, observed=both)


class Increments:
    """What counters grew by since the last time, for those who can only add."""

    def __init__(self) -> None:
        """Nothing counted yet."""
        self._before: dict[tuple[str, Tags], float] = {}

    def of(self, snapshot: Snapshot) -> Iterator[tuple[str, Tags, float]]:
        """Name, tags and growth of each counter that grew."""
        for name, series in snapshot.counters.items():
            for tags, value in series.items():
                growth = value - self._before.get((name, tags), 0.0)
                if growth > 0:
                    self._before[name, tags] = value
                    yield name, tags, growth
