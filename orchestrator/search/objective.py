"""The loss of mixtures on windows, each measured once, with a count of what that took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from orchestrator.search.config import ObjectiveName
from orchestrator.search.crew import Losses
from orchestrator.search.mixtures import Mixture
from orchestrator.search.worker import Request


class Measuring(Protocol):
    """What a `Crew` does."""

    @property
    def size(self) -> int:
        """How many workers there are."""

    def measure(self, requests: Sequence[Request], label: str) -> list[Losses]:
        """Losses of every request, in order."""


class Objective:
    """Losses over search windows and over guard windows.

    Attributes:
        window_forwards: windows that were run so far.
    """

    def __init__(self, crew: Measuring, kind: ObjectiveName, *, windows: int, guard_windows: int) -> None:
        """Nothing is measured yet.

        Args:
            windows: the first so many windows are the search's.
            guard_windows: the next so many are the guard's.
        """
        self._crew, self._kind = crew, kind
        self.windows, self.guard_windows = windows, guard_windows
        self._known: dict[Mixture, dict[int, tuple[float, ...]]] = {}
        self.window_forwards = 0

    def losses(
        self, mixtures: Sequence[Mixture], windows: int, label: str, *, base: Mixture | None = None
    ) -> list[float]:
        """Over the first so many search windows.

        Args:
            base: what the mixtures share their first blocks with.
        """
        return self._over(mixtures, range(windows), label, base)

    def guard_losses(self, mixtures: Sequence[Mixture], label: str) -> list[float]:
        """Over the guard windows."""
        return self._over(mixtures, range(self.windows, self.windows + self.guard_windows), label, None)

    def _over(
        self, mixtures: Sequence[Mixture], windows: Sequence[int], label: str, base: Mixture | None
    ) -> list[float]:
        requests = self._missing(list(dict.fromkeys(mixtures)), windows, base)
        for request, losses in zip(requests, self._crew.measure(requests, label), strict=True):
            known = self._known.setdefault(request.mixture, {})
            known.update(zip(request.windows, losses, strict=True))
            self.window_forwards += len(request.windows)
        return [self._mean(mixture, windows) for mixture in mixtures]

    def _missing(self, mixtures: Sequence[Mixture], windows: Sequence[int], base: Mixture | None) -> list[Request]:
        """What was not measured yet; of few mixtures the windows are parted, so that every worker has some."""
        requests = []
        parts = max(1, math.ceil(self._crew.size / len(mixtures))) if mixtures else 1
        for mixture in mixtures:
            missing = [window for window in windows if window not in self._known.get(mixture, {})]
            size = math.ceil(len(missing) / parts)
            requests += [
                Request(mixture=mixture, windows=tuple(missing[start : start + size]), base=base)
                for start in range(0, len(missing), max(1, size))
            ]
        return requests

    def _mean(self, mixture: Mixture, windows: Sequence[int]) -> float:
        known = self._known[mixture]
        if self._kind != "perplexity":  # a divergence, or a cross entropy
            return math.fsum(known[window][0] for window in windows) / len(windows)
        mean = math.fsum(known[window][1] for window in windows) / len(windows)
        return math.exp(mean) if mean < 700 else math.inf
