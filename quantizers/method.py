"""What the engine asks of a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quantizers.grid import Grid
from quantizers.quantized_weight import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class MethodOutcome:
    """What a method made of the linears of one stage.

    Args:
        weights: one per linear, in the order given.
        damping: the rung of the damping ladder that factorized; None where nothing was factorized.
    """

    weights: list[QuantizedWeight]
    damping: float | None


class Method(Protocol):
    """A quantization method with its options: a frozen dataclass, no tensors."""

    @property
    def grid(self) -> Grid:
        """The grid it quantizes to."""

    @property
    def code_version(self) -> str:
        """Changes whenever the same input gives another output; part of a job's identity."""

    @property
    def needs_hessian(self) -> bool:
        """Whether calibration data must stream through the model."""

    @property
    def true_sequential(self) -> bool:
        """Whether a stage sees the quantized weights of the earlier stages of its own block."""

    def stores_column_groups(self, in_features: int) -> bool:
        """Whether its artifacts of such linears carry a group index per column."""

    def quantize(self, weights: Sequence[Tensor], hessian_II: Tensor | None) -> MethodOutcome:
        """Quantize linears that share an input.

        Args:
            weights: finite float32 [O, I] tensors with equal I.
            hessian_II: `statistics.Hessian.value()` of their shared input; None where `needs_hessian` is false.
        """
