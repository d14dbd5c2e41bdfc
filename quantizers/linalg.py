"""The one factorization that GPTQ and its kin need, damped until it succeeds."""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.blocked_cholesky import inverse_of_factor
from quantizers.errors import NumericalError, QuantizationError

# Tried in turn, from the asked damping upwards; the rung that worked is recorded with the layer.
DAMPING_LADDER = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

# Where the factorization is computed: in float64 on the host, or in float32 on the device.
FACTORIZATIONS = ("host", "device")

# Columns of a triangular inverse that are solved for at once.
_PANEL = 256


def without_unseen(hessian_II: Tensor) -> tuple[Tensor, Tensor]:
    """Give inputs that were always zero a curvature of their own; any weight will do for them, so methods take 0.

    Returns:
        the Hessian with 1 on the diagonal of each such input, and bool [I], which they are.
    """
    unseen_I = hessian_II.diagonal() == 0
    if unseen_I.any():
        hessian_II = hessian_II + torch.diag(unseen_I.to(hessian_II.dtype))
    return hessian_II, unseen_I


def check_factorization(value: str) -> None:
    """Raise unless `options.factorization` is one of `FACTORIZATIONS`.

    Raises:
        QuantizationError: it is none.
    """
    if value not in FACTORIZATIONS:
        raise QuantizationError(f"options.factorization = {value!r} is none of {', '.join(FACTORIZATIONS)}")


def inverse_cholesky(hessian_II: Tensor, damping: float, factorization: str = "host") -> tuple[Tensor, float]:
    """The upper triangular U with (H + d mean(diag H) I)^-1 = U^T U.

    Computed as the inverse of a reversed Cholesky factor: with J the exchange matrix and J H J = L L^T, the
    matrix V = J L J is upper triangular with H = V V^T, so U = V^-1. That is half the work of factorizing,
    inverting and factorizing again, and never forms H^-1. By default in float64 on the host, whatever the device:
    the same result everywhere, and NPUs have no float64. At 12,800 inputs that takes minutes; `device` is a
    blocked factorization in float32 there, whose last digits are the device's (see `blocked_cholesky.py`).

    Args:
        hessian_II: symmetric positive semi-definite; rows of unseen inputs must already have a positive diagonal.
        damping: fraction of the mean diagonal that is added to the diagonal first.
        factorization: one of `FACTORIZATIONS`.
    Returns:
        U_II: float32 on the device of `hessian_II`.
        damping: the rung that was used, `damping` or a higher one of `DAMPING_LADDER`.
    Raises:
        NumericalError: not positive definite even on the last rung, or not finite.
    """
    if not torch.isfinite(hessian_II).all():
        raise NumericalError("the Hessian is not finite: the calibration activations hold NaN or infinity")
    mean_diagonal = hessian_II.diagonal().to("cpu", torch.float64).mean()
    for rung in (damping, *(step for step in DAMPING_LADDER if step > damping)):
        inverse = (_on_host if factorization == "host" else _on_device)(hessian_II, float(rung * mean_diagonal))
        if inverse is not None:
            return inverse, rung
    raise NumericalError(
        f"the Hessian is not positive definite even with damping {DAMPING_LADDER[-1]}; "
        "use more calibration data or a higher damping"
    )


def quadratic_form(rows_OI: Tensor, symmetric_II: Tensor) -> Tensor:
    """tr(A S A^T), from the upper triangle of S: in panels, about half the work of the full product."""
    total = torch.zeros((), dtype=rows_OI.dtype, device=rows_OI.device)
    for start in range(0, symmetric_II.shape[0], _PANEL):
        stop = min(start + _PANEL, symmetric_II.shape[0])
        panel_OP = rows_OI[:, start:stop]
        total += ((panel_OP @ symmetric_II[start:stop, start:stop]) * panel_OP).sum()
        total += 2 * ((panel_OP @ symmetric_II[start:stop, stop:]) * rows_OI[:, stop:]).sum()
    return total


def _on_host(hessian_II: Tensor, added: float) -> Tensor | None:
    # Each float64 matrix is let go as soon as the next is there: at 12,800 inputs one takes 1.3 GB.
    damped = hessian_II.cpu().flip(0, 1).to(torch.float64)
    damped.diagonal().add_(added)
    factor, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if failed.item():
        return None
    inverse = _inverse_of_lower(factor)
    del factor
    return inverse.to(torch.float32).flip(0, 1).contiguous().to(hessian_II.device)


def _on_device(hessian_II: Tensor, added: float) -> Tensor | None:
    damped = hessian_II.flip(0, 1)
    damped.diagonal().add_(added)
    inverse = inverse_of_factor(damped)
    return None if inverse is None else inverse.flip(0, 1).contiguous()


def _inverse_of_lower(factor_II: Tensor) -> Tensor:
    """Panel by panel from each panel's first row on: what stands above is zero, and half of the work would go there."""
    # Transposed, the identity is column-major, and only then is it solved in place.
    inverse_II = torch.eye(factor_II.shape[0], dtype=factor_II.dtype).T
    for start in range(0, factor_II.shape[0], _PANEL):
        panel = inverse_II[start:, start : start + _PANEL]
        torch.linalg.solve_triangular(factor_II[start:, start:], panel, upper=False, out=panel)
    return inverse_II
