"""The one factorization that GPTQ and its kin need, damped until it succeeds."""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.errors import QuantizationError

# Tried in turn, from the asked damping upwards; the rung that worked is recorded with the layer.
DAMPING_LADDER = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def without_unseen(hessian_II: Tensor) -> tuple[Tensor, Tensor]:
    """Give inputs that were always zero a curvature of their own; any weight will do for them, so methods take 0.

    Returns:
        the Hessian with 1 on the diagonal of each such input, and bool [I], which they are.
    """
    unseen_I = hessian_II.diagonal() == 0
    if unseen_I.any():
        hessian_II = hessian_II + torch.diag(unseen_I.to(hessian_II.dtype))
    return hessian_II, unseen_I


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
    if not torch.isfinite(hessian_II).all():
        raise QuantizationError("the Hessian is not finite: the calibration activations hold NaN or infinity")
    mean_diagonal = hessian_II.diagonal().to("cpu", torch.float64).mean()
    for rung in (damping, *(step for step in DAMPING_LADDER if step > damping)):
        # Each float64 matrix is let go as soon as the next is there: at 12,800 inputs one takes 1.3 GB.
        damped = hessian_II.cpu().flip(0, 1).to(torch.float64)
        damped.diagonal().add_(rung * mean_diagonal)
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed.item():
            # Transposed, the identity is column-major, and only then is it solved in place.
            inverse = torch.eye(factor.shape[0], dtype=torch.float64).T
            torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
            del factor
            return inverse.to(torch.float32).flip(0, 1).contiguous().to(hessian_II.device), rung
    raise QuantizationError(
        f"the Hessian is not positive definite even with damping {DAMPING_LADDER[-1]}; "
        "use more calibration data or a higher damping"
    )
