"""What the engine asks of a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quantizers.errors import QuantizationError
from quantizers.grid import Grid
from quantizers.quantized_weight import QuantizedWeight
from quantizers.statistics import InputStatistics


@dataclass(frozen=True, kw_only=True)
class MethodOutcome:
    """What a method made of the linears of one stage.

    Args:
        weights: one per linear, in the order given.
        damping: the rung of the damping ladder that factorized; None where nothing was factorized.
    """

    weights: list[QuantizedWeight]
    damping: float | None


@dataclass(frozen=True, kw_only=True)
class Folding:
    """Options of every weight method that can take up earlier layers' errors (QEP, see `folding.py`).

    Args:
        fold: strength, 0 (off) to 1.
        fold_damping: fraction of the mean Hessian diagonal added before solving.
    """

    fold: float = 0.0
    fold_damping: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            QuantizationError: a value outside its rule.
        """
        if not 0 <= self.fold <= 1:
            raise QuantizationError(f"options.fold = {self.fold} must be from 0 to 1")
        if self.fold_damping <= 0:
            raise QuantizationError(f"options.fold_damping = {self.fold_damping} must be above 0")


class Method(Protocol):
    """A quantization method with its options: a frozen dataclass, no tensors."""

    @property
    def grid(self) -> Grid:
        """The grid it quantizes to."""

    @property
    def fold(self) -> float:
        """Strength of error folding; 0 is off."""

    @property
    def fold_damping(self) -> float:
        """Damping of error folding."""

    @property
    def code_version(self) -> str:
        """Changes whenever the same input gives another output; part of a job's identity."""

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration data must stream through the model."""

    @property
    def needs_drift(self) -> bool:
        """Whether the float model must run beside the quantized one."""

    @property
    def true_sequential(self) -> bool:
        """Whether a stage sees the quantized weights of the earlier stages of its own block."""

    def stores_column_groups(self, in_features: int) -> bool:
        """Whether its artifacts of such linears carry a group index per column."""

    def quantize(self, weights: Sequence[Tensor], statistics: InputStatistics | None) -> MethodOutcome:
        """Quantize linears that share an input.

        Args:
            weights: finite float32 [O, I] tensors with equal I.
            statistics: of their shared input; None where `needs_calibration` is false.
        """
