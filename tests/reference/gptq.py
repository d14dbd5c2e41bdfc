"""GPTQ in float64 as optimal brain quantization in a fixed order: no Cholesky factor, no blocks, one row at a time.

Source: Frantar et al. 2023, arXiv:2210.17323, equations 2 and 3. With F the uncompressed columns, quantizing
column i changes the other columns of a row by
    delta = -(w_i - quant(w_i)) / [H_F^-1]_ii * [H_F^-1]_:,i                                       (eq. 2)
and removes i from F, which for the inverse Hessian is one step of Gaussian elimination,
    H_F\\i^-1 = H_F^-1 - [H_F^-1]_:,i [H_F^-1]_i,: / [H_F^-1]_ii, without row and column i           (eq. 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.reference import grids

Matrix = npt.NDArray[np.float64]


@dataclass
class Result:
    """codes and weight in the original column order; scale and zero as [row, group]; the group of each column."""

    codes: npt.NDArray[np.int64]
    scale: Matrix
    zero: Matrix
    group: list[int]
    weight: Matrix


def quantize(
    weight: Matrix,
    hessian: Matrix,
    *,
    bits: int,
    group_size: int = 0,
    symmetric: bool = False,
    scale_dtype: str = "float16",
    act_order: bool = True,
    static_groups: bool = True,
    damping: float = 0.01,
) -> Result:
    """Quantize each row of `weight` against `hessian`."""
    weight, hessian = weight.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    rows, columns = weight.shape
    importance = hessian.diagonal().copy()
    for column in range(columns):
        if importance[column] == 0:  # never seen: drop the weight, and give it a curvature of its own
            hessian[column, column] = 1.0
            weight[:, column] = 0.0
    hessian += damping * np.mean(hessian.diagonal()) * np.eye(columns)
    inverse = np.linalg.inv(hessian)

    order = list(range(columns))
    if act_order:
        order.sort(key=lambda column: -importance[column])  # stable, as ties keep their order

    convention = grids.CONVENTION[symmetric]
    members = _members(order, group_size, in_order=not static_groups)
    group_of = [next(index for index, group in enumerate(members) if column in group) for column in range(columns)]

    codes = np.zeros((rows, columns), dtype=np.int64)
    scale, zero = np.zeros((rows, len(members))), np.zeros((rows, len(members)))
    decoded = np.zeros((rows, columns))
    for row in range(rows):
        work, inverse_f = weight[row].copy(), inverse.copy()
        fitted: dict[int, tuple[float, float]] = {}
        if static_groups:
            for index, group in enumerate(members):
                fitted[index] = grids.fit_group([weight[row, c] for c in group], bits, convention, scale_dtype)
        for column in order:
            index = group_of[column]
            if index not in fitted:  # the group's first column: fit to the weights as corrected so far
                fitted[index] = grids.fit_group([work[c] for c in members[index]], bits, convention, scale_dtype)
            code = grids.encode(work[column], *fitted[index], bits)
            codes[row, column] = code
            decoded[row, column] = grids.decode(code, *fitted[index])
            pivot = inverse_f[column, column]
            work -= (work[column] - decoded[row, column]) / pivot * inverse_f[:, column]  # eq. 2
            inverse_f -= np.outer(inverse_f[:, column], inverse_f[column, :]) / pivot  # eq. 3: row and column become 0
            inverse_f[column, :] = inverse_f[:, column] = 0.0
        for index, (group_scale, group_zero) in fitted.items():
            scale[row, index], zero[row, index] = group_scale, group_zero
    return Result(codes, scale, zero, group_of, decoded)


def _members(order: list[int], group_size: int, in_order: bool) -> list[list[int]]:
    """The columns of each group: neighbours in the weight, or in the order; one group is all columns."""
    groups = grids.groups_of(len(order), group_size)
    if in_order and len(groups) > 1:
        return [[order[place] for place in group] for group in groups]
    return [list(group) for group in groups]


def objective(weight: Matrix, decoded: Matrix, hessian: Matrix) -> float:
    """tr((W - Q) H (W - Q)^T): the squared error of the linear's outputs."""
    difference = weight.astype(np.float64) - decoded.astype(np.float64)
    return float(np.sum((difference @ hessian.astype(np.float64)) * difference))
