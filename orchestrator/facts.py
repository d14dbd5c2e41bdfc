"""What a worker did besides its result, such as loading a model, and what it warns of besides what it measured: plain
data in an outcome, rows in the events table.

They tell what was shared and what was done again. No job begins or ends with them, so whoever asks how a job stands
leaves them out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

MODEL_LOADED = "model_loaded"
STATISTICS_COMPUTED, STATISTICS_READ = "statistics_computed", "statistics_read"
REFERENCE_COMPUTED, REFERENCE_READ = "reference_computed", "reference_read"
ARTIFACT_MADE = "artifact_made"
FACTS = (
    MODEL_LOADED,
    STATISTICS_COMPUTED,
    STATISTICS_READ,
    REFERENCE_COMPUTED,
    REFERENCE_READ,
    ARTIFACT_MADE,
)  # the `event` of each
_FACTS, _TROUBLES = "facts", "troubles"  # in an outcome


class Facts:
    """Gathers those of one job."""

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self._all: list[dict[str, Any]] = []
        self._troubles: list[str] = []

    def add(self, event: str, started: float) -> None:
        """Something has happened.

        Args:
            event: one of `FACTS`.
            started: when it began, by `time.perf_counter`.
        """
        self._all.append({"event": event, "seconds": time.perf_counter() - started})

    def warn(self, text: str) -> None:
        """Something was wrong that the job could do without."""
        self._troubles.append(text)

    def beside(self, outcome: Mapping[str, Any]) -> dict[str, Any]:
        """An outcome with what happened."""
        return {**outcome, _FACTS: self._all, _TROUBLES: self._troubles}


def facts_of(outcome: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What an outcome tells besides its result; nothing where its worker tells nothing."""
    return list(outcome.get(_FACTS, ()))


def troubles_of(outcome: Mapping[str, Any]) -> list[str]:
    """What its worker warns of, besides warnings of what was measured."""
    return list(outcome.get(_TROUBLES, ()))


def without_facts(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured, alone: what is kept of an outcome for later must not tell again what happened once."""
    return {name: value for name, value in outcome.items() if name not in {_FACTS, _TROUBLES}}
