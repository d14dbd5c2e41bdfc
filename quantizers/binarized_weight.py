"""Binarized encoding of a linear: one sign per weight, two in salient columns, and three groups of levels per block.

Columns come in blocks. In a block some columns are salient, for all rows; each other weight is concentrated (small) or
sparse (large). A row of a block has four pairs of (mean, scale), and a weight is
    salient        mean_0 +- scale_0 + mean_1 +- scale_1     (residual binarization: two signs)
    concentrated   mean_2 +- scale_2
    sparse         mean_3 +- scale_3
Source: Huang et al. 2024 (BiLLM), arXiv:2402.04291. Shape letters: O out_features, I in_features, G blocks, B columns
of a block, S its salient columns, N its other columns, P the four pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantizers import packing
from quantizers.errors import QuantizationError
from quantizers.grid import SCALE_DTYPES

SALIENT, RESIDUAL, CONCENTRATED, SPARSE = range(4)
_PAIRS = 4


@dataclass(frozen=True, kw_only=True)
class BinarizedBlock:
    """The columns of one block.

    Args:
        salient_B: bool, the columns that have two signs.
        sign_OB: uint8, 1 for plus and 0 for minus; in salient columns the first sign.
        second_sign_OS: uint8, the second sign of the salient columns, in rising order of columns.
        sparse_ON: uint8, 1 for sparse and 0 for concentrated, of the other columns in rising order.
        mean_PO: float32, exactly representable in the weight's `scale_dtype`; 0 where nothing belongs to a pair.
        scale_PO: likewise, not negative.
    """

    salient_B: Tensor
    sign_OB: Tensor
    second_sign_OS: Tensor
    sparse_ON: Tensor
    mean_PO: Tensor
    scale_PO: Tensor

    def decode(self) -> Tensor:
        """The float32 [O, B] values."""
        salient, other = self.salient_B.nonzero().flatten(), (~self.salient_B).nonzero().flatten()
        mean_PO1, scale_PO1 = self.mean_PO.unsqueeze(-1), self.scale_PO.unsqueeze(-1)
        value_OB = torch.empty(self.sign_OB.shape, dtype=torch.float32, device=self.sign_OB.device)
        value_OB[:, salient] = level(self.sign_OB[:, salient], mean_PO1[SALIENT], scale_PO1[SALIENT]) + level(
            self.second_sign_OS, mean_PO1[RESIDUAL], scale_PO1[RESIDUAL]
        )
        sparse_ON = self.sparse_ON.bool()
        value_OB[:, other] = level(
            self.sign_OB[:, other],
            torch.where(sparse_ON, mean_PO1[SPARSE], mean_PO1[CONCENTRATED]),
            torch.where(sparse_ON, scale_PO1[SPARSE], scale_PO1[CONCENTRATED]),
        )
        return value_OB


def level(sign: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """mean + scale where the sign is 1, mean - scale where it is 0, float32; shapes broadcast."""
    return mean + torch.where(sign.bool(), scale, -scale)


def stored_level(value: Tensor, scale_dtype: str) -> Tensor:
    """Round means or scales to the precision they are stored in; unlike the scales of a grid they may be 0.

    Raises:
        QuantizationError: a value is too large for `scale_dtype`.
    """
    rounded = value.to(SCALE_DTYPES[scale_dtype]).float()
    if not torch.isfinite(rounded).all():
        raise QuantizationError(
            f"a level of {value.abs().max().item():.3g} does not fit {scale_dtype}; use scale_dtype: float32"
        )
    return rounded


@dataclass(frozen=True, kw_only=True)
class BinarizedWeight:
    """A linear in blocks of binarized columns.

    Args:
        blocks: at least one, from the first column to the last; all have `block_size` columns but the last, which may
            have fewer.
        block_size: columns per block.
        scale_dtype: precision of means and scales.
    """

    blocks: Sequence[BinarizedBlock]
    block_size: int
    scale_dtype: str

    encoding: ClassVar[str] = "binarized"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.blocks[0].sign_OB.shape[0], sum(block.sign_OB.shape[1] for block in self.blocks)

    @property
    def num_salient(self) -> int:
        """Salient columns of all blocks."""
        return sum(block.second_sign_OS.shape[1] for block in self.blocks)

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything `pack` returns."""
        return stored_bytes(*self.shape, self.num_salient, self.block_size, self.scale_dtype)

    @property
    def published_bits_per_weight(self) -> float:
        """The paper's N_param = 2 r + (1 - r), with r the share of salient columns: the signs alone.

        It leaves out the bit that tells sparse from concentrated, the bitmap of salient columns, and the means and
        scales. With those, which are needed to decode, a linear with blocks of 128 takes 3 bits per weight in float16.
        """
        return 1 + self.num_salient / self.shape[1]

    def decode(self) -> Tensor:
        """The float32 [O, I] weight."""
        return torch.cat([block.decode() for block in self.blocks], 1)

    def pack(self) -> dict[str, Tensor]:
        """The tensors as stored, on the host.

        `sign` [O, I], `second_sign` [O, salient columns], `sparse` [O, other columns] and `salient` [1, I] are rows of
        bits; `mean` and `scale` are [G, P, O].
        """
        dtype = SCALE_DTYPES[self.scale_dtype]
        return {
            "sign": _pack_bits(torch.cat([block.sign_OB for block in self.blocks], 1)),
            "second_sign": _pack_bits(torch.cat([block.second_sign_OS for block in self.blocks], 1)),
            "sparse": _pack_bits(torch.cat([block.sparse_ON for block in self.blocks], 1)),
            "salient": _pack_bits(torch.cat([block.salient_B for block in self.blocks])[None].to(torch.uint8)),
            "mean": torch.stack([block.mean_PO for block in self.blocks]).to("cpu", dtype),
            "scale": torch.stack([block.scale_PO for block in self.blocks]).to("cpu", dtype),
        }

    def spec(self) -> dict[str, Any]:
        """The size of the blocks, and the precision of means and scales."""
        return {"block_size": self.block_size, "scale_dtype": self.scale_dtype}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], spec: Mapping[str, Any], shape: tuple[int, int]) -> BinarizedWeight:
        """Undo `pack`."""
        in_features, block_size = shape[1], int(spec["block_size"])
        salient = torch.split(_unpack_bits(tensors["salient"], in_features)[0].bool(), block_size)
        num_salient = [int(block.sum()) for block in salient]
        num_other = [len(block) - count for block, count in zip(salient, num_salient, strict=True)]
        parts = zip(
            salient,
            torch.split(_unpack_bits(tensors["sign"], in_features), block_size, 1),
            torch.split(_unpack_bits(tensors["second_sign"], sum(num_salient)), num_salient, 1),
            torch.split(_unpack_bits(tensors["sparse"], sum(num_other)), num_other, 1),
            tensors["mean"].float(),
            tensors["scale"].float(),
            strict=True,
        )
        blocks = [
            BinarizedBlock(
                salient_B=salient_B,
                sign_OB=sign_OB,
                second_sign_OS=second_sign_OS,
                sparse_ON=sparse_ON,
                mean_PO=mean_PO,
                scale_PO=scale_PO,
            )
            for salient_B, sign_OB, second_sign_OS, sparse_ON, mean_PO, scale_PO in parts
        ]
        return cls(blocks=blocks, block_size=block_size, scale_dtype=spec["scale_dtype"])


def stored_bytes(out_features: int, in_features: int, num_salient: int, block_size: int, scale_dtype: str) -> int:
    """Bytes that a linear of this shape takes: signs, both bitmaps, means and scales, row padding included."""
    bits = sum(packing.packed_columns(width, 1) for width in (in_features, num_salient, in_features - num_salient))
    num_blocks = -(-in_features // block_size)
    levels = 2 * _PAIRS * num_blocks * SCALE_DTYPES[scale_dtype].itemsize
    return out_features * (bits + levels) + packing.packed_columns(in_features, 1)


def _pack_bits(bits_RC: Tensor) -> Tensor:
    """Rows of bits; there may be no column (a linear without salient ones)."""
    if bits_RC.shape[1] == 0:
        return torch.empty((bits_RC.shape[0], 0), dtype=torch.uint8)
    return packing.pack(bits_RC, 1)


def _unpack_bits(packed_RB: Tensor, num_bits: int) -> Tensor:
    if num_bits == 0:
        return torch.empty((packed_RB.shape[0], 0), dtype=torch.uint8)
    return packing.unpack(packed_RB, 1, num_bits)
