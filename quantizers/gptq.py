"""GPTQ: round column by column, each time correcting the columns to come.

Source: Frantar et al. 2023, arXiv:2210.17323, algorithm 1. Shape letters: O out_features, I in_features, G groups,
B columns of a block. Columns are worked on as rows of the transposed weight, so that each is contiguous in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from quantizers.errors import QuantizationError
from quantizers.grid import Grid, decode, encode, fit_grid, fit_group
from quantizers.linalg import check_factorization, inverse_cholesky, without_unseen
from quantizers.method import LinearGroup, Method, MethodOutcome, Needs
from quantizers.uniform_weight import UniformWeight


class Asymmetry(Protocol):
    """What GPTAQ adds to GPTQ's column loop."""

    def forward(self, inverse_UII: Tensor, order: Tensor, unseen: Tensor) -> Tensor:
        """P, strictly upper triangular, in the order of the columns."""

    def carried(self, work_BO: Tensor, codes_BO: Tensor, scale_BO: Tensor, zero_BO: Tensor, grid: Grid) -> Tensor:
        """The column values that a block hands on to later blocks."""


@dataclass(frozen=True, kw_only=True)
class Gptq(Method):
    """GPTQ's options.

    Args:
        act_order: quantize columns in order of falling Hessian diagonal (the released code's --act-order).
        static_groups: fit every group's grid to the original weights, so that act-order keeps consecutive
            groups; otherwise a group's grid is fitted when its first column is reached, to the corrected weights.
        true_sequential: within a block, later linears see the quantized earlier ones (--true-sequential).
        damping: fraction of the mean Hessian diagonal added to the diagonal (--percdamp).
        factorization: `host` in float64, or `device` in float32; see `linalg.inverse_cholesky`.
        block_size: columns whose corrections are applied to the rest of the matrix at once; speed only.
        stale_groups: as in the released code, fit a dynamic group to the weights as they were when its block of
            columns began; this differs where groups are smaller than blocks.
    """

    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True
    damping: float = 0.01
    factorization: str = "host"
    block_size: int = 128
    stale_groups: bool = False

    name: ClassVar[str] = "gptq"
    code_version: ClassVar[str] = "gptq/2"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"corrected": {}, "as_published": {"stale_groups": True}}

    @property
    def needs(self) -> Needs:
        """The Hessian."""
        return replace(super().needs, hessian=True)

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            QuantizationError: a value outside its rule.
        """
        super().__post_init__()
        check_factorization(self.factorization)
        if not 0 < self.damping <= 1:
            raise QuantizationError(f"options.damping = {self.damping} must be above 0 and at most 1")
        if self.block_size < 1:
            raise QuantizationError(f"options.block_size = {self.block_size} must be at least 1")

    def stores_column_groups(self, in_features: int) -> bool:
        """Only where dynamic groups follow the activation order."""
        one_group = self.grid.group_columns(in_features) >= in_features
        return self.act_order and not self.static_groups and not one_group

    def quantize(self, group: LinearGroup) -> MethodOutcome:
        """Quantize linears that share an input as one stacked matrix: rows do not interact in GPTQ.

        Raises:
            QuantizationError: the Hessian cannot be factorized, or a scale overflows.
        """
        if group.statistics is None:
            raise AssertionError("GPTQ needs the statistics of its inputs")
        stacked, damping = gptq(torch.cat(list(group.weights)), group.statistics.require_hessian(), self)
        return MethodOutcome(weights=split_rows(stacked, group.weights), damping=damping)


def split_rows(stacked: UniformWeight, weights: Sequence[Tensor]) -> list[UniformWeight]:
    """Take a stacked matrix apart again: one quantized weight per original, in their order."""
    rows = [weight.shape[0] for weight in weights]
    zeros = [None] * len(rows) if stacked.zero_OG is None else torch.split(stacked.zero_OG, rows)
    parts = zip(torch.split(stacked.codes_OI, rows), torch.split(stacked.scale_OG, rows), zeros, strict=True)
    return [
        UniformWeight(
            grid=stacked.grid, codes_OI=codes, scale_OG=scale, zero_OG=zero, column_group_I=stacked.column_group_I
        )
        for codes, scale, zero in parts
    ]


def gptq(
    weight_OI: Tensor, hessian_II: Tensor, options: Gptq, asymmetry: Asymmetry | None = None
) -> tuple[UniformWeight, float]:
    """Quantize one matrix against the Hessian of its inputs.

    Args:
        weight_OI: finite float32 weights.
        hessian_II: symmetric positive semi-definite float32; not modified.
        asymmetry: what GPTAQ adds (see `gptaq.py`); None is GPTQ.
    Returns:
        the quantized weight, and the damping that was used.
    Raises:
        QuantizationError: the Hessian cannot be factorized, or a scale overflows.
    """
    grid = options.grid
    out_features, in_features = weight_OI.shape
    diagonal = hessian_II.diagonal()
    hessian_II, unseen = without_unseen(hessian_II)
    weight_OI = weight_OI.masked_fill(unseen, 0.0)

    if options.act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    else:
        order = torch.arange(in_features, device=weight_OI.device)
    inverse_UII, damping = inverse_cholesky(hessian_II[order][:, order], options.damping, options.factorization)
    forward_PII = asymmetry.forward(inverse_UII, order, unseen) if asymmetry else None

    size = grid.group_columns(in_features)
    static = options.static_groups or size >= in_features
    # With static groups a column keeps the group of its original place; otherwise groups follow the order.
    place = order if static else torch.arange(in_features, device=order.device)
    column_group_I = torch.div(place, size, rounding_mode="floor").tolist()
    if static:
        scale_OG, zero_OG = fit_grid(weight_OI, grid)
    else:
        scale_OG = torch.empty((out_features, grid.num_groups(in_features)), device=weight_OI.device)
        zero_OG = torch.empty_like(scale_OG)
    scale_GO, zero_GO = scale_OG.T.contiguous(), zero_OG.T.contiguous()

    work_IO = weight_OI.T[order].contiguous()
    codes_IO = torch.empty_like(work_IO)
    for start, stop in _blocks(in_features, options.block_size, None if static or options.stale_groups else size):
        for first in () if static else range(-(-start // size) * size, stop, size):  # groups that begin here
            scale, zero = fit_group(work_IO[first : first + size].T, grid)
            scale_GO[first // size], zero_GO[first // size] = scale, zero
        scale_BO, zero_BO = scale_GO[column_group_I[start:stop]], zero_GO[column_group_I[start:stop]]
        error_BO = quantize_columns(
            work_IO[start:stop],
            codes_IO[start:stop],
            inverse_UII[start:stop, start:stop],
            None if forward_PII is None else forward_PII[start:stop, start:stop],
            scale_BO,
            zero_BO,
            grid,
        )
        work_IO[stop:].addmm_(inverse_UII[start:stop, stop:].T, error_BO, alpha=-1)
        if asymmetry and forward_PII is not None:
            carried_BO = asymmetry.carried(work_IO[start:stop], codes_IO[start:stop], scale_BO, zero_BO, grid)
            work_IO[stop:].addmm_(forward_PII[start:stop, stop:].T, carried_BO)

    codes_OI = torch.empty((out_features, in_features), dtype=torch.uint8, device=weight_OI.device)
    codes_OI[:, order] = codes_IO.T.to(torch.uint8)
    group_of_column = torch.empty(in_features, dtype=torch.int32, device=order.device)
    group_of_column[order] = torch.tensor(column_group_I, dtype=torch.int32, device=order.device)
    return (
        UniformWeight(
            grid=grid,
            codes_OI=codes_OI,
            scale_OG=scale_GO.T.contiguous(),
            zero_OG=None if grid.symmetric else zero_GO.T.contiguous(),
            column_group_I=group_of_column if options.stores_column_groups(in_features) else None,
        ),
        damping,
    )


def _blocks(in_features: int, block_size: int, group_size: int | None) -> Iterator[tuple[int, int]]:
    """Ranges of columns; with dynamic groups every group starts a range, so that its grid is fitted to
    weights that all earlier columns have corrected."""
    span = group_size or in_features
    for group in range(0, in_features, span):
        end = min(group + span, in_features)
        for start in range(group, end, block_size):
            yield start, min(start + block_size, end)


def quantize_columns(
    work_BO: Tensor,
    codes_BO: Tensor,
    inverse_BB: Tensor,
    forward_BB: Tensor | None,
    scale_BO: Tensor,
    zero_BO: Tensor,
    grid: Grid,
) -> Tensor:
    """Quantize a block's columns in turn, in place; return the scaled errors (algorithm 1, inner loop).

    Afterwards `work_BO` holds each column as it was when it was quantized.
    """
    error_BO = torch.empty_like(work_BO)
    for i in range(work_BO.shape[0]):
        if i:  # the corrections by all earlier columns of the block, as matrix-vector products
            work_BO[i].addmv_(error_BO[:i].T, inverse_BB[:i, i], alpha=-1)
            if forward_BB is not None:
                work_BO[i].addmv_(work_BO[:i].T, forward_BB[:i, i])
        codes = encode(work_BO[i], scale_BO[i], zero_BO[i], grid)
        codes_BO[i] = codes
        error_BO[i] = (work_BO[i] - decode(codes, scale_BO[i], zero_BO[i])) / inverse_BB[i, i]
    return error_BO
