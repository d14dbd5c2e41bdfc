"""Activation grids as plain float64 loops, one value at a time; no tensor code shared with `quantizers`.

Symmetric: codes -k to k with k = 2^(b-1) - 1, a step of max|x| / k. Asymmetric: codes 0 to 2^b - 1 over the range from
min to max, forced to contain 0. Either range is shrunk by the clip ratio first; no step is below 1e-5.
"""

from __future__ import annotations


def fit(low: float, high: float, bits: int, symmetric: bool, clip_ratio: float = 1.0) -> tuple[float, float]:
    """The step, and where 0 lies in steps above the lowest value, before it is rounded to a code."""
    low, high = clip_ratio * low, clip_ratio * high
    if symmetric:
        return max(max(abs(low), abs(high)) / (2 ** (bits - 1) - 1), 1e-5), 0.0
    low, high = min(low, 0.0), max(high, 0.0)
    step = max((high - low) / (2**bits - 1), 1e-5)
    return step, -low / step


def ends(bits: int, symmetric: bool, zero_steps: float) -> tuple[int, int]:
    """The least and the largest value, in steps."""
    if symmetric:
        return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    zero = round(zero_steps)  # halves to even
    return -zero, 2**bits - 1 - zero


def rounded(value: float, step: float, least: int, largest: int) -> int:
    """The value's nearest whole number of steps within the ends; halves to even."""
    return min(max(round(value / step), least), largest)
