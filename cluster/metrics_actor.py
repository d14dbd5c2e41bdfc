"""The actor that exports a driver's metrics, and the driver's end of it. Metrics of short-lived processes vanish, so
one actor per sweep holds them all, on the driver's node.

Nothing here may hold a sweep up or stop it: snapshots are sent and never waited for, and what goes wrong means no
metrics.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from cluster.errors import ClusterError
from cluster.metrics import BY_NAME, METRICS, Increments, Snapshot

_RESTARTS = 3  # Ray starts it again, and the next snapshot tells it the counters in full


class MetricsActor:
    """Hands snapshots to Ray's metrics agent, which Prometheus asks."""

    def __init__(self) -> None:
        """Declare every metric to Ray."""
        from ray.util import metrics

        kinds = {"gauge": metrics.Gauge, "counter": metrics.Counter, "histogram": metrics.Histogram}
        self._increments = Increments()
        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            more = {"boundaries": list(metric.boundaries)} if metric.kind == "histogram" else {}
            self._metrics[metric.name] = kinds[metric.kind](
                metric.name, description=metric.description, tag_keys=metric.tags, **more
            )

    def record(self, snapshot: Snapshot) -> None:
        """Take the values of one moment."""
        for name, series in snapshot.gauges.items():
            for tags, value in series.items():
                self._metrics[name].set(value, tags=_labels(name, tags))
        for name, tags, growth in self._increments.of(snapshot):
            self._metrics[name].inc(growth, tags=_labels(name, tags))
        for name, observed in snapshot.observed.items():
            for tags, value in observed:
                self._metrics[name].observe(value, tags=_labels(name, tags))


def _labels(name: str, tags: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(BY_NAME[name].tags, tags, strict=True))


class MetricsSink:
    """The driver's end: sends snapshots, one at a time."""

    def __init__(self, name: str) -> None:
        """Ask for the actor; it starts while the driver goes on.

        Args:
            name: as the dashboard shows it; unique within the driver's namespace.
        Raises:
            ClusterError: Ray would not have it.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any] = {"name": name, "num_cpus": 0, "max_restarts": _RESTARTS, "max_task_retries": 0}
        try:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self._actor = ray.remote(MetricsActor).options(scheduling_strategy=here, **options).remote()
        except (ray.exceptions.RayError, RuntimeError, ValueError) as error:
            raise ClusterError(f"metrics are not exported ({str(error).strip().splitlines()[0]})") from error
        self._sent: Any = None
        self._unsent = Snapshot()

    def send(self, snapshot: Snapshot) -> bool:
        """Send a snapshot, unless the one before is still on its way; whether it was sent.

        What is not sent is not lost: the next snapshot has newer gauges and counters, and takes the observations along.
        """
        import ray

        snapshot = snapshot.after(self._unsent)
        if self._sent is not None and not ray.wait([self._sent], timeout=0)[0]:
            self._unsent = snapshot
            return False
        self._unsent = Snapshot()
        if self._sent is not None:
            with suppress(ray.exceptions.RayError):  # the actor was lost; an error nobody looks at would be printed
                ray.get(self._sent)
        self._sent = self._actor.record.options(enable_task_events=False).remote(snapshot)
        return True

    def close(self) -> None:
        """Let the actor go. Its gauges vanish from the endpoint within a minute, counters and histograms stay."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.kill(self._actor, no_restart=True)
