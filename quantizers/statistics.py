"""What is remembered of the inputs of a linear while calibration data streams through it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns per tile of the symmetric update. Below this a tile is too thin for a fast matrix product.
_PANEL = 256


class Hessian:
    """H = (2/n) sum X X^T over the n calibration sequences, the Hessian of a linear's squared output error.

    Only the upper triangle is accumulated, in panels of rows: half the work of the full product. Sums are kept
    un-normalised in float32 and divided once, so the result depends on the order of the sequences alone.
    Source: Frantar et al. 2023, arXiv:2210.17323, section 3.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        """Start with no sequences."""
        self._sum_II = torch.zeros((in_features, in_features), dtype=torch.float32, device=device)
        self._num_sequences = 0

    def update(self, inputs_NTI: Tensor) -> None:
        """Add sequences: [sequences, tokens, in_features], any float dtype."""
        inputs = inputs_NTI.reshape(-1, inputs_NTI.shape[-1]).float()
        width = inputs.shape[1]
        for start in range(0, width, _PANEL):
            stop = min(start + _PANEL, width)
            self._sum_II[start:stop, start:].addmm_(inputs[:, start:stop].T, inputs[:, start:])
        self._num_sequences += inputs_NTI.shape[0]

    def value(self) -> Tensor:
        """The symmetric float32 [I, I] matrix."""
        upper = torch.triu(self._sum_II)
        full = upper + torch.triu(upper, 1).T
        return full.mul_(2.0 / max(self._num_sequences, 1))


class Drift:
    """D = (2/n) sum (Xf - X) X^T: how far the inputs X of the quantized model have drifted from the float ones Xf.

    Source: Li et al. 2025 (GPTAQ), arXiv:2504.02692; Arai and Ichikawa 2025 (QEP), arXiv:2504.09629.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        """Start with no sequences."""
        self._sum_II = torch.zeros((in_features, in_features), dtype=torch.float32, device=device)
        self._num_sequences = 0

    def update(self, inputs_NTI: Tensor, float_inputs_NTI: Tensor) -> None:
        """Add sequences: the same tokens in the quantized and in the float model, [sequences, tokens, in_features]."""
        inputs = inputs_NTI.reshape(-1, inputs_NTI.shape[-1]).float()
        drift = float_inputs_NTI.reshape(inputs.shape).float() - inputs
        self._sum_II.addmm_(drift.T, inputs)
        self._num_sequences += inputs_NTI.shape[0]

    def value(self) -> Tensor:
        """The float32 [I, I] matrix; not symmetric."""
        return self._sum_II * (2.0 / max(self._num_sequences, 1))


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """What a method is told of the inputs that the linears of one stage share.

    Args:
        hessian_II: `Hessian.value()` of the inputs in the quantized model.
        drift_II: `Drift.value()`; None where the method does not ask for it.
    """

    hessian_II: Tensor
    drift_II: Tensor | None = None
