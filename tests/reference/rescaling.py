"""SmoothQuant's and AWQ's scales in float64, as plain loops over channels.

Sources: Xiao et al. 2023, arXiv:2211.10438, eq. 4; Lin et al. 2023, arXiv:2306.00978, section 3.2.
"""

from __future__ import annotations

import math

from tests.reference import grids


def smoothing_scale(max_abs: list[float], weights: list[list[list[float]]], alpha: float) -> list[float]:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), over all weights [linear][row][column]."""
    scales = []
    for column, reach in enumerate(max_abs):
        largest = 1e-5
        for weight in weights:
            for row in weight:
                largest = max(largest, abs(row[column]))
        scales.append(max(max(reach, 1e-5) ** alpha / largest ** (1 - alpha), 1e-5))
    return scales


def awq_scale(mean_abs: list[float], ratio: float) -> list[float]:
    """x^r, floored at 1e-4 and centred."""
    scales = [max(value**ratio, 1e-4) for value in mean_abs]
    centre = math.sqrt(max(scales) * min(scales))
    return [scale / centre for scale in scales]


def awq_duo_scale(
    mean_abs: list[float], weights: list[list[list[float]]], ratio: float, group_size: int
) -> list[float]:
    """x^r / (w^(1-r) + 1e-4), likewise; w_j is the mean over all rows of |weight| relative to its group's largest."""
    rows = [row for weight in weights for row in weight]
    magnitude = [0.0] * len(mean_abs)
    for row in rows:
        for columns in grids.groups_of(len(row), group_size):
            reach = max(*(abs(row[column]) for column in columns), 1e-4)
            for column in columns:
                magnitude[column] += abs(row[column]) / reach / len(rows)
    scales = [
        max(value**ratio / (share ** (1 - ratio) + 1e-4), 1e-4)
        for value, share in zip(mean_abs, magnitude, strict=True)
    ]
    centre = math.sqrt(max(scales) * min(scales))
    return [scale / centre for scale in scales]


def rounded(
    weight: list[list[float]], scale: list[float], bits: int, group_size: int, convention: str = "gptq-asym"
) -> list[list[float]]:
    """Scaled, rounded to the grid with float32 scales, and scaled back."""
    scaled = [[value * factor for value, factor in zip(row, scale, strict=True)] for row in weight]
    codes, scales, zeros = grids.round_to_nearest(scaled, bits, group_size, convention, "float32")
    result = []
    for index, row in enumerate(codes):
        groups = grids.groups_of(len(row), group_size)
        values = [0.0] * len(row)
        for number, columns in enumerate(groups):
            for column in columns:
                values[column] = grids.decode(row[column], scales[index][number], zeros[index][number]) / scale[column]
        result.append(values)
    return result


def clip_bound(row: list[float], inputs: list[list[float]], bits: int, num_clips: int = 10) -> tuple[int, list[float]]:
    """The step i whose bound max|w| (1 - i / 20) gives the least squared output error of a group, and all errors."""
    reach = max(abs(value) for value in row)
    errors = []
    for step in range(num_clips):
        bound = reach * (1 - step / 20)
        clamped = [min(max(value, -bound), bound) for value in row]
        scale, zero = grids.fit_group(clamped, bits, scale_dtype="float32")
        change = [
            grids.decode(grids.encode(value, scale, zero, bits), scale, zero) - original
            for value, original in zip(clamped, row, strict=True)
        ]
        error = 0.0
        for token in inputs:
            error += sum(x * d for x, d in zip(token, change, strict=True)) ** 2 / len(inputs)
        errors.append(error)
    return errors.index(min(errors)), errors
