"""The inverse of a Cholesky factor in float32, for devices without float64: matrix products alone run on the device.

Right-looking, in blocks of columns. Each block's diagonal, the only part that is factorized and inverted as such, is
done in float64 on the host, which takes 128 x 128 numbers there and back; everything else is a product.
Source: Golub and Van Loan, Matrix Computations, 4th ed. 2013, section 4.2.6 (block outer product Cholesky).
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 128


def inverse_of_factor(matrix_II: Tensor) -> Tensor | None:
    """L^-1 of M = L L^T.

    Args:
        matrix_II: symmetric float32, on any device; only its lower triangle is read. Not modified.
    Returns:
        lower triangular float32 on the same device; None where M is not positive definite in float32.
    """
    size, work_II = matrix_II.shape[0], matrix_II.clone()
    starts = range(0, size, _BLOCK)
    diagonals: list[Tensor] = []
    for start in starts:
        block = slice(start, min(start + _BLOCK, size))
        below = slice(block.stop, size)
        inverse_BB = _inverse_on_host(work_II[block, block])
        if inverse_BB is None:
            return None
        diagonals.append(inverse_BB)
        factor_NB = work_II[below, block] @ inverse_BB.T
        work_II[below, block] = factor_NB
        work_II[below, below].addmm_(factor_NB, factor_NB.T, alpha=-1)
    inverse_II = torch.zeros_like(work_II)
    for start, diagonal_BB in zip(starts, diagonals, strict=True):
        block, before = slice(start, min(start + _BLOCK, size)), slice(0, start)
        inverse_II[block, block] = diagonal_BB
        inverse_II[block, before] = -(diagonal_BB @ (work_II[block, before] @ inverse_II[before, before]))
    return inverse_II


def _inverse_on_host(diagonal_BB: Tensor) -> Tensor | None:
    factor, failed = torch.linalg.cholesky_ex(diagonal_BB.to("cpu", torch.float64))
    if failed.item() or not torch.isfinite(factor).all():
        return None
    identity = torch.eye(len(factor), dtype=torch.float64)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse.to(torch.float32).to(diagonal_BB.device)
