"""Quantized activations, simulated: rounded to their grid and back. Shape letters: T tokens, I channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from quantizers.errors import QuantizationError

GRANULARITIES = ("per_token", "per_tensor")
_SMALLEST_SCALE = 1e-5  # as in the released SmoothQuant and GPTAQ codes


@dataclass(frozen=True, kw_only=True)
class ActivationGrid:
    """How the activations that enter (or leave) a linear are discretized.

    Args:
        bits: 2 to 8.
        symmetric: codes -(2**(b-1)-1) to 2**(b-1)-1 over [-max|x|, max|x|]; otherwise 0 to 2**b-1 over the range
            from min to max, forced to contain 0.
        granularity: `per_token`, one scale per token, found as it passes (dynamic); `per_tensor`, one scale for
            all tokens, fixed from calibration (static).
        clip_ratio: the range is shrunk by this factor first, 0 to 1.
    """

    bits: int
    symmetric: bool = True
    granularity: str = "per_token"
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            QuantizationError: a value outside its rule.
        """
        if not 2 <= self.bits <= 8:
            raise QuantizationError(f"activation_bits = {self.bits} is outside 2 to 8 (16 leaves activations alone)")
        if self.granularity not in GRANULARITIES:
            raise QuantizationError(
                f"activation_granularity = {self.granularity!r} is none of {', '.join(GRANULARITIES)}"
            )
        if not 0 < self.clip_ratio <= 1:
            raise QuantizationError(f"activation_clip_ratio = {self.clip_ratio} must be above 0 and at most 1")

    @property
    def static(self) -> bool:
        """Whether scales are fixed from calibration."""
        return self.granularity == "per_tensor"

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of ranges from `low` to `high`, float32, of any (equal) shape."""
        low, high = low.float() * self.clip_ratio, high.float() * self.clip_ratio
        if self.symmetric:
            scale = torch.maximum(-low, high) / ((1 << (self.bits - 1)) - 1)
            return scale.clamp(min=_SMALLEST_SCALE), torch.zeros_like(scale)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / ((1 << self.bits) - 1)).clamp(min=_SMALLEST_SCALE)
        return scale, torch.round(-low / scale)

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the largest code."""
        if self.symmetric:
            largest = (1 << (self.bits - 1)) - 1
            return -largest, largest
        return 0, (1 << self.bits) - 1


@dataclass(frozen=True, kw_only=True)
class ActivationQuantizer:
    """An activation grid at one place of a model, with its scale where that is fixed.

    Args:
        grid: the convention and the bits.
        scale: float32 scalar of a static grid; None where each token has its own.
        zero: float32 whole number, likewise.
    """

    grid: ActivationGrid
    scale: Tensor | None = None
    zero: Tensor | None = None

    @classmethod
    def calibrated(cls, grid: ActivationGrid, low_I: Tensor, high_I: Tensor) -> Self:
        """For a place whose channels ranged from `low_I` to `high_I` in calibration; dynamic grids need no range."""
        if not grid.static:
            return cls(grid=grid)
        scale, zero = grid.fit(low_I.min(), high_I.max())
        return cls(grid=grid, scale=scale, zero=zero)

    def __call__(self, values: Tensor) -> Tensor:
        """Round to the grid and back, in float32, returned in the values' dtype; NaN and infinity pass through."""
        wide = values.float()
        if self.scale is None or self.zero is None:
            scale, zero = self.grid.fit(wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True))
        else:
            scale, zero = self.scale.to(values.device), self.zero.to(values.device)
        least, largest = self.grid.ends
        codes = (torch.round(wide / scale) + zero).clamp_(least, largest)
        rounded = (codes - zero) * scale
        if self.grid.static:  # a fixed scale would clamp infinity and so hide an overflow
            rounded = torch.where(wide.isinf(), wide, rounded)
        return rounded.to(values.dtype)

    def spec(self) -> dict[str, Any]:
        """As JSON values."""
        grid = self.grid
        known: dict[str, Any] = {
            "bits": grid.bits,
            "symmetric": grid.symmetric,
            "granularity": grid.granularity,
            "clip_ratio": grid.clip_ratio,
        }
        if self.scale is not None and self.zero is not None:
            known |= {"scale": self.scale.item(), "zero": self.zero.item()}
        return known

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """Undo `spec`."""
        fields = dict(spec)
        scale, zero = fields.pop("scale", None), fields.pop("zero", None)
        made = cls(grid=ActivationGrid(**fields))
        if scale is None:
            return made
        return replace(made, scale=torch.tensor(scale), zero=torch.tensor(zero))
