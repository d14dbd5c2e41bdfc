"""The one factorization that GPTQ and its kin need, damped until it succeeds."""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.errors import QuantizationError

# Tried in turn, from the asked damping upwards; the rung that worked is recorded with the layer.
DAMPING_LADDER = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def inverse_cholesky(hessian_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper triangular U with (H + d mean(diag H) I)^-1 = U^T U.

    Computed as the inverse of a reversed Cholesky factor: with J the exchange matrix and J H J = L L^T, the
    matrix V = J L J is upper triangular with H = V V^T, so U = V^-1. That is half the work of factorizing,
    inverting and factorizing again, and never forms H^-1. In float64 on the host, whatever the device: the
    same result everywhere, and NPUs have no float64.

    Args:
        hessian_II: symmetric positive semi-definite; rows of unseen inputs must already have a positive diagonal.
        damping: fraction of the mean diagonal that is added to the diagonal first.
    Returns:
        U_II: float32 on the device of `hessian_II`.
        damping: the rung that was used, `damping` or a higher one of `DAMPING_LADDER`.
    Raises:
        QuantizationError: not positive definite even on the last rung, or not finite.
    """
    hessian = hessian_II.to("cpu", torch.float64)
    if not torch.isfinite(hessian).all():
        raise QuantizationError("the Hessian is not finite: the calibration activations hold NaN or infinity")
    mean_diagonal = hessian.diagonal().mean()
    identity = torch.eye(hessian.shape[0], dtype=torch.float64)
    for rung in (damping, *(step for step in DAMPING_LADDER if step > damping)):
        factor, failed = torch.linalg.cholesky_ex((hessian + rung * mean_diagonal * identity).flip(0, 1))
        if not failed.item():
            reversed_inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            return reversed_inverse.flip(0, 1).to(hessian_II.device, torch.float32).contiguous(), rung
    raise QuantizationError(
        f"the Hessian is not positive definite even with damping {DAMPING_LADDER[-1]}; "
        "use more calibration data or a higher damping"
    )
