"""Grids: against plain float64 loops, and the promises that every grid keeps."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.errors import QuantizationError
from quantizers.grid import (
    CONVENTIONS,
    SCALE_DTYPES,
    Grid,
    decode,
    encode,
    expand_groups,
    fit_grid,
    fit_group,
    fitting_group_sizes,
    stored_scale,
)
from tests.reference import grids
from tests.reference.grids import CONVENTION

# Whole numbers of at most 12 bits times a power of two. With scales of at most 11 bits, w/scale is a tie exactly or
# stays 2**-12 away from one, and a scale is 2**-20 away from the middle of two float16: so float32 and float64
# must agree on every code, and the comparisons below demand equality.
_whole = st.one_of(st.integers(-9, 9), st.integers(-2048, 2048))


@st.composite
def matrices(draw, rows=3, columns=24):
    height, width = draw(st.integers(1, rows)), draw(st.integers(1, columns))
    exponents = st.integers(-30, 3)  # 2**-30 underflows every float16 scale
    sign = draw(st.sampled_from(["any", "negative", "positive", "zero", "constant"]))
    matrix = []
    for _ in range(height):
        unit = 2.0 ** draw(exponents)
        row = [value * unit for value in draw(st.lists(_whole, min_size=width, max_size=width))]
        if sign == "negative":
            row = [-abs(value) for value in row]
        elif sign == "positive":
            row = [abs(value) for value in row]
        elif sign == "zero":
            row = [0.0] * width
        elif sign == "constant":
            row = [row[0]] * width
        matrix.append(row)
    return torch.tensor(matrix, dtype=torch.float32)


@st.composite
def grids_for(draw, columns, min_bits=1):
    return Grid(
        bits=draw(st.integers(min_bits, 8)),
        group_size=draw(st.integers(0, columns)),
        convention=draw(st.sampled_from(CONVENTIONS)),
        scale_dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        tail_group=True,
    )


def quantized(weight, grid):
    """Codes, decoded values, and scale and zero per column."""
    scale, zero = (expand_groups(part, weight.shape[1], grid) for part in fit_grid(weight, grid))
    codes = encode(weight, scale, zero, grid)
    return codes, decode(codes, scale, zero), scale, zero


@given(st.data(), matrices())
def test_equals_the_reference(data, weight):
    grid = data.draw(grids_for(weight.shape[1], min_bits=2))
    if grid.scale_dtype == "float32":
        grid = dataclasses.replace(grid, scale_dtype="float16")
    codes, scales, zeros = grids.round_to_nearest(
        weight.tolist(), grid.bits, grid.group_size, grid.convention, grid.scale_dtype
    )
    scale, zero = fit_grid(weight, grid)
    assert scale.tolist() == scales
    assert zero.tolist() == zeros
    assert quantized(weight, grid)[0].int().tolist() == codes


@given(st.data(), matrices())
def test_float32_scales_equal_the_reference_within_float32(data, weight):
    convention = data.draw(st.sampled_from(CONVENTIONS))
    grid = Grid(bits=data.draw(st.integers(2, 8)), convention=convention, scale_dtype="float32")
    _, scales, _ = grids.round_to_nearest(weight.tolist(), grid.bits, 0, convention, "float32")
    torch.testing.assert_close(fit_grid(weight, grid)[0], torch.tensor(scales), rtol=3e-7, atol=0)


@given(matrices(), st.sampled_from(CONVENTIONS), st.sampled_from(["float16", "bfloat16", "float32"]))
def test_binary_levels_equal_the_reference(weight, convention, scale_dtype):
    grid = Grid(bits=1, convention=convention, scale_dtype=scale_dtype)
    _, scales, zeros = grids.round_to_nearest(weight.tolist(), 1, 0, convention, scale_dtype)
    scale, zero = fit_grid(weight, grid)
    # Means are rounded before they are stored: float32's sums of 24 numbers, then one unit of storage either way.
    step = torch.finfo(SCALE_DTYPES[scale_dtype]).eps + 3e-6
    torch.testing.assert_close(scale, torch.tensor(scales), rtol=2 * step, atol=grids.smallest(scale_dtype))
    expected = torch.tensor([[s * (code - z) for code in (0, 1)] for (s,), (z,) in zip(scales, zeros, strict=True)])
    levels = decode(torch.tensor([[0.0, 1.0]]), scale, zero)
    bound = 4 * step * weight.abs().amax(1, keepdim=True) + 2 * grids.smallest(scale_dtype)
    assert ((levels - expected).abs() <= bound).all()


@given(st.data(), matrices())
def test_every_grid(data, weight):
    """Codes in range, scales stored exactly, the nearest value inside the range, the end of the range outside it."""
    grid = data.draw(grids_for(weight.shape[1]))
    codes, decoded, scale, zero = quantized(weight, grid)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= grid.max_code
    assert scale.dtype == torch.float32
    assert (scale > 0).all()
    dtype = SCALE_DTYPES[grid.scale_dtype]
    assert torch.equal(scale.to(dtype).float(), scale)
    if grid.binary and not grid.symmetric:
        assert torch.equal(zero.to(dtype).float(), zero)
    elif not grid.symmetric:
        assert torch.equal(zero, zero.round().clamp(0, grid.max_code))
    else:
        assert (zero == grid.fixed_zero).all()
    low, high = decode(torch.zeros_like(zero), scale, zero), decode(torch.full_like(zero, grid.max_code), scale, zero)
    slack = 1e-6 * (scale * zero.abs() + weight.abs() + scale) + 1e-44
    nearest = weight.clamp(low, high)
    assert ((decoded - nearest).abs() <= scale / 2 + slack).all()
    outside = (weight < low) | (weight > high)
    assert ((decoded - nearest).abs()[outside] <= slack[outside]).all()


@given(st.data(), matrices())
def test_zero_is_representable(data, weight):
    grid = data.draw(grids_for(weight.shape[1], min_bits=2))
    scale, zero = (expand_groups(part, weight.shape[1], grid) for part in fit_grid(weight, grid))
    codes = encode(torch.zeros_like(weight), scale, zero, grid)
    assert (decode(codes, scale, zero) == 0).all()


@given(matrices(), st.integers(2, 8))
def test_asymmetric_range_is_covered(weight, bits):
    """Nothing is clipped by more than the rounding of the zero (half a step) and of the stored scale."""
    grid = Grid(bits=bits, scale_dtype="float32")
    _, decoded, scale, _ = quantized(weight, grid)
    assert ((decoded - weight).abs() <= scale * (1 + 1e-4)).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_symmetric_rows_of_one_sign_keep_their_range(bits, sign):
    """The released GPTQ code halves the scale of a row without negative values, and clips its upper half."""
    weight = sign * torch.tensor([[0.25, 0.5, 1.0]])
    grid = Grid(bits=bits, convention="gptq-sym", scale_dtype="float32")
    _, decoded, scale, zero = quantized(weight, grid)
    assert scale.unique().item() == pytest.approx(2 / grid.max_code)
    assert zero.unique().item() == 2 ** (bits - 1)
    # The largest positive value is clipped by half a step, the largest negative one lies half a step inside.
    assert ((decoded - weight).abs() <= scale / 2 + 1e-6).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_rows_of_zeros_stay_zero(bits, symmetric, scale_dtype):
    weight = torch.zeros(2, 6)
    _, decoded, scale, _ = quantized(weight, Grid(bits=bits, convention=CONVENTION[symmetric], scale_dtype=scale_dtype))
    if bits == 1 and symmetric:  # no level is 0: the two levels are as close to it as can be stored
        assert decoded.abs().max() <= 2.0**-25
        assert (scale > 0).all()
    else:
        assert (decoded == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.75, -0.75])
@pytest.mark.parametrize("bits", range(1, 9))
def test_constant_rows(bits, value, symmetric):
    weight = torch.full((1, 5), value)
    grid = Grid(bits=bits, convention=CONVENTION[symmetric], scale_dtype="float32")
    _, decoded, scale, _ = quantized(weight, grid)
    bound = scale / 2 if symmetric and bits > 1 else torch.zeros_like(scale)
    assert ((decoded - weight).abs() <= bound + 1e-6).all()


def test_single_column_and_one_wide_groups():
    weight = torch.tensor([[0.3], [-0.7], [0.0]])
    for size in (0, 1):
        _, decoded, scale, _ = quantized(weight, Grid(bits=4, group_size=size))
        torch.testing.assert_close(decoded, weight, rtol=1e-3, atol=0)
        assert scale.shape == weight.shape


def test_outlier_takes_the_range():
    weight = torch.tensor([[0.01, -0.02, 1000.0, 0.03]])
    codes, decoded, _, _ = quantized(weight, Grid(bits=4))
    assert codes.tolist() == [[0, 0, 15, 0]]
    assert decoded[0, 2].item() == pytest.approx(1000, rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_below_float16_are_raised_to_its_smallest(symmetric):
    weight = torch.tensor([[1e-9, -1e-9, 5e-10]])
    _, decoded, scale, _ = quantized(weight, Grid(bits=8, convention=CONVENTION[symmetric]))
    assert (scale == 2.0**-24).all()
    assert (decoded == 0).all()


def test_smallest_scales_are_normal_in_float32():
    """A device that flushes subnormal numbers to zero would otherwise divide by zero."""
    for scale_dtype in SCALE_DTYPES:
        scale = stored_scale(torch.zeros(1), Grid(bits=4, scale_dtype=scale_dtype))
        assert scale.item() >= torch.finfo(torch.float32).smallest_normal
        assert scale.item() == grids.smallest(scale_dtype)


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_overflow_is_refused_with_the_remedy(bits, symmetric):
    weight = torch.tensor([[4e6, -4e6, 1.0]])
    with pytest.raises(QuantizationError, match=r"does not fit float16; use scale_dtype: float32"):
        fit_grid(weight, Grid(bits=bits, convention=CONVENTION[symmetric]))
    scale, _ = fit_grid(weight, Grid(bits=bits, convention=CONVENTION[symmetric], scale_dtype="float32"))
    assert torch.isfinite(scale).all()


def test_overflow_names_the_scale_that_overflows():
    with pytest.raises(QuantizationError, match="a scale of 1e"):
        stored_scale(torch.tensor([1.0, 1e5]), Grid(bits=4))
    assert stored_scale(torch.tensor([65504.0]), Grid(bits=4)).item() == 65504.0


def test_groups_do_not_look_at_one_another():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 20, generator=generator)
    grid = Grid(bits=3, group_size=8, tail_group=True)
    scale, zero = fit_grid(weight, grid)
    assert scale.shape == zero.shape == (4, 3)
    for index, columns in enumerate((slice(0, 8), slice(8, 16), slice(16, 20))):
        group_scale, group_zero = fit_group(weight[:, columns], grid)
        assert torch.equal(scale[:, index], group_scale)
        assert torch.equal(zero[:, index], group_zero)
    expanded = expand_groups(scale, 20, grid)
    assert torch.equal(expanded[:, [0, 7, 8, 15, 16, 19]], scale[:, [0, 0, 1, 1, 2, 2]])
    assert expanded.shape == (4, 20)


def test_by_hand():
    weight = torch.tensor([[-1.0, 0.0, 0.6, 2.0]])
    codes, decoded, scale, zero = quantized(weight, Grid(bits=2))  # 3 / 3 = 1 per step, zero at code 1
    assert (codes.tolist(), decoded.tolist()) == ([[0, 1, 2, 3]], [[-1.0, 0.0, 1.0, 2.0]])
    assert (scale.unique().item(), zero.unique().item()) == (1.0, 1.0)
    codes, decoded, scale, zero = quantized(weight, Grid(bits=2, convention="gptq-sym", scale_dtype="float32"))
    torch.testing.assert_close(decoded, torch.tensor([[-4 / 3, 0.0, 0.0, 4 / 3]]))  # scale 4/3: levels -8/3 to 4/3
    assert codes.tolist() == [[1, 2, 2, 3]]
    codes, decoded, scale, zero = quantized(weight, Grid(bits=1))  # mean 0.4, mean |w - mean| 0.9
    torch.testing.assert_close(decoded, torch.tensor([[-0.5, -0.5, 1.3, 1.3]]), rtol=0, atol=2e-3)
    codes, decoded, scale, zero = quantized(weight, Grid(bits=1, convention="gptq-sym"))  # mean |w| 0.9
    torch.testing.assert_close(decoded, torch.tensor([[-0.9, -0.9, 0.9, 0.9]]), rtol=0, atol=2e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_binary_magnitude_is_least_squares(symmetric):
    """No other pair of levels mean -+ a is closer to the weights (Rastegari et al. 2016)."""
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)) + (0.0 if symmetric else 0.3)
    _, decoded, _, _ = quantized(weight, Grid(bits=1, convention=CONVENTION[symmetric], scale_dtype="float32"))
    mean = 0.0 if symmetric else weight.mean()
    best = (weight - decoded).square().sum()
    for stretch in (0.9, 0.99, 1.01, 1.1):
        assert (weight - (mean + stretch * (decoded - mean))).square().sum() > best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits = 0 is outside 1 to 8"),
        ({"bits": 9}, "bits = 9 is outside 1 to 8"),
        ({"bits": 4, "group_size": -1}, "group_size = -1 is negative; 0 means per channel"),
        ({"bits": 4, "scale_dtype": "float8"}, "'float8' is none of float16, bfloat16, float32"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(QuantizationError, match=message):
        Grid(**options)


def test_group_sizes_that_do_not_fit():
    with pytest.raises(
        QuantizationError, match=r"group_size = 128 does not divide the 576 inputs of a\.b; use 96 or 64 or 48 or"
    ):
        Grid(bits=4, group_size=128).check_fits(576, "a.b")
    with pytest.raises(QuantizationError, match=r"128 is larger than the 64 inputs of c; use 64 or 32 or 16 or per_ch"):
        Grid(bits=4, group_size=128, tail_group=True).check_fits(64, "c")
    for grid in (
        Grid(bits=4),
        Grid(bits=4, group_size=64),
        Grid(bits=4, group_size=576),
        Grid(bits=4, group_size=128, tail_group=True),
    ):
        grid.check_fits(576, "a.b")
    assert fitting_group_sizes(7) == "1"


@given(st.integers(1, 4096))
def test_proposed_group_sizes_fit(in_features):
    for size in fitting_group_sizes(in_features).split(" or "):
        Grid(bits=4, group_size=int(size)).check_fits(in_features, "layer")


def test_gptaq_sym_and_sq_sym_do_not_clip_the_largest_weight():
    weight = torch.tensor([[0.7, -0.1, 0.36, 0.0]])
    for convention in ("gptaq-sym", "sq-sym"):
        grid = Grid(bits=4, convention=convention, scale_dtype="float32")
        _, decoded, scale, _ = quantized(weight, grid)
        assert scale[0, 0].item() == pytest.approx(0.1)
        assert decoded[0].tolist() == pytest.approx([0.7, -0.1, 0.4, 0.0])
    _, clipped, _, _ = quantized(weight, Grid(bits=4, convention="gptq-sym", scale_dtype="float32"))
    assert clipped[0, 0].item() == pytest.approx(0.7 * 14 / 15)


def test_the_released_slip_clips_one_signed_rows():
    """Range [0, r] with the zero in the middle: everything above about r / 2 is clipped."""
    weight = torch.tensor([[0.2, 0.4, 0.8, 1.0], [-0.2, 0.4, 0.8, 1.0]])
    _, decoded, scale, _ = quantized(weight, Grid(bits=4, convention="gptq-sym-released", scale_dtype="float32"))
    assert scale[:, 0].tolist() == pytest.approx([1 / 15, 2 / 15])
    assert decoded[0].max().item() == pytest.approx(7 / 15)
    assert torch.equal(
        decoded[1:], quantized(weight[1:], Grid(bits=4, convention="gptq-sym", scale_dtype="float32"))[1]
    )


def test_awq_asym_does_not_force_zero_into_the_range():
    """By hand: s = (0.6 - -0.9) / 15; of one sign the zero is clamped, which shifts the group, as released."""
    weight = torch.tensor([[-0.9, 0.6, 0.0], [0.5, 0.65, 0.8], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
    _, decoded, scale, zero = quantized(weight, Grid(bits=4, convention="awq-asym", scale_dtype="float32"))
    assert scale[:2, 0].tolist() == pytest.approx([0.1, 0.02])
    assert zero[:2, 0].tolist() == [9.0, 0.0]
    assert decoded[1].tolist() == pytest.approx([0.3, 0.3, 0.3])
    assert decoded[2].tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert decoded[3].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_search_is_the_best_of_its_eighty_shrinks(convention, bits):
    """Against a loop over the candidates with grids fitted to weights clipped to the shrunk range's ends."""
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(bits)) ** 3
    searched = Grid(bits=bits, convention=convention, mse_search=True, group_size=16, tail_group=True)
    plain = dataclasses.replace(searched, mse_search=False)

    def errors(grid):
        _, decoded, _, _ = quantized(weight, grid)
        return [(decoded - weight)[:, first : first + 16].abs().double().pow(2.4).sum(1) for first in range(0, 40, 16)]

    scale, zero = fit_grid(weight, searched)
    for group, (found, unsearched) in enumerate(zip(errors(searched), errors(plain), strict=True)):
        assert (found <= unsearched * (1 + 1e-6)).all()
        columns = weight[:, 16 * group : 16 * group + 16]
        low, high = columns.amin(1), columns.amax(1)
        if convention != "awq-asym":
            low, high = low.clamp(max=0), high.clamp(min=0)
        for row in range(6):
            best = math.inf
            for step in range(80):
                shrink = 1 - step / 100
                ends = torch.stack([low[row], high[row]]) * shrink
                one_scale, one_zero = fit_group(ends[None], plain)
                codes = encode(columns[row : row + 1], one_scale[:, None], one_zero[:, None], plain)
                error = (decode(codes, one_scale[:, None], one_zero[:, None]) - columns[row]).abs().double()
                best = min(best, error.pow(2.4).sum().item())
            assert found[row].item() == pytest.approx(best, rel=1e-4)
    assert scale.shape == zero.shape == (6, 3)


def test_unknown_conventions_are_refused():
    with pytest.raises(QuantizationError, match=r"convention = 'awq-sym' is none of .*; did you mean 'awq-asym'"):
        Grid(bits=4, convention="awq-sym")
    with pytest.raises(QuantizationError, match="mse_search has no range to shrink at 1 bit"):
        Grid(bits=1, mse_search=True)


def test_a_grid_survives_json():
    grid = Grid(bits=3, group_size=16, convention="sq-sym", mse_search=True, scale_dtype="bfloat16", tail_group=True)
    assert Grid(**json.loads(json.dumps(dataclasses.asdict(grid)))) == grid
