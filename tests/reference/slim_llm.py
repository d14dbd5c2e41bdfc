"""SliM-LLM in float64, from arXiv:2405.14917: one group, row, weight and candidate at a time.

    salience of a weight    w_ij^2 / [H_F^-1]_jj, with F the columns from j on, so that [H_F^-1]_jj is U_jj^2
    bit allocation          the i least salient groups get b - 1 bits and the i most salient ones b + 1; of all i the
                            one with the least KL(softmax(Q x + c) || softmax(W x + c)), Q rounded to nearest
    calibration             of scales p (max - min) / (2^bits - 1) the one with the least sum of |q - w|^2.4, salient
                            weights counting `salient_weight` times
Columns are then quantized in turn as in GPTQ (eq. 2 and 3 of arXiv:2210.17323), with neither Cholesky factor nor block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.reference import grids

Matrix = npt.NDArray[np.float64]


@dataclass
class Settings:
    """The options of the method, by the same names."""

    bits: int
    group_size: int
    scale_dtype: str = "float16"
    damping: float = 0.01
    absolute_damping: float = 0.0
    bit_allocation: bool = True
    damped_count: bool = True
    include_uniform: bool = True
    bias_in_allocation: bool = True
    probability_floor: float = 0.0
    centred_binary: bool = True
    search_range: float = 0.1
    search_steps: int = 50
    salient_weight: float = 1.0
    stale_symmetry: bool = False


@dataclass
class Result:
    """Bits per group, codes [row, column], scale and zero [row, group], the decoded weight, and the errors by i."""

    bits: list[int]
    codes: npt.NDArray[np.int64]
    scale: Matrix
    zero: Matrix
    weight: Matrix
    errors: dict[int, float]


def quantize(weight: Matrix, bias: Matrix | None, hessian: Matrix, sample: Matrix, settings: Settings) -> Result:
    """Quantize `weight` [row, column] given `hessian` [column, column] and `sample` [token, column]."""
    weight, hessian = weight.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    rows, columns = weight.shape
    for column in range(columns):
        if hessian[column, column] == 0:
            hessian[column, column] = 1.0
            weight[:, column] = 0.0
        hessian[column, column] += settings.absolute_damping
    undamped = hessian.copy()
    hessian += settings.damping * np.mean(hessian.diagonal()) * np.eye(columns)
    inverse = np.linalg.inv(hessian)
    pivots = pivots_of(inverse)

    groups = grids.groups_of(columns, settings.group_size)
    errors: dict[int, float] = {}
    bits = [settings.bits] * len(groups)
    if settings.bit_allocation:
        order = ranking(weight, pivots, groups)
        counting = order if settings.damped_count else ranking(weight, pivots_of(np.linalg.inv(undamped)), groups)
        errors = allocation_errors(weight, bias, sample.astype(np.float64), counting, groups, settings)
        best = min(errors, key=lambda count: (errors[count], count))
        bits = allocation(order, best, len(groups), settings.bits)

    codes, decoded = np.zeros((rows, columns), dtype=np.int64), np.zeros((rows, columns))
    scale, zero = np.zeros((rows, len(groups))), np.zeros((rows, len(groups)))
    work, stale = weight.copy(), settings.stale_symmetry
    for index, group in enumerate(groups):
        if bits[index] >= settings.bits:
            stale = False
        for row, (row_scale, row_zero) in enumerate(
            calibrate(work[:, group], [pivots[column] for column in group], bits[index], settings, stale)
        ):
            scale[row, index], zero[row, index] = row_scale, row_zero
        for column in group:
            for row in range(rows):
                code = grids.encode(work[row, column], scale[row, index], zero[row, index], bits[index])
                codes[row, column] = code
                decoded[row, column] = grids.decode(code, scale[row, index], zero[row, index])
            error = (work[:, column] - decoded[:, column]) / inverse[column, column]
            work -= np.outer(error, inverse[column])
            inverse = eliminated(inverse, column)
    return Result(bits, codes, scale, zero, decoded, errors)


def eliminated(inverse: Matrix, column: int) -> Matrix:
    """The inverse of the Hessian without one column more; what is left of the column is 0."""
    less = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    less[column, :] = less[:, column] = 0.0
    return less


def pivots_of(inverse: Matrix) -> list[float]:
    """[H_F^-1]_jj of each column j when all before it are gone."""
    pivots = []
    for column in range(len(inverse)):
        pivots.append(float(inverse[column, column]))
        inverse = eliminated(inverse, column)
    return pivots


def ranking(weight: Matrix, pivots: list[float], groups: list[range]) -> list[int]:
    """Groups of full size, least salient first."""
    whole = [index for index, group in enumerate(groups) if len(group) == len(groups[0])]
    salience = {
        index: math.fsum(float(row[column]) ** 2 / pivots[column] for row in weight for column in groups[index])
        for index in whole
    }
    return sorted(whole, key=lambda index: (salience[index], index))


def allocation(order: list[int], pairs: int, num_groups: int, bits: int) -> list[int]:
    """Bits per group."""
    lowest, highest = order[:pairs], order[len(order) - pairs :]
    return [bits - (index in lowest) + (index in highest) for index in range(num_groups)]


def allocation_errors(
    weight: Matrix, bias: Matrix | None, sample: Matrix, order: list[int], groups: list[range], settings: Settings
) -> dict[int, float]:
    """Mean divergence for each number of pairs that may be chosen, every allocation from scratch."""
    last = max(len(order) // 2 - 1, 0)
    first = 0 if settings.include_uniform or last == 0 else 1
    offset = np.zeros(len(weight)) if bias is None else bias.astype(np.float64)
    errors = {}
    for pairs in range(first, last + 1):
        bits = allocation(order, pairs, len(groups), settings.bits)
        rounded = np.zeros_like(weight)
        for index, group in enumerate(groups):
            for row in range(len(weight)):
                values = [float(weight[row, column]) for column in group]
                scale, zero = fit(values, bits[index], settings)
                for column, value in zip(group, values, strict=True):
                    code = grids.encode(value, scale, zero, bits[index])
                    rounded[row, column] = grids.decode(code, scale, zero)
        total = 0.0
        for token in sample:
            quantized_output = rounded @ token + (offset if settings.bias_in_allocation else 0)
            total += divergence(quantized_output, weight @ token + offset, settings.probability_floor)
        errors[pairs] = total / len(sample)
    return errors


def divergence(quantized: Matrix, reference: Matrix, floor: float) -> float:
    """KL(softmax(quantized) || softmax(reference)), of probabilities raised to a floor."""
    logs = []
    for logits in (quantized, reference):
        shifted = [float(logit) - float(max(logits)) for logit in logits]
        log_sum = math.log(math.fsum(math.exp(logit) for logit in shifted))
        logs.append([max(logit - log_sum, math.log(floor) if floor else -math.inf) for logit in shifted])
    return math.fsum(math.exp(ours) * (ours - theirs) for ours, theirs in zip(*logs, strict=True))


def fit(values: list[float], bits: int, settings: Settings) -> tuple[float, float]:
    """The grid of the range of one row of a group."""
    if bits > 1 or settings.centred_binary:
        return grids.fit_group(values, bits, scale_dtype=settings.scale_dtype)
    mean = math.fsum(values) / len(values)
    magnitude = math.fsum(abs(value) for value in values) / len(values)
    scale = max(grids.stored(2 * magnitude, settings.scale_dtype), grids.smallest(settings.scale_dtype))
    return scale, grids.stored(0.5 - mean / scale, settings.scale_dtype)


def calibrate(
    weight: Matrix, pivots: list[float], bits: int, settings: Settings, stale: bool = False
) -> list[tuple[float, float]]:
    """Scale and zero of each row of a group."""
    weighting = weighting_of(weight, pivots, settings.salient_weight)
    found = []
    for row, weights in zip(weight, weighting, strict=True):
        values = [float(value) for value in row]
        best, best_error = fit(values, bits, settings), math.inf
        for factor in factors(settings) if bits > 1 else []:
            candidate = fit([factor * value for value in values], bits, settings)
            if stale:
                candidate = candidate[0], 2.0 ** (bits - 1)
            error = search_error(values, weights, *candidate, bits)
            if error < best_error:
                best, best_error = candidate, error
        found.append(best)
    return found


def factors(settings: Settings) -> list[float]:
    """1, then upwards, then downwards."""
    steps = range(1, settings.search_steps + 1)
    reach = [settings.search_range * step / settings.search_steps for step in steps]
    return [1.0, *(1 + step for step in reach), *(1 - step for step in reach)]


def search_error(values: list[float], weights: list[float], scale: float, zero: float, bits: int) -> float:
    """Weighted sum of |q - w|^2.4."""
    terms = []
    for value, weight in zip(values, weights, strict=True):
        code = grids.encode(value, scale, zero, bits)
        terms.append(weight * abs(grids.decode(code, scale, zero) - value) ** 2.4)
    return math.fsum(terms)


def weighting_of(weight: Matrix, pivots: list[float], salient_weight: float) -> list[list[float]]:
    """The weight of each element of a group, by the z-score of its salience."""
    salience = [[float(value) ** 2 / pivot for value, pivot in zip(row, pivots, strict=True)] for row in weight]
    pool = [value for row in salience for value in row]
    mean = math.fsum(pool) / len(pool)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in pool) / max(len(pool) - 1, 1))
    return [[salient_weight if value - mean > 2 * deviation else 1.0 for value in row] for row in salience]
