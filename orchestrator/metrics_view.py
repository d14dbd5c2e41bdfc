"""A run as the cluster's metrics show it: one more `View`, beside the one on the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol

from cluster.metrics import Snapshot
from cluster.pool import Completion, WorkerInfo
from orchestrator.plan import Job, Plan
from orchestrator.schedule import Schedule
from orchestrator.telemetry import Telemetry
from orchestrator.view import TimeLeft, View

_SECONDS = 5.0  # between snapshots; Ray itself exports every ten


class Sink(Protocol):
    """Where snapshots go."""

    def send(self, snapshot: Snapshot) -> bool:
        """Take a snapshot, or not; returns at once."""


class MetricsView:
    """Passes everything on to another view, and a snapshot to the sink every few seconds."""

    def __init__(self, view: View, sink: Sink, sweep: str) -> None:
        """Stand before `view`.

        Args:
            sweep: its name, a tag of every metric.
        """
        self._view, self._sink, self._sweep = view, sink, sweep

    def begin(
        self, plan: Plan, schedule: Schedule, workers: Mapping[str, WorkerInfo], left: TimeLeft | None = None
    ) -> None:
        """Send the first snapshot."""
        self._telemetry = Telemetry(self._sweep, plan)
        self._workers, self._time_left = workers, left
        self._view.begin(plan, schedule, workers, left)
        self._send(schedule)

    def update(self, schedule: Schedule, activity: Mapping[str, str]) -> None:
        """Send one now and then."""
        self._view.update(schedule, activity)
        if time.monotonic() - self._sent_at >= _SECONDS:
            self._send(schedule)

    def attempted(self, job: Job, completion: Completion, *, retry: bool = False) -> None:
        """Count it."""
        self._telemetry.attempted(job, completion, retry=retry)
        self._view.attempted(job, completion, retry=retry)

    def warn(self, text: str) -> None:
        """Nothing but to pass it on."""
        self._view.warn(text)

    def end(self, schedule: Schedule) -> None:
        """Send the last one."""
        self._view.end(schedule)
        self._send(schedule)

    def _send(self, schedule: Schedule) -> None:
        self._sent_at = time.monotonic()
        remaining = self._time_left() if self._time_left is not None else None
        snapshot = self._telemetry.snapshot(schedule, self._workers, remaining=remaining)
        with suppress(Exception):  # whatever it is: a sweep does not end for want of its metrics
            self._sink.send(snapshot)
