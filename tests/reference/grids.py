"""Uniform grids as plain float64 loops: one group of weights at a time, no tensor code shared with `quantizers`.

Written from the formulas in the docstring of `quantizers/grid.py`.
"""

from __future__ import annotations

import math

import torch

# GPTQ's convention, by whether it is symmetric.
CONVENTION = {True: "gptq-sym", False: "gptq-asym"}

Fit = tuple[float, float]  # scale and zero


def stored(value: float, scale_dtype: str) -> float:
    """The nearest number of the storage dtype."""
    return float(torch.tensor(value, dtype=torch.float64).to(getattr(torch, scale_dtype)))


def smallest(scale_dtype: str) -> float:
    """The smallest scale in use: below it, a scale is raised to it."""
    return {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126}[scale_dtype]


def fit_group(
    weights: list[float], bits: int, convention: str = "gptq-asym", scale_dtype: str = "float16", shrink: float = 1.0
) -> Fit:
    """Scale and zero of one group of one row, whose range is multiplied by `shrink` first."""
    symmetric = convention.split("-")[1] == "sym"
    if bits == 1:
        return _fit_binary(weights, symmetric, scale_dtype)
    max_code, half = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        reach = shrink * (max(abs(weight) for weight in weights) or 1.0)
        if convention in ("gptaq-sym", "sq-sym"):
            return _scale(reach / (half - 1), scale_dtype), float(half)
        slips = convention == "gptq-sym-released" and min(weights) >= 0 and max(weights) > 0
        return _scale((reach if slips else 2 * reach) / max_code, scale_dtype), float(half)
    low, high = min(weights), max(weights)
    if convention == "gptq-asym" or low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high == 0:
        low, high = -1.0, 1.0
    low, high = shrink * low, shrink * high
    scale = _scale((high - low) / max_code, scale_dtype)
    zero = float(round(-low / scale))  # halves to even
    return scale, min(max(zero, 0.0), float(max_code))


def shrunk_fits(weights: list[float], bits: int, convention: str, scale_dtype: str) -> list[Fit]:
    """The candidates of the mse search, ranges times 1.00, 0.99, ... 0.21; the first of the least `loss` is meant."""
    return [fit_group(weights, bits, convention, scale_dtype, percent / 100) for percent in range(100, 20, -1)]


def loss(weights: list[float], scale: float, zero: float, bits: int) -> float:
    """What the mse search minimizes: the sum of |error|^2.4."""
    return math.fsum(abs(decode(encode(weight, scale, zero, bits), scale, zero) - weight) ** 2.4 for weight in weights)


def _fit_binary(weights: list[float], symmetric: bool, scale_dtype: str) -> Fit:
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
    weight: list[list[float]],
    bits: int,
    group_size: int = 0,
    convention: str = "gptq-asym",
    scale_dtype: str = "float16",
) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
    """Codes [row][column], scales and zeros [row][group] of a matrix."""
    codes, scales, zeros = [], [], []
    for row in weight:
        row_codes, row_scales, row_zeros = [], [], []
        for columns in groups_of(len(row), group_size):
            scale, zero = fit_group([row[column] for column in columns], bits, convention, scale_dtype)
            row_codes += [encode(row[column], scale, zero, bits) for column in columns]
            row_scales.append(scale)
            row_zeros.append(zero)
        codes.append(row_codes)
        scales.append(row_scales)
        zeros.append(row_zeros)
    return codes, scales, zeros
