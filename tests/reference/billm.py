"""BiLLM in float64, from algorithm 1 of arXiv:2402.04291 and its searches: one block, row and threshold at a time.

    value of a weight in a part = mean + scale * sign(w - mean), with scale = mean |w - mean|, over the part in its row;
    order 2 adds the same of what is left; E = (W - B) / diag(U) corrects the later blocks by -E U.
U is the upper Cholesky factor of the damped inverse Hessian, formed explicitly here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.reference import grids

Matrix = npt.NDArray[np.float64]
ORDERS = {"salient": 2, "concentrated": 1, "sparse": 1}


@dataclass
class Block:
    """Salient columns (within the block), sparse weights [row, column], and levels[row][part] = (mean, scale)s."""

    salient: list[int]
    sparse: npt.NDArray[np.bool_]
    levels: list[dict[str, list[tuple[float, float]]]]
    weight: Matrix


def binarize(values: list[float], order: int, scale_dtype: str | None) -> tuple[list[float], list[tuple[float, float]]]:
    """Values of one part of one row, and its (mean, scale) per order; nothing is rounded without a dtype."""
    levels, sums, left = [], [0.0] * len(values), list(values)
    for _ in range(order):
        mean = _stored(math.fsum(left) / max(len(left), 1), scale_dtype)
        scale = _stored(math.fsum(abs(value - mean) for value in left) / max(len(left), 1), scale_dtype)
        levels.append((mean, scale))
        for index, value in enumerate(left):
            binary = mean + scale if value >= mean else mean - scale
            sums[index] += binary
            left[index] = value - binary
    return sums, levels


def _stored(value: float, scale_dtype: str | None) -> float:
    return value if scale_dtype is None else grids.stored(value, scale_dtype)


def error(matrix: Matrix, members: npt.NDArray[np.bool_], order: int, prices: Matrix) -> float:
    """Squared error of binarizing the members of each row, each column's times its price."""
    total = 0.0
    for row, inside in zip(matrix, members, strict=True):
        values = [float(value) for value in row[inside]]
        approximation, _ = binarize(values, order, None)
        total += math.fsum(
            (value - near) ** 2 * float(price)
            for value, near, price in zip(values, approximation, prices[inside], strict=True)
        )
    return total


def choose_salient(
    searched: Matrix, ranking: list[int], max_salient: int, other_order: int, prices: Matrix
) -> list[int]:
    """The leading columns of the ranking that are best set apart."""
    columns = searched.shape[1]
    best, best_error = 0, math.inf
    for count in range(1, min(max_salient, columns - 1) + 1):
        salient = np.zeros(searched.shape, dtype=bool)
        salient[:, ranking[:count]] = True
        found = error(searched, salient, 2, prices) + error(searched, ~salient, other_order, prices)
        if found < best_error:
            best, best_error = count, found
    return sorted(ranking[:best])


def choose_split(searched: Matrix, salient: list[int], over_salient: bool, prices: Matrix) -> npt.NDArray[np.bool_]:
    """The sparse weights: those above the best of 81 quantiles (0.10 to 0.90) of the magnitudes."""
    others = np.ones(searched.shape, dtype=bool)
    others[:, salient] = False
    magnitudes = np.abs(searched * others)
    pool = sorted(float(value) for value in (magnitudes.ravel() if over_salient else magnitudes[others]))
    best, best_error = others, math.inf
    for percent in range(10, 91):
        place, hundredths = divmod(percent * (len(pool) - 1), 100)
        threshold = pool[place]
        if hundredths:  # between two: linear interpolation
            threshold += hundredths / 100 * (pool[place + 1] - pool[place])
        sparse = others & (magnitudes > threshold)
        found = error(searched, sparse, 1, prices) + error(searched, others & ~sparse, 1, prices)
        if found < best_error:
            best, best_error = sparse, found
    return best


def quantize_block(
    weight: Matrix,
    diagonal: Matrix,
    *,
    scale_dtype: str = "float16",
    salient_metric: str = "hessian",
    search_on: str = "loss",
    search_other_order: int = 2,
    max_salient: int = 49,
    split_over_salient: bool = False,
) -> Block:
    """One block, from its weights and its part of the diagonal of U."""
    rows, columns = weight.shape
    metric = weight.copy()
    if salient_metric == "hessian":
        for row in range(rows):
            for column in range(columns):
                metric[row, column] = weight[row, column] ** 2 / diagonal[column] ** 2
    importance = [math.fsum(abs(float(value)) for value in metric[:, column]) for column in range(columns)]
    ranking = sorted(range(columns), key=lambda column: -importance[column])
    searched = metric if search_on == "salience" else weight
    prices = 1 / diagonal**2 if search_on == "loss" else np.ones(columns)
    salient = choose_salient(searched, ranking, max_salient, search_other_order, prices)
    sparse = choose_split(searched, salient, split_over_salient, prices)

    result, levels = np.zeros((rows, columns)), []
    for row in range(rows):
        parts = {
            "salient": salient,
            "concentrated": [c for c in range(columns) if c not in salient and not sparse[row, c]],
            "sparse": [c for c in range(columns) if sparse[row, c]],
        }
        levels.append({})
        for part, members in parts.items():
            values, levels[row][part] = binarize([float(weight[row, c]) for c in members], ORDERS[part], scale_dtype)
            for column, value in zip(members, values, strict=True):
                result[row, column] = value
    return Block(salient, sparse, levels, result)


def quantize(
    weight: Matrix, hessian: Matrix, *, block_size: int = 128, damping: float = 0.01, **choices: str | int | bool
) -> list[Block]:
    """All blocks of `weight` against `hessian`; `choices` are those of `quantize_block`."""
    weight, hessian = weight.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    columns = weight.shape[1]
    for column in range(columns):
        if hessian[column, column] == 0:  # never seen: drop the weight, and give it a curvature of its own
            hessian[column, column] = 1.0
            weight[:, column] = 0.0
    hessian += damping * np.mean(hessian.diagonal()) * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    blocks = []
    for start in range(0, columns, block_size):
        inside = range(start, min(start + block_size, columns))
        block = quantize_block(weight[:, list(inside)], upper.diagonal()[list(inside)], **choices)
        blocks.append(block)
        for place, column in enumerate(inside):
            scaled = (weight[:, column] - block.weight[:, place]) / upper[column, column]
            for later in range(inside.stop, columns):
                weight[:, later] -= scaled * upper[column, later]
    return blocks
