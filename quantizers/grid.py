"""Uniform grids: which values b bits can stand for. Shape letters: O out_features, I in_features, G groups.

A grid maps a code q in [0, 2**b - 1] to `scale * (q - zero)`. The conventions, with m = 2**b - 1:

gptq-asym          range [min(w, 0), max(w, 0)], scale = range / m, zero a whole number stored in b bits
                   (Frantar et al. 2023, arXiv:2210.17323, and its released code)
gptq-sym           range [-max|w|, max|w|], scale = range / m, zero 2**(b-1), stored nowhere
gptq-sym-released  the same with the released code's slip: a row or group without negative weights keeps 0 as its
                   lower end but not its zero, which clips everything above half of its range
gptaq-sym          scale = max|w| / (2**(b-1) - 1), zero 2**(b-1): the step is wider and max|w| is not clipped
                   (Li et al. 2025, arXiv:2504.02692)
sq-sym             the same values (Xiao et al. 2023, arXiv:2211.10438)
awq-asym           range [min(w), max(w)] without forcing 0 into it; zero clamped to the codes, so that groups of one
                   sign lose their offset, as released (Lin et al. 2023, arXiv:2306.00978); constant groups as gptq-asym

One bit is the binary grid: asymmetric conventions have the levels mean -+ mean|w - mean| (the zero is a stored float),
symmetric ones -+ mean|w| (zero is 1/2, stored nowhere); least squares (Rastegari et al. 2016, arXiv:1603.05279).
Scales never fall below the smallest number of their storage type; the released codes' floor of 1e-5 is not kept, since
weights may be smaller.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.errors import QuantizationError

PER_CHANNEL = 0
_SYMMETRIC = ("gptq-sym", "gptq-sym-released", "gptaq-sym", "sq-sym")
CONVENTIONS = ("gptq-asym", "awq-asym", *_SYMMETRIC)
_SHRINK_STEPS, _SHRINK_GRID, _ERROR_NORM = 80, 100, 2.4
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How the weights of one linear are discretized.

    Args:
        bits: bits per weight, 1 to 8.
        group_size: consecutive input columns that share a scale; 0 (`PER_CHANNEL`) is one scale per output row.
        convention: how range, scale and zero are chosen; see the module's docstring.
        mse_search: shrink the range by 1.00, 0.99, ... 0.21 and keep what gives the least sum of |error|**2.4
            (the search of GPTQ's quantizer, `--w_clip` in QuaRot and GPTAQ).
        scale_dtype: precision in which scales are stored. Scales are rounded to it before any error
            feedback, so what is evaluated is what is stored.
        tail_group: let the last group of a row be smaller where group_size does not divide in_features.
    Raises:
        QuantizationError: a value outside these rules.
    """

    bits: int
    group_size: int = PER_CHANNEL
    convention: str = "gptq-asym"
    mse_search: bool = False
    scale_dtype: str = "float16"
    tail_group: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        if not 1 <= self.bits <= 8:
            raise QuantizationError(f"bits = {self.bits} is outside 1 to 8")
        if self.group_size < 0:
            raise QuantizationError(f"group_size = {self.group_size} is negative; 0 means per channel")
        if self.convention not in CONVENTIONS:
            near = difflib.get_close_matches(self.convention, CONVENTIONS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise QuantizationError(f"convention = {self.convention!r} is none of {', '.join(CONVENTIONS)}{hint}")
        if self.mse_search and self.binary:
            raise QuantizationError("mse_search has no range to shrink at 1 bit; use 2 bits or more, or leave it out")
        if self.scale_dtype not in SCALE_DTYPES:
            raise QuantizationError(f"scale_dtype = {self.scale_dtype!r} is none of {', '.join(SCALE_DTYPES)}")

    @property
    def max_code(self) -> int:
        """The largest code, 2**bits - 1."""
        return (1 << self.bits) - 1

    @property
    def symmetric(self) -> bool:
        """Whether the zero is fixed and stored nowhere."""
        return self.convention in _SYMMETRIC

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
    low, high = _range(weight_OK, grid)
    scale, zero = _scale_and_zero(low, high, grid)
    if grid.mse_search:
        least = _error(weight_OK, scale, zero, grid)
        for step in range(1, _SHRINK_STEPS):
            shrink = 1 - step / _SHRINK_GRID
            shrunk_scale, shrunk_zero = _scale_and_zero(low * shrink, high * shrink, grid)
            error = _error(weight_OK, shrunk_scale, shrunk_zero, grid)
            better = error < least
            scale, zero = torch.where(better, shrunk_scale, scale), torch.where(better, shrunk_zero, zero)
            least = torch.minimum(error, least)
    return scale, zero


def _range(weight_OK: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    low, high = weight_OK.amin(-1), weight_OK.amax(-1)
    if grid.convention != "awq-asym":
        low, high = low.clamp(max=0), high.clamp(min=0)
    else:
        constant = low == high
        low, high = torch.where(constant, low.clamp(max=0), low), torch.where(constant, high.clamp(min=0), high)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    if grid.symmetric:
        reach = torch.maximum(-low, high)
        slips = (low == 0) if grid.convention == "gptq-sym-released" else torch.zeros_like(empty)
        low, high = torch.where(slips, 0.0, -reach), reach
    return low, high


def _scale_and_zero(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    if grid.symmetric:
        narrow = grid.convention in ("gptq-sym", "gptq-sym-released")
        scale = stored_scale((high - low) / grid.max_code if narrow else high / (grid.fixed_zero - 1), grid)
        return scale, torch.full_like(scale, grid.fixed_zero)
    scale = stored_scale((high - low) / grid.max_code, grid)
    return scale, torch.round(-low / scale).clamp(0, grid.max_code)


def _error(weight_OK: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    wide_scale, wide_zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    decoded = decode(encode(weight_OK, wide_scale, wide_zero, grid), wide_scale, wide_zero)
    return (decoded - weight_OK).abs().pow(_ERROR_NORM).sum(-1)


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
        remedy = "the weights are too large" if dtype == torch.float32 else "use scale_dtype: float32"
        raise QuantizationError(f"a scale of {scale.max().item():.3g} does not fit {grid.scale_dtype}; {remedy}")
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
        return (weight / scale).add_(zero).round_().clamp_(0, 1)
    return (weight / scale).round_().add_(zero).clamp_(0, grid.max_code)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The values that codes stand for, scale * (code - zero), in float32; shapes broadcast."""
    return scale * (codes - zero)


def round_to_grid(weight_OI: Tensor, grid: Grid) -> Tensor:
    """Each weight's nearest value on the grid that fits its group, in float32.

    Raises:
        QuantizationError: a scale overflows `grid.scale_dtype`.
    """
    out_features, in_features = weight_OI.shape
    whole = in_features // grid.group_columns(in_features) * grid.group_columns(in_features)
    rounded_OI = torch.empty_like(weight_OI)
    for columns, groups in ((slice(0, whole), whole // grid.group_columns(in_features)), (slice(whole, None), 1)):
        if (part := weight_OI[:, columns]).numel():
            grouped_OGK = part.reshape(out_features, groups, -1)
            scale, zero = (value.unsqueeze(-1) for value in fit_group(grouped_OGK, grid))
            rounded_OI[:, columns] = decode(encode(grouped_OGK, scale, zero, grid), scale, zero).flatten(1)
    return rounded_OI


def expand_groups(per_group_OG: Tensor, in_features: int, grid: Grid) -> Tensor:
    """Repeat per-group numbers over their columns: [O, G] -> [O, I], tail group included."""
    return per_group_OG.repeat_interleave(grid.group_columns(in_features), dim=1)[:, :in_features]
