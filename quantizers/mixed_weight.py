"""Mixed encoding of a linear: uniform grids whose bit-width is each group's own.

A group is consecutive input columns of all rows. What is stored has one dense stream of codes per bit-width.
Shape letters: O out_features, I in_features, G groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantizers import packing
from quantizers.grid import SCALE_DTYPES, Grid, decode, expand_groups


@dataclass(frozen=True, kw_only=True)
class MixedWeight:
    """A linear on asymmetric uniform grids, with one bit-width per group.

    Args:
        grid: of the nominal bits; group size and precision of scales are every group's.
        group_bits: the bits of each group, 1 to 8.
        codes_OI: uint8 codes, each below 2**bits of its group.
        scale_OG: float32, each value exactly representable in `grid.scale_dtype`.
        zero_OG: float32 zeros in code units: whole numbers below 2**bits of the group. In a 1-bit group they are
            fractions exactly representable in `grid.scale_dtype` (see `grid.py`, binary).
    """

    grid: Grid
    group_bits: Sequence[int]
    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor

    encoding: ClassVar[str] = "mixed"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes_OI.shape[0], self.codes_OI.shape[1]

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything `pack` returns."""
        out_features, in_features = self.shape
        scale_bytes = SCALE_DTYPES[self.grid.scale_dtype].itemsize
        per_row = scale_bytes * len(self.group_bits)
        for bits, groups in _groups_by_bits(self.group_bits).items():
            columns = len(_columns(groups, in_features, self.grid))
            zero_bytes = scale_bytes * len(groups) if bits == 1 else packing.packed_columns(len(groups), bits)
            per_row += packing.packed_columns(columns, bits) + zero_bytes
        return out_features * per_row + len(self.group_bits)

    @property
    def published_bits_per_weight(self) -> float:
        """The average bits of the codes, which SliM-LLM is named by: scales, zeros and the map of bits left out."""
        in_features = self.shape[1]
        by_bits = _groups_by_bits(self.group_bits)
        code_bits = sum(bits * len(_columns(groups, in_features, self.grid)) for bits, groups in by_bits.items())
        return code_bits / in_features

    def decode(self) -> Tensor:
        """The float32 [O, I] weight that the codes stand for."""
        in_features = self.shape[1]
        scale_OI = expand_groups(self.scale_OG, in_features, self.grid)
        return decode(self.codes_OI.float(), scale_OI, expand_groups(self.zero_OG, in_features, self.grid))

    def pack(self) -> dict[str, Tensor]:
        """The tensors as stored, on the host.

        `group_bits` [G] and `scale` [O, G]; then for each bit-width b in use `codes_b`, the packed codes of its groups'
        columns, and `zero_b`, their packed zeros (floats where b is 1), both in rising order of groups.
        """
        dtype, in_features = SCALE_DTYPES[self.grid.scale_dtype], self.shape[1]
        codes_OI, zero_OG = self.codes_OI.cpu(), self.zero_OG.cpu()
        tensors = {
            "group_bits": torch.tensor(list(self.group_bits), dtype=torch.uint8),
            "scale": self.scale_OG.to("cpu", dtype),
        }
        for bits, groups in _groups_by_bits(self.group_bits).items():
            zero = zero_OG[:, groups]
            tensors[f"codes_{bits}"] = packing.pack(codes_OI[:, _columns(groups, in_features, self.grid)], bits)
            tensors[f"zero_{bits}"] = zero.to(dtype) if bits == 1 else packing.pack(zero.to(torch.uint8), bits)
        return tensors

    def spec(self) -> dict[str, Any]:
        """The nominal grid."""
        return {"grid": dataclasses.asdict(self.grid)}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], spec: Mapping[str, Any], shape: tuple[int, int]) -> MixedWeight:
        """Undo `pack`."""
        grid, in_features = Grid(**spec["grid"]), shape[1]
        group_bits = tensors["group_bits"].tolist()
        scale_OG = tensors["scale"].float()
        codes_OI, zero_OG = torch.empty(shape, dtype=torch.uint8), torch.empty_like(scale_OG)
        for bits, groups in _groups_by_bits(group_bits).items():
            columns, zero = _columns(groups, in_features, grid), tensors[f"zero_{bits}"]
            codes_OI[:, columns] = packing.unpack(tensors[f"codes_{bits}"], bits, len(columns))
            zero_OG[:, groups] = (zero if bits == 1 else packing.unpack(zero, bits, len(groups))).float()
        return cls(grid=grid, group_bits=group_bits, codes_OI=codes_OI, scale_OG=scale_OG, zero_OG=zero_OG)


def _groups_by_bits(group_bits: Sequence[int]) -> dict[int, list[int]]:
    """Each bit-width in use, rising, and its groups."""
    by_bits: dict[int, list[int]] = {bits: [] for bits in sorted(set(group_bits))}
    for group, bits in enumerate(group_bits):
        by_bits[bits].append(group)
    return by_bits


def _columns(groups: Sequence[int], in_features: int, grid: Grid) -> list[int]:
    """The columns of some groups; the last group of a row may be smaller."""
    size = grid.group_columns(in_features)
    return [column for group in groups for column in range(group * size, min((group + 1) * size, in_features))]
