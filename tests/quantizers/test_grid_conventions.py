"""Every convention, width, storage type and search, on rows of every awkward kind: bounds, exactness, the reference."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantizers.grid import (
    CONVENTIONS,
    SCALE_DTYPES,
    Grid,
    decode,
    encode,
    expand_groups,
    fit_grid,
    fit_group,
    round_to_grid,
)
from quantizers.rtn import round_to_nearest
from quantizers.uniform_weight import UniformWeight
from tests.reference import grids

KINDS = {
    "normal": lambda noise: 0.1 * noise,
    "zero": torch.zeros_like,
    "positive constant": lambda noise: noise[:1].abs().expand_as(noise),
    "negative constant": lambda noise: -noise[:1].abs().expand_as(noise),
    "positive": torch.abs,
    "negative": lambda noise: -noise.abs(),
    "far from zero": lambda noise: 3 + 0.1 * noise,
    "far below zero": lambda noise: -3 + 0.1 * noise,
    "outlier": lambda noise: torch.cat([1e4 * noise[:1], noise[1:]]),
    "small": lambda noise: 1e-6 * noise,
    "denormal": lambda noise: 1e-40 * noise,
}


def awkward(seed, columns):
    """A row of each kind."""
    noise = torch.randn(len(KINDS), columns, generator=torch.Generator().manual_seed(seed))
    return torch.stack([make(row) for make, row in zip(KINDS.values(), noise, strict=True)])


MATRICES = st.builds(awkward, st.integers(0, 10**6), st.integers(1, 20))
GROUP_SIZES = st.sampled_from([0, 1, 3, 8])  # most leave a tail


def largest_errors(weight_OK, scale, grid):
    """By how much the convention may miss a weight of each row, from its stored scale: half a step within the levels,
    and what of the range its levels leave out (stated here, not taken from the code)."""
    max_code, half = grid.max_code, 2 ** (grid.bits - 1)
    low, high = weight_OK.amin(1), weight_OK.amax(1)
    reach = weight_OK.abs().amax(1)
    one_signed = (low >= 0) | (high <= 0)
    # The range is as wide as the steps, but for the rounding of the scale; the zero is rounded by up to half a step.
    asymmetric = scale / 2 + (high.clamp(min=0) - low.clamp(max=0) - max_code * scale).clamp(min=0)
    # 2**b levels around a zero: one more below than above, so that the top is half a step short.
    symmetric = scale / 2 + (reach - max_code * scale / 2).clamp(min=0)
    whole = torch.maximum(scale / 2, reach - (half - 1) * scale)
    return {
        "gptq-asym": asymmetric,
        # Of one sign: as wide as the weights differ, but starting at 0, unless there is nothing to differ.
        "awq-asym": torch.where(
            one_signed & (low != high), torch.maximum(scale / 2, reach - max_code * scale), asymmetric
        ),
        "gptq-sym": symmetric,
        "gptq-sym-released": torch.where(low >= 0, whole, symmetric),  # whole: the upper half of the range is lost
        "gptaq-sym": whole,
        "sq-sym": whole,
    }[grid.convention]


def check_promises(weight, grid):
    """What every grid keeps; returns what was decoded."""
    columns = weight.shape[1]
    scale_OG, zero_OG = fit_grid(weight, grid)
    assert scale_OG.shape == zero_OG.shape == (len(weight), grid.num_groups(columns))
    scale, zero = (expand_groups(part, columns, grid) for part in (scale_OG, zero_OG))
    dtype = SCALE_DTYPES[grid.scale_dtype]
    assert scale.dtype == torch.float32
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()
    assert torch.equal(scale.to(dtype).float(), scale)
    if grid.symmetric:
        assert (zero == (0.5 if grid.bits == 1 else 2 ** (grid.bits - 1))).all()
    elif grid.binary:
        assert torch.equal(zero.to(dtype).float(), zero)
    else:
        assert torch.equal(zero, zero.round().clamp(0, grid.max_code))

    codes = encode(weight, scale, zero, grid)
    assert torch.equal(codes, codes.round().clamp(0, grid.max_code))
    decoded = decode(codes, scale, zero)
    assert torch.isfinite(decoded).all()
    low, high = scale * (0 - zero), scale * (grid.max_code - zero)
    slack = 2e-6 * (scale * (grid.max_code + zero.abs()) + weight.abs()) + 1e-44
    assert ((decoded - weight.clamp(low, high)).abs() <= scale / 2 * (weight >= low) * (weight <= high) + slack).all()

    for code in {0, 1, grid.max_code // 2, grid.max_code - 1, grid.max_code}:  # values on the grid come back
        value = decode(torch.full_like(zero, code), scale, zero)
        assert torch.equal(encode(value, scale, zero, grid), torch.full_like(zero, code))

    made = UniformWeight(
        grid=grid, codes_OI=codes.to(torch.uint8), scale_OG=scale_OG, zero_OG=None if grid.symmetric else zero_OG
    )
    assert torch.equal(UniformWeight.unpack(made.pack(), made.spec(), made.shape).decode(), decoded)
    if not grid.mse_search:  # which takes long, and is no concern of theirs
        assert torch.equal(round_to_nearest(weight, grid).decode(), decoded)
        assert torch.equal(round_to_grid(weight, grid), decoded)
    return scale_OG, decoded


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=4)
@given(MATRICES, GROUP_SIZES)
def test_promises(convention, bits, weight, group_size):
    group_size = min(group_size, weight.shape[1])
    for scale_dtype in SCALE_DTYPES:
        grid = Grid(bits=bits, group_size=group_size, convention=convention, scale_dtype=scale_dtype, tail_group=True)
        scale_OG, decoded = check_promises(weight, grid)
        if grid.binary:
            continue
        parts = grids.groups_of(weight.shape[1], group_size)
        for index, part in enumerate(parts):
            bound = largest_errors(weight[:, part], scale_OG[:, index], grid)
            error = (decoded - weight)[:, part].abs().amax(1)
            slack = 2e-6 * (grid.max_code * scale_OG[:, index] + weight[:, part].abs().amax(1))
            assert (error <= bound + slack).all()

        searched_OG, nearer = check_promises(weight, dataclasses.replace(grid, mse_search=True))
        assert (searched_OG <= scale_OG).all()
        for index, part in enumerate(parts):
            before, after = ((values - weight)[:, part].abs().double().pow(2.4).sum(1) for values in (decoded, nearer))
            noise = len(part) * (1e-6 * weight[:, part].abs().amax(1).double()) ** 2.4
            assert (after <= before * (1 + 1e-4) + noise).all()
            unchanged = before == 0  # of equals the first: nothing is shrunk for nothing
            assert torch.equal(searched_OG[unchanged, index], scale_OG[unchanged, index])


@pytest.mark.parametrize("mse_search", [False, True])
@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=12)
@given(st.integers(0, 10**6), st.integers(1, 10), st.integers(2, 8), st.sampled_from(list(SCALE_DTYPES)))
def test_fits_equal_the_reference(convention, mse_search, seed, columns, bits, scale_dtype):
    """By what they attain, in float64: candidates of the search may tie.

    float32 rounds a range by less than 3e-7, which may tip a scale to the next number of its storage type; so the
    reference also fits ranges that are that much smaller and larger, and the result must lie between.
    """
    grid = Grid(bits=bits, convention=convention, scale_dtype=scale_dtype, mse_search=mse_search)
    weight = awkward(seed, columns)
    fits = zip(*(part.tolist() for part in fit_group(weight, grid)), strict=True)
    for kind, row, (scale, zero) in zip(KINDS, weight.tolist(), fits, strict=True):
        expected = []
        for nudge in (1 - 3e-7, 1.0, 1 + 3e-7):
            nudged = [nudge * value for value in row]
            fitted = [grids.fit_group(nudged, bits, convention, scale_dtype)]
            if mse_search:
                fitted = grids.shrunk_fits(nudged, bits, convention, scale_dtype)
                assert len(fitted) == 80
            expected.append(min(grids.loss(row, *fit, bits) for fit in fitted))
        noise = columns * (1e-6 * max(abs(value) for value in row)) ** 2.4
        found = grids.loss(row, scale, zero, bits)
        assert min(expected) * (1 - 1e-4) - noise <= found <= max(expected) * (1 + 1e-4) + noise, kind


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=6)
@given(MATRICES)
def test_binary_levels_equal_the_reference_s(convention, scale_dtype, weight):
    """Means are sums in float32, and a stored scale or zero may be tipped to the next number of its type."""
    grid = Grid(bits=1, convention=convention, scale_dtype=scale_dtype)
    scale, zero = fit_group(weight, grid)
    for kind, row, *fit in zip(KINDS, weight.tolist(), scale.tolist(), zero.tolist(), strict=True):
        reach = max(abs(value) for value in row)
        slack = 4 * (torch.finfo(SCALE_DTYPES[scale_dtype]).eps + 3e-6) * reach + 2 * grids.smallest(scale_dtype)
        for code in (0, 1):
            expected = grids.decode(code, *grids.fit_group(row, 1, convention, scale_dtype))
            assert abs(grids.decode(code, *fit) - expected) <= slack, kind


@settings(max_examples=40)
@given(
    MATRICES,
    GROUP_SIZES,
    st.integers(1, 8),
    st.sampled_from(CONVENTIONS),
    st.sampled_from(list(SCALE_DTYPES)),
)
def test_codes_equal_the_reference_s(weight, group_size, bits, convention, scale_dtype):
    """Given the same scales and zeros, wherever float32 can tell which value is nearer."""
    grid = Grid(bits=bits, group_size=group_size, convention=convention, scale_dtype=scale_dtype, tail_group=True)
    columns = weight.shape[1]
    quantized = round_to_nearest(weight, grid)
    scale, zero = (expand_groups(part, columns, grid) for part in fit_grid(weight, grid))
    for row, scales, zeros, codes in zip(weight, scale, zero, quantized.codes_OI, strict=True):
        for value, one_scale, one_zero, code in zip(
            row.tolist(), scales.tolist(), zeros.tolist(), codes.tolist(), strict=True
        ):
            steps = value / one_scale + (one_zero if bits == 1 else 0)
            if abs(steps % 1 - 0.5) > 1e-4 + 1e-6 * abs(one_zero):
                assert code == grids.encode(value, one_scale, one_zero, bits)


@pytest.mark.parametrize(
    ("convention", "steps"),
    [
        ("gptq-asym", 3),
        ("awq-asym", 3),
        ("gptq-sym", 1.5),
        ("gptq-sym-released", 3),  # of one sign
        ("gptaq-sym", 1),
        ("sq-sym", 1),
    ],
)
def test_the_search_shrinks_to_a_fifth(convention, steps):
    """Most weights lie one step of the narrowest candidate, 0.21 of the range, away from zero."""
    weight = torch.tensor([0.0, 1.0] + 40000 * [0.21 / steps])
    scale, _ = fit_group(weight, Grid(bits=2, convention=convention, mse_search=True, scale_dtype="float32"))
    assert scale.item() == pytest.approx(0.21 / steps)
    weight = torch.tensor([0.0, 1.0] + 40000 * [0.2 / steps])  # 0.20 is no candidate
    scale, _ = fit_group(weight, Grid(bits=2, convention=convention, mse_search=True, scale_dtype="float32"))
    assert scale.item() >= 0.21 / steps * (1 - 1e-6)
