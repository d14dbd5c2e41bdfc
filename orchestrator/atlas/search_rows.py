"""What the atlas knows of a search: its space, what was measured, what was chosen. Plain data, no IO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TypeGuard

    from orchestrator.search.space import Allocation, Space

FP_BASE = "fp"


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether there is a number, and it is one."""
    return value is not None and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """One choice of one group, measured alone; `loss` may be non-finite."""

    base: str  # what all other groups are
    group: str
    weight_bits: int
    group_size: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One allocation that a study measured."""

    number: int
    state: str  # complete | pruned | failed
    loss: float | None
    guard_loss: float | None
    stored_bytes: int | None
    bits_per_weight: float | None
    allocation: Allocation | None
    window_forwards: int | None  # by the whole study so far
    seconds: float | None

    @property
    def counts(self) -> bool:
        """Whether it was measured on all windows and came out as a number."""
        return self.state == "complete" and is_finite(self.loss)


@dataclass(frozen=True, kw_only=True)
class Point:
    """An allocation that stands for something: a start, or what was chosen; `name` of a start."""

    name: str
    allocation: Allocation | None
    stored_bytes: int | None
    bits_per_weight: float | None
    loss: float | None
    guard_loss: float | None
    cell: str = ""  # of the sweep, where it is one


@dataclass(frozen=True, kw_only=True)
class Study:
    """One budget's search, or one over all sizes at once."""

    name: str
    sampler: str
    budget_bytes: int | None
    chosen: Point | None  # None while it runs, and of a search over all sizes
    front: tuple[Point, ...]  # of a search over all sizes
    starts: tuple[Point, ...]
    tried: int
    window_forwards: int | None
    seconds: float | None
    stopped: str
    trials: tuple[Trial, ...]

    @property
    def ended(self) -> bool:
        """Whether something was chosen."""
        return self.chosen is not None or bool(self.front)

    @property
    def picked(self) -> list[Point]:
        """Of a front, what stands out: the allocations that were measured further; where none was, all of them."""
        front = sorted(self.front, key=lambda point: point.bits_per_weight or 0.0)
        return [point for point in front if point.cell or point.guard_loss is not None] or front

    @property
    def best(self) -> Point | None:
        """The best complete trial so far, while nothing is chosen."""
        complete = [trial for trial in self.trials if trial.counts]
        if not complete:
            return None
        trial = min(complete, key=lambda trial: (trial.loss or 0.0, trial.number))
        return Point(
            name=f"trial {trial.number}",
            allocation=trial.allocation,
            stored_bytes=trial.stored_bytes,
            bits_per_weight=trial.bits_per_weight,
            loss=trial.loss,
            guard_loss=trial.guard_loss,
        )


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search as its files tell it; what they do not tell yet is empty."""

    name: str
    model: str
    objective: str  # kl_divergence | perplexity | "" where nothing says it yet
    num_windows: int | None
    guard_windows: int | None
    space: Space | None
    sensitivities: tuple[Sensitivity, ...]  # each choice once
    studies: tuple[Study, ...]

    @property
    def bases(self) -> list[str]:
        """What sensitivities were measured on top of, the float model first."""
        found = dict.fromkeys(row.base for row in self.sensitivities)
        return sorted(found, key=lambda base: base != FP_BASE)
