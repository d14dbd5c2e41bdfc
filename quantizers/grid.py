"""Uniform grids: which values b bits can stand for. Shape letters: O out_features, I in_features, G groups.

A grid maps a code q in [0, 2**b - 1] to `scale * (q - zero)`. Three conventions:

asymmetric  zero is a whole number fitted to the data and stored in b bits
            (range forced to contain 0, so 0.0 is representable; Frantar et al. 2023, arXiv:2210.17323)
symmetric   zero is 2**(b-1), stored nowhere; the range is [-max|w|, max|w|]
binary      b = 1: the two levels are mean -+ mean|w - mean| (asymmetric: the zero is a stored float) or
            -+ mean|w| (symmetric: zero is 1/2, stored nowhere); least squares (Rastegari et al. 2016, arXiv:1603.05279)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.errors import QuantizationError

PER_CHANNEL = 0
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How the weights of one linear are discretized.

    Args:
        bits: bits per weight, 1 to 8.
        group_size: consecutive input columns that share a scale; 0 (`PER_CHANNEL`) is one scale per output row.
        symmetric: no stored zero; see the module's docstring.
        scale_dtype: precision in which scales are stored. Scales are rounded to it before any error
            feedback, so what is evaluated is what is stored.
        tail_group: let the last group of a row be smaller where group_size does not divide in_features.
    Raises:
        QuantizationError: a value outside these rules.
    """

    bits: int
    group_size: int = PER_CHANNEL
    symmetric: bool = False
    scale_dtype: str = "float16"
    tail_group: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        if not 1 <= self.bits <= 8:
            raise QuantizationError(f"bits = {self.bits} is outside 1 to 8")
        if self.group_size < 0:
            raise QuantizationError(f"group_size = {self.group_size} is negative; 0 means per channel")
        if self.scale_dtype not in SCALE_DTYPES:
            raise QuantizationError(f"scale_dtype = {self.scale_dtype!r} is none of {', '.join(SCALE_DTYPES)}")

    @property
    def max_code(self) -> int:
        """The largest code, 2**bits - 1."""
        return (1 << self.bits) - 1

    @property
    def binary(self) -> bool:
        """Whether this is the two-level grid of b = 1."""
        return self.bits == 1

    @property
    def fixed_zero(self) -> float:
        """The zero of a symmetric grid, in code units."""
        return 0.5 if self.binary else float(1 << (self.bits - 1))

    def group_columns(self, in_features: int) -> int:
        """Columns per group on a linear with this many inputs (per channel: all of them)."""
        return self.group_size or in_features

    def num_groups(self, in_features: int) -> int:
        """Groups per output row, a tail group included."""
        return -(-in_features // self.group_columns(in_features))

    def check_fits(self, in_features: int, layer: str) -> None:
        """Raise unless the group size suits a linear with this many inputs.

        Raises:
            QuantizationError: names the layer and the group sizes that would fit.
        """
        size = self.group_size
        if size == PER_CHANNEL or in_features % size == 0:
            return
        if size > in_features:
            raise QuantizationError(
                f"group_size = {size} is larger than the {in_features} inputs of {layer}; "
                f"use {fitting_group_sizes(in_features)} or per_channel"
            )
        if not self.tail_group:
            raise QuantizationError(
                f"group_size = {size} does not divide the {in_features} inputs of {layer}; use "
                f"{fitting_group_sizes(in_features)} or per_channel, or set tail_group: true for a smaller last group"
            )


def fitting_group_sizes(in_features: int) -> str:
    """The usual group sizes that divide `in_features`, as words for a message ("64 or 32")."""
    sizes = [str(size) for size in (256, 128, 96, 64, 48, 32, 16, 8) if in_features % size == 0]
    return " or ".join(sizes[:3]) or "1"


def fit_group(weight_OK: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Fit one grid to each row of a group of columns.

    Args:
        weight_OK: finite float32 weights, any leading shape; the last dimension shares one scale.
        grid: the convention and the bits.
    Returns:
        scale_O: float32 > 0, exactly representable in `grid.scale_dtype`; weight units per code step.
        zero_O: float32, the (possibly fractional, for binary) code that stands for 0.0.
    Raises:
        QuantizationError: a scale overflows `grid.scale_dtype`.
    """
    if grid.binary:
        return _fit_binary(weight_OK, grid)
    if grid.symmetric:
        reach = weight_OK.abs().amax(-1)
        reach = torch.where(reach == 0, torch.ones_like(reach), reach)
        scale = stored_scale(2 * reach / grid.max_code, grid)
        return scale, torch.full_like(scale, grid.fixed_zero)
    low = weight_OK.amin(-1).clamp(max=0)
    high = weight_OK.amax(-1).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = stored_scale((high - low) / grid.max_code, grid)
    return scale, torch.round(-low / scale).clamp(0, grid.max_code)


def _fit_binary(weight_OK: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    mean = torch.zeros_like(weight_OK[..., 0]) if grid.symmetric else weight_OK.mean(-1)
    spread = (weight_OK - mean.unsqueeze(-1)).abs().mean(-1)
    if grid.symmetric:  # a row of zeros gets the smallest scale: no level is 0
        scale = stored_scale(2 * spread, grid)
        return scale, torch.full_like(scale, grid.fixed_zero)
    # A constant row has no spread: one of its two levels is the constant itself, the other is 0.
    constant = spread <= mean.abs() * 1e-4
    magnitude = torch.where(mean == 0, torch.ones_like(mean), mean.abs())
    scale = stored_scale(torch.where(constant, magnitude, 2 * spread), grid)
    zero = torch.where(constant, (mean < 0).to(mean.dtype), 0.5 - mean / scale)
    return scale, zero.to(SCALE_DTYPES[grid.scale_dtype]).float()


def stored_scale(scale: Tensor, grid: Grid) -> Tensor:
    """Round scales to the precision they are stored in; never to zero.

    Raises:
        QuantizationError: a scale is too large for `grid.scale_dtype`.
    """
    dtype = SCALE_DTYPES[grid.scale_dtype]
    rounded = scale.to(dtype).float()
    if torch.isinf(rounded).any():
        raise QuantizationError(
            f"a scale of {scale.max().item():.3g} does not fit {grid.scale_dtype}; use scale_dtype: float32"
        )
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # Not below float32's normal numbers: accelerators that flush the others to zero would divide by zero.
    return rounded.clamp(min=max(smallest, torch.finfo(torch.float32).smallest_normal))


def fit_grid(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Fit one grid per (output row, input group).

    Args:
        weight_OI: finite float32 weights.
    Returns:
        scale_OG, zero_OG: as in `fit_group`; G = `grid.num_groups(I)`.
    Raises:
        QuantizationError: a scale overflows `grid.scale_dtype`.
    """
    out_features, in_features = weight_OI.shape
    size = grid.group_columns(in_features)
    whole = in_features // size * size
    scale, zero = fit_group(weight_OI[:, :whole].reshape(out_features, -1, size), grid)
    if whole < in_features:
        tail_scale, tail_zero = fit_group(weight_OI[:, None, whole:], grid)
        scale, zero = torch.cat([scale, tail_scale], 1), torch.cat([zero, tail_zero], 1)
    return scale, zero


def encode(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Codes of the nearest grid values (float32, whole numbers in [0, max_code]); shapes broadcast."""
    if grid.binary:  # the zero is fractional, so it must be added before rounding
        return torch.round(weight / scale + zero).clamp_(0, 1)
    return (torch.round(weight / scale) + zero).clamp_(0, grid.max_code)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The values that codes stand for, scale * (code - zero), in float32; shapes broadcast."""
    return scale * (codes - zero)


def expand_groups(per_group_OG: Tensor, in_features: int, grid: Grid) -> Tensor:
    """Repeat per-group numbers over their columns: [O, G] -> [O, I], tail group included."""
    return per_group_OG.repeat_interleave(grid.group_columns(in_features), dim=1)[:, :in_features]
