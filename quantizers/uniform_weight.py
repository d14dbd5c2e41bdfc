"""Uniform encoding of a linear: codes, scales and zeros, and what they cost in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantizers import packing
from quantizers.grid import SCALE_DTYPES, Grid, decode, expand_groups


@dataclass(frozen=True, kw_only=True)
class UniformWeight:
    """A linear on uniform grids of one bit-width.

    Args:
        grid: how codes become values.
        codes_OI: uint8 codes, in the weight's own column order.
        scale_OG: float32, each value exactly representable in `grid.scale_dtype`.
        zero_OG: float32 zeros in code units; None where the grid fixes the zero (symmetric).
        column_group_I: int32 group of each input column; None where groups are consecutive columns.
    """

    grid: Grid
    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    column_group_I: Tensor | None = None

    encoding: ClassVar[str] = "uniform"
    published_bits_per_weight: ClassVar[float | None] = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes_OI.shape[0], self.codes_OI.shape[1]

    def decode(self) -> Tensor:
        """The float32 [O, I] weight that the codes stand for."""
        zero_OG = torch.full_like(self.scale_OG, self.grid.fixed_zero) if self.zero_OG is None else self.zero_OG
        return decode(self.codes_OI.float(), self._per_column(self.scale_OG), self._per_column(zero_OG))

    def _per_column(self, per_group_OG: Tensor) -> Tensor:
        if self.column_group_I is not None:
            return per_group_OG[:, self.column_group_I.long()]
        return expand_groups(per_group_OG, self.codes_OI.shape[1], self.grid)

    def pack(self) -> dict[str, Tensor]:
        """The tensors as stored, on the host: `codes`, `scale`, and where needed `zero` and `column_group`."""
        dtype = SCALE_DTYPES[self.grid.scale_dtype]
        tensors = {
            "codes": packing.pack(self.codes_OI, self.grid.bits),
            "scale": self.scale_OG.to("cpu", dtype),
        }
        if self.zero_OG is not None:
            tensors["zero"] = (
                self.zero_OG.to("cpu", dtype)
                if self.grid.binary
                else packing.pack(self.zero_OG.to("cpu", torch.uint8), self.grid.bits)
            )
        if self.column_group_I is not None:
            tensors["column_group"] = self.column_group_I.to("cpu", torch.int32)
        return tensors

    def spec(self) -> dict[str, Any]:
        """The grid."""
        return {"grid": dataclasses.asdict(self.grid)}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], spec: Mapping[str, Any], shape: tuple[int, int]) -> UniformWeight:
        """Undo `pack`."""
        grid, in_features = Grid(**spec["grid"]), shape[1]
        zero = tensors.get("zero")
        if zero is not None:
            num_groups = grid.num_groups(in_features)
            zero = zero.float() if grid.binary else packing.unpack(zero, grid.bits, num_groups).float()
        return cls(
            grid=grid,
            codes_OI=packing.unpack(tensors["codes"], grid.bits, in_features),
            scale_OG=tensors["scale"].float(),
            zero_OG=zero,
            column_group_I=tensors.get("column_group"),
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything `pack` returns."""
        return stored_bytes(self.grid, *self.codes_OI.shape, permuted=self.column_group_I is not None)


def stored_bytes(grid: Grid, out_features: int, in_features: int, *, permuted: bool = False) -> int:
    """Bytes that a linear of this shape takes: codes, scales, zeros and column groups, row padding included."""
    groups = grid.num_groups(in_features)
    scale_bytes = SCALE_DTYPES[grid.scale_dtype].itemsize * groups
    per_row = packing.packed_columns(in_features, grid.bits) + scale_bytes
    if not grid.symmetric:
        per_row += scale_bytes if grid.binary else packing.packed_columns(groups, grid.bits)
    return out_features * per_row + (4 * in_features if permuted else 0)
