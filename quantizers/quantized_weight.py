"""What every encoding of a quantized linear offers. Evaluation decodes exactly this; export writes exactly this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor


class QuantizedWeight(Protocol):
    """The artifact of one linear, in one of the encodings of `encodings.py`."""

    encoding: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything `pack` returns: codes, scales, zeros, bitmaps and permutations."""

    @property
    def published_bits_per_weight(self) -> float | None:
        """Bits per weight by the method's own published convention, where it leaves out what is stored; else None."""

    def decode(self) -> Tensor:
        """The float32 [O, I] weight that it stands for."""

    def pack(self) -> dict[str, Tensor]:
        """The tensors as stored, on the host."""

    def spec(self) -> dict[str, Any]:
        """What `unpack` needs beside the tensors, as JSON values."""

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], spec: Mapping[str, Any], shape: tuple[int, int]) -> Self:
        """Undo `pack`."""
