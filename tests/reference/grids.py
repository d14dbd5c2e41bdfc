"""Uniform grids as plain float64 loops: one group of weights at a time, no tensor code shared with `quantizers`."""

from __future__ import annotations

import math

import torch

# The convention that these loops follow, by whether it is symmetric.
CONVENTION = {True: "gptq-sym", False: "gptq-asym"}


def stored(value: float, scale_dtype: str) -> float:
    """The nearest number of the storage dtype."""
    return float(torch.tensor(value, dtype=torch.float64).to(getattr(torch, scale_dtype)))


def smallest(scale_dtype: str) -> float:
    """The smallest scale in use: below it, a scale is raised to it."""
    return {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126}[scale_dtype]


def fit_group(
    weights: list[float], bits: int, symmetric: bool = False, scale_dtype: str = "float16"
) -> tuple[float, float]:
    """Scale and zero of one group of one row."""
    max_code = 2**bits - 1
    if bits == 1:
        return _fit_binary(weights, symmetric, scale_dtype)
    if symmetric:
        reach = 0.0
        for weight in weights:
            reach = max(reach, abs(weight))
        if reach == 0:
            reach = 1.0
        return _scale(2 * reach / max_code, scale_dtype), (max_code + 1) / 2
    low, high = 0.0, 0.0
    for weight in weights:
        low, high = min(low, weight), max(high, weight)
    if low == high == 0:
        low, high = -1.0, 1.0
    scale = _scale((high - low) / max_code, scale_dtype)
    zero = float(round(-low / scale))  # halves to even
    return scale, min(max(zero, 0.0), float(max_code))


def _fit_binary(weights: list[float], symmetric: bool, scale_dtype: str) -> tuple[float, float]:
    mean = 0.0 if symmetric else math.fsum(weights) / len(weights)
    spread = math.fsum(abs(weight - mean) for weight in weights) / len(weights)
    if symmetric:
        return _scale(2 * spread, scale_dtype), 0.5
    if spread <= 1e-4 * abs(mean):  # a constant group: levels 0 and the constant
        return _scale(abs(mean) or 1.0, scale_dtype), 1.0 if mean < 0 else 0.0
    scale = _scale(2 * spread, scale_dtype)
    return scale, stored(0.5 - mean / scale, scale_dtype)


def _scale(scale: float, scale_dtype: str) -> float:
    return max(stored(scale, scale_dtype), smallest(scale_dtype))


def encode(weight: float, scale: float, zero: float, bits: int) -> int:
    """The code of one weight."""
    code = round(weight / scale + zero) if bits == 1 else round(weight / scale) + zero
    return int(min(max(code, 0), 2**bits - 1))


def decode(code: int, scale: float, zero: float) -> float:
    """The value of one code."""
    return scale * (code - zero)


def groups_of(in_features: int, group_size: int) -> list[range]:
    """Consecutive columns of each group; the last may be smaller; 0 is one group."""
    size = group_size or in_features
    return [range(start, min(start + size, in_features)) for start in range(0, in_features, size)]


def round_to_nearest(
    weight: list[list[float]], bits: int, group_size: int = 0, symmetric: bool = False, scale_dtype: str = "float16"
) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
    """Codes [row][column], scales and zeros [row][group] of a matrix."""
    codes, scales, zeros = [], [], []
    for row in weight:
        row_codes, row_scales, row_zeros = [], [], []
        for columns in groups_of(len(row), group_size):
            scale, zero = fit_group([row[column] for column in columns], bits, symmetric, scale_dtype)
            row_codes += [encode(row[column], scale, zero, bits) for column in columns]
            row_scales.append(scale)
            row_zeros.append(zero)
        codes.append(row_codes)
        scales.append(row_scales)
        zeros.append(row_zeros)
    return codes, scales, zeros
