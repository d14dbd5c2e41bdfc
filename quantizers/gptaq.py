"""GPTAQ: GPTQ that aims at the float model's output from the quantized model's inputs.

Minimizes |Q X - W Xf|^2 column by column, where X are the inputs in the quantized model and Xf in the float one.
Source: Li et al. 2025, arXiv:2504.02692, algorithm 1. Shape letters as in `gptq.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantizers.errors import QuantizationError
from quantizers.gptq import Gptq, gptq, split_rows
from quantizers.grid import Grid, decode
from quantizers.method import LinearGroup, MethodOutcome, Needs

CARRIES = ("w", "w_clamped", "q")
# In which turn the released code quantizes q, k, v; gate, up; and a linear of its own.
_TURNS = {1: (1,), 2: (2, 1), 3: (3, 1, 2)}


@dataclass(frozen=True, kw_only=True)
class Gptaq(Gptq):
    """GPTAQ's options, beside GPTQ's.

    Args:
        alpha: strength of the asymmetric term, 0 (GPTQ) to 1.
        carry: the column values that a block hands on to later blocks. `w`, the values that were quantized, is what the
            derivation wants and does not depend on the block size; `q`, the quantized values, is what the released
            code does; `w_clamped` is `w` within the range of the grid.
        shared_damping: as in the released code, where the linears of a stage damp one and the same Hessian in turn
            (k, v, q; up, gate), so that each but the first gets the damping of those before it too. It shows without
            act_order only, which makes copies.
    """

    alpha: float = 0.25
    carry: str = "w"
    shared_damping: bool = False

    name: ClassVar[str] = "gptaq"
    code_version: ClassVar[str] = "gptaq/3"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "corrected": {},
        "as_published": {"carry": "q", "stale_groups": True, "shared_damping": True},
    }

    @property
    def needs(self) -> Needs:
        """The Hessian and the drift."""
        return replace(super().needs, drift=True)

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            QuantizationError: a value outside its rule.
        """
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise QuantizationError(f"options.alpha = {self.alpha} must be from 0 to 1")
        if self.carry not in CARRIES:
            raise QuantizationError(f"options.carry = {self.carry!r} is none of {', '.join(CARRIES)}")
        if self.path == "float":
            raise QuantizationError(
                "options.path = 'float' leaves gptaq no drift to correct; use gptq, or path: quantized"
            )
        if self.fold > 0:
            raise QuantizationError("options.fold corrects what gptaq corrects already; use gptq with fold, or fold: 0")

    def quantize(self, group: LinearGroup) -> MethodOutcome:
        """Quantize linears that share an input as one stacked matrix.

        Raises:
            QuantizationError: the Hessian cannot be factorized, or a scale overflows.
        """
        if group.statistics is None or group.statistics.drift_II is None:
            raise AssertionError("GPTAQ needs the statistics of its inputs, with their drift")
        asymmetry = _Asymmetry(drift_II=group.statistics.drift_II, alpha=self.alpha, carry=self.carry)
        hessian_II = group.statistics.require_hessian()
        if self.shared_damping and not self.act_order:
            turns = _TURNS[len(group.weights)]
            each = [replace(self, damping=min((1 + self.damping) ** turn - 1, 1.0)) for turn in turns]
            outcomes = [
                gptq(weight, hessian_II, options, asymmetry)
                for weight, options in zip(group.weights, each, strict=True)
            ]
            return MethodOutcome(weights=[weight for weight, _ in outcomes], damping=max(rung for _, rung in outcomes))
        stacked, damping = gptq(torch.cat(list(group.weights)), hessian_II, self, asymmetry)
        return MethodOutcome(weights=split_rows(stacked, group.weights), damping=damping)


@dataclass(frozen=True, kw_only=True)
class _Asymmetry:
    drift_II: Tensor
    alpha: float
    carry: str

    def forward(self, inverse_UII: Tensor, order: Tensor, unseen: Tensor) -> Tensor:
        """P = alpha strictly_upper(D U^T) U (algorithm 1)."""
        drift_II = self.drift_II.masked_fill(unseen, 0.0).masked_fill(unseen[:, None], 0.0)[order][:, order]
        return self.alpha * torch.triu(drift_II @ inverse_UII.T, diagonal=1) @ inverse_UII

    def carried(self, work_BO: Tensor, codes_BO: Tensor, scale_BO: Tensor, zero_BO: Tensor, grid: Grid) -> Tensor:
        """What later blocks are told of this block's columns."""
        if self.carry == "q":
            return decode(codes_BO, scale_BO, zero_BO)
        if self.carry == "w_clamped":
            ends = torch.tensor([0.0, grid.max_code], device=work_BO.device)
            return work_BO.clamp(decode(ends[0], scale_BO, zero_BO), decode(ends[1], scale_BO, zero_BO))
        return work_BO
