"""QEP: fold the correction of earlier layers' errors into a weight before any method quantizes it.

A linear of the quantized model sees X where the float model saw Xf. Of all weights applied to X, the one nearest to the
float output W Xf is W + W D H^-1: an orthogonal projection, so quantizing it well is quantizing for the float output.
Source: Arai and Ichikawa 2025, arXiv:2504.09629; with partial strength and damping as in the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.statistics import InputStatistics


def fold_errors(weight_OI: Tensor, statistics: InputStatistics, strength: float, damping: float) -> Tensor:
    """W + strength * W D (H + damping * mean(diag H) I)^-1, in float32.

    Args:
        weight_OI: float32 weights.
        statistics: with its drift.
        strength: 0 leaves the weight alone, 1 is the whole projection.
        damping: fraction of the mean Hessian diagonal; above 0. Large values guard against few calibration tokens.
    """
    if statistics.drift_II is None:
        raise AssertionError("folding needs the drift of the inputs")
    hessian = statistics.require_hessian().to("cpu", torch.float64)
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    target_IO = (weight_OI.to("cpu", torch.float64) @ statistics.drift_II.to("cpu", torch.float64)).T
    correction_IO: Tensor = torch.linalg.solve(hessian, target_IO)  # symmetric, so the transposed system is the same
    correction_OI = correction_IO.T.to(weight_OI.device, torch.float32)
    return weight_OI.add(correction_OI, alpha=strength)
