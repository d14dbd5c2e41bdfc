"""The workers of a search: requests go to whoever is idle, and come back in order, whatever becomes of workers."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence

from cluster.failures import Attempts, Failure
from cluster.pool import Completion, Pool
from orchestrator.errors import BitatlasError
from orchestrator.search.worker import Request, Setting, probe_payload

_POLL_SECONDS = 0.5
_JOBS_PER_WORKER = 4  # so that none waits long for the last one
Losses = list[tuple[float, ...]]
"""(divergence, nll), or of a task (cross entropy,), of each window of a request."""


class InterruptedSearchError(Exception):
    """The search was told to stop; what is recorded stays."""


class _Job:
    def __init__(self, places: Sequence[int]) -> None:
        self.places = places
        self.attempts = Attempts()
        self.avoid: frozenset[str] = frozenset()


class Crew:
    """Measures requests on a pool."""

    def __init__(
        self, pool: Pool, setting: Setting, *, stop: threading.Event, told: Callable[[int], None] = lambda _: None
    ) -> None:
        """Ready for requests.

        Args:
            stop: when it is set, `measure` raises `InterruptedSearchError` as soon as it can.
            told: called with how many windows have come back, each time.
        """
        self._pool, self._setting, self._stop, self._told = pool, setting, stop, told

    @property
    def size(self) -> int:
        """How many workers there are now; at least 1."""
        return max(1, len(self._pool.workers))

    def measure(self, requests: Sequence[Request], label: str) -> list[Losses]:
        """Losses of every request, in order.

        Args:
            label: what to call the jobs: "search-demo 3.6 bits: generation 4".
        Raises:
            BitatlasError: a request fails again and again; what went wrong, with the worker.
            InterruptedSearchError: the search is to stop.
        """
        found: list[Losses | None] = [None] * len(requests)
        waiting, running = deque(self._jobs(len(requests))), dict[str, _Job]()
        while waiting or running:
            if self._stop.is_set():
                raise InterruptedSearchError
            self._hand_out(waiting, running, requests, label)
            for completion in self._pool.wait(_POLL_SECONDS):
                job = running.pop(completion.worker, None)
                if job is None:
                    continue  # of an earlier call that was interrupted
                if completion.failure is not None:
                    self._again(job, completion, completion.failure)
                    waiting.appendleft(job)
                    continue
                for place, losses in zip(job.places, completion.result["losses"], strict=True):
                    found[place] = losses
                self._told(sum(len(requests[place].windows) for place in job.places))
            self._pool.changes()
        return [losses for losses in found if losses is not None]

    def _jobs(self, count: int) -> list[_Job]:
        """Neighbours together, as they differ in few linears."""
        size = max(1, math.ceil(count / (_JOBS_PER_WORKER * self.size)))
        return [_Job(range(start, min(start + size, count))) for start in range(0, count, size)]

    def _hand_out(
        self, waiting: deque[_Job], running: dict[str, _Job], requests: Sequence[Request], label: str
    ) -> None:
        workers = self._pool.workers
        for worker in sorted(set(workers) - set(running)):
            job = next((job for job in waiting if worker not in job.avoid or job.avoid >= set(workers)), None)
            if job is None:
                continue
            waiting.remove(job)
            running[worker] = job
            chosen = [requests[place] for place in job.places]
            self._pool.submit(worker, probe_payload(self._setting, chosen, label, job.attempts.memory_share()))

    def _again(self, job: _Job, completion: Completion, failure: Failure) -> None:
        """Let a job be tried again, or give up."""
        job.attempts.add(failure, completion.worker)
        if failure.policy.stops_sweep or failure.kind == "damaged" or not job.attempts.retry(failure):
            final = job.attempts.final(failure)
            raise BitatlasError(
                f"a worker could not measure an allocation ({final.kind}: {final.message}); what is recorded is kept: "
                "mend that, and run the same command again"
            )
        job.avoid = job.attempts.avoid(failure)
