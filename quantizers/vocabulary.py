"""The matrices over the vocabulary, embedding and head: left alone, or rounded to nearest where a cell asks for it.

Whatever the method is: what is looked up has no inputs whose statistics a method could use. Where the head is the
embedding (tied), there is one matrix, the embedding.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantizers.errors import NumericalError, QuantizationError
from quantizers.grid import Grid
from quantizers.rtn import round_to_nearest
from quantizers.stream import QuantizedLinear
from quantizers.uniform_weight import UniformWeight, stored_bytes

EMBEDDING, HEAD = "embedding", "head"
# A vocabulary of 153,376 rows in float32 would be gigabytes at once; rows have grids of their own.
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class VocabularyMatrix:
    """One of the two.

    Args:
        name: full dotted name of its module, without ".weight".
        shape: (words, hidden size).
    """

    name: str
    shape: tuple[int, int]


def matrices_of(model: Any) -> dict[str, VocabularyMatrix]:
    """Role -> matrix of a transformers causal LM; no head where the embedding is it. A meta model will do."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    found = {EMBEDDING: embedding}
    if head is not None and head.weight is not embedding.weight:
        found[HEAD] = head
    return {
        role: VocabularyMatrix(name=names[id(module)], shape=(module.weight.shape[0], module.weight.shape[1]))
        for role, module in found.items()
    }


def check_vocabulary(grids: Mapping[str, Grid], matrices: Mapping[str, VocabularyMatrix], *, of: str = "") -> None:
    """Raise unless the model has these matrices and the grids fit them.

    Args:
        grids: role -> grid of the matrix.
        matrices: of the model.
        of: what to say after a name.
    Raises:
        QuantizationError: the head is the embedding, or a group size does not fit.
    """
    for role, grid in grids.items():
        if role not in matrices:
            raise QuantizationError(f"{role}: the {role}{of} is its embedding (tied weights); give embedding alone")
        grid.check_fits(matrices[role].shape[1], matrices[role].name + of)


def vocabulary_bytes(grids: Mapping[str, Grid], matrices: Mapping[str, VocabularyMatrix]) -> int:
    """Bytes that the matrices with grids will take, scales and zeros included."""
    return sum(stored_bytes(grid, *matrices[role].shape) for role, grid in grids.items())


@torch.no_grad()
def quantize_matrix(name: str, weight_VH: Tensor, grid: Grid) -> QuantizedLinear:
    """Round one matrix to nearest.

    Args:
        name: of its module.
        weight_VH: in any float dtype.
    Raises:
        NumericalError: it holds NaN or infinity.
        QuantizationError: a group size that does not fit, or a scale that overflows its dtype.
    """
    started = time.perf_counter()
    parts, lost, whole = [], 0.0, 0.0
    for start in range(0, len(weight_VH), _ROWS_AT_ONCE):
        values = weight_VH[start : start + _ROWS_AT_ONCE].float()
        if not torch.isfinite(values).all():
            raise NumericalError(f"{name}.weight holds NaN or infinity")
        part = round_to_nearest(values, grid)
        lost += _sum_of_squares(values - part.decode())
        whole += _sum_of_squares(values)
        parts.append(part)
    weight = replace(
        parts[0],
        codes_OI=torch.cat([part.codes_OI for part in parts]),
        scale_OG=torch.cat([part.scale_OG for part in parts]),
        zero_OG=None if grid.symmetric else torch.cat([part.zero_OG for part in parts if part.zero_OG is not None]),
    )
    return QuantizedLinear(
        name=name,
        weight=weight,
        weight_error=lost / whole if whole else 0.0,
        output_error=None,
        damping=None,
        seconds=time.perf_counter() - started,
    )


def _sum_of_squares(values_VH: Tensor) -> float:
    """Over rows in float64 on the host: NPUs have none."""
    return float(values_VH.square().sum(1).to("cpu", torch.float64).sum())


class PackedMatrix:
    """A matrix that is rounded when it is first asked for, and packed from then on."""

    def __init__(self, name: str, weight_VH: Tensor, grid: Grid) -> None:
        """Nothing is computed yet; arguments as of `quantize_matrix`."""
        self._name, self._weight_VH, self._grid = name, weight_VH, grid
        self._packed: dict[str, Tensor] = {}

    def __call__(self) -> UniformWeight:
        """The matrix as a bank takes it."""
        shape = (self._weight_VH.shape[0], self._weight_VH.shape[1])
        if not self._packed:
            weight = quantize_matrix(self._name, self._weight_VH, self._grid).weight
            self._packed, self._spec = weight.pack(), weight.spec()
        return UniformWeight.unpack(self._packed, self._spec, shape)
