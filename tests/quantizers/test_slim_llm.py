"""SliM-LLM: against float64 loops over its equations, and what must hold whatever the data."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.errors import QuantizationError
from quantizers.gptq import Gptq, gptq
from quantizers.grid import Grid, decode, encode, fit_group
from quantizers.method import LinearGroup
from quantizers.mixed_weight import MixedWeight
from quantizers.slim_llm import SlimLlm, calibrate, salient
from quantizers.statistics import InputStatistics
from tests.quantizers.slim_problems import PRESETS, Problem, options, problem, settings
from tests.reference import gptq as gptq_reference
from tests.reference import slim_llm as reference


def compare(linear, method, lax_rows=1):
    """Compare bits, errors, codes, scales and zeros; return whether bits are mixed, and the share of equal rows."""
    quantized, expected = linear.quantize(method), linear.slowly(method)
    assert list(quantized.group_bits) == expected.bits
    errors = linear.errors(method) if method.bit_allocation else {}
    assert errors.keys() == expected.errors.keys()
    # A near tie of one code that falls on another side, which hangs on the processor, moves every allocation
    # that gives its group the same bits.
    off = sorted(abs(error / expected.errors[pairs] - 1) for pairs, error in errors.items())
    assert not off or (off[-1] < 5e-3 and off[(len(off) - 1) // 2] < 1e-3)
    ours = {name: getattr(quantized, name).double().numpy() for name in ("codes_OI", "scale_OG", "zero_OG")}
    differ = (ours["codes_OI"] != expected.codes).any(1)
    differ |= (ours["scale_OG"] != expected.scale).any(1) | (ours["zero_OG"] != expected.zero).any(1)
    assert differ.sum() <= lax_rows
    np.testing.assert_allclose(quantized.decode().numpy()[~differ], expected.weight[~differ], rtol=1e-6, atol=1e-7)
    found, slow = (
        gptq_reference.objective(linear.weight.numpy(), decoded, linear.hessian.numpy())
        for decoded in (quantized.decode().numpy(), expected.weight)
    )
    assert found == pytest.approx(slow, rel=0.02)
    return len(set(expected.bits)) > 1, 1 - differ.mean()


# float32 decides a near tie, of codes or of the errors of two scales, on another side than float64 now and then; from
# there on the row differs. The bits may not: how often, and how often they are mixed at all, is looked at below.
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("columns", [72, 68])  # 68 leaves a tail of 4
def test_equals_the_reference(preset, bits, columns):
    compare(problem(bits, columns=columns), options(bits, preset=preset), lax_rows=2)


@pytest.mark.parametrize(
    "fields",
    [
        {"salient_weight": 5.0},
        {"salient_weight": 0.0},
        {"search_steps": 7, "search_range": 0.4},
        {"probability_floor": 1e-2},
        {"include_uniform": False},
        {"bias_in_allocation": False},
        {"stale_symmetry": True},
        {"absolute_damping": 3.0, "damping": 0.1},
        {"bit_allocation": False},
        {"block_size": 3},
    ],
    ids=str,
)
def test_equals_the_reference_for_other_options(fields):
    compare(problem(2), options(3, **fields), lax_rows=2)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_equals_the_reference_in_other_dtypes(scale_dtype):
    linear = problem(5)
    quantized, expected = (run(options(3, scale_dtype=scale_dtype)) for run in (linear.quantize, linear.slowly))
    assert list(quantized.group_bits) == expected.bits
    assert (quantized.codes_OI.numpy() != expected.codes).any(1).sum() <= 2
    close = np.isclose(quantized.scale_OG.numpy(), expected.scale, rtol=2e-6, atol=0)
    assert (~close).any(1).sum() <= 2


def test_equals_the_reference_with_dead_inputs():
    dead = (0, 5, 16, 17, 18, 19, 20, 21, 22, 23, 47)  # one whole group among them
    linear = problem(3, dead=dead)
    compare(linear, options(4), lax_rows=2)
    assert (linear.quantize(options(4)).decode()[:, list(dead)] == 0).all()


def test_over_many_problems_nearly_all_rows_equal_the_reference():
    """Where groups matter unequally bits are mixed; where all matter alike they mostly stay equal."""
    mixed, shares = {0.0: 0, 1.0: 0}, []
    for spread, seed, bits in itertools.product(mixed, range(3), (2, 3)):
        found, share = compare(problem(100 + seed, spread=spread), options(bits), lax_rows=8)
        mixed[spread] += found
        shares.append(share)
    assert mixed[0.0] <= 3
    assert mixed[1.0] >= 5
    assert np.mean(shares) >= 0.97


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("group_size", [8, 24, 200])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_equal_bits_and_fitted_ranges_make_it_gptq(make_problem, bits, group_size, scale_dtype):
    """Exactly GPTQ with groups fitted as they are reached."""
    weight, hessian = make_problem(bits, 16, 200)
    method = options(bits, group_size, scale_dtype=scale_dtype, bit_allocation=False, search_steps=0)
    group = LinearGroup.of([weight], InputStatistics(hessian_II=hessian))
    outcome = method.quantize(group)
    expected, damping = gptq(weight, hessian, Gptq(grid=method.grid, act_order=False, static_groups=False))
    quantized = outcome.weights[0]
    assert outcome.damping == damping
    assert torch.equal(quantized.codes_OI, expected.codes_OI)
    assert torch.equal(quantized.scale_OG, expected.scale_OG)
    assert torch.equal(quantized.zero_OG, expected.zero_OG)
    assert torch.equal(quantized.decode(), expected.decode())


@pytest.mark.parametrize("salient_weight", [1.0, 4.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])  # in bfloat16 zeros, too, depend on the candidate
def test_scales_are_the_best_candidates(bits, salient_weight, stale, scale_dtype):
    linear = problem(bits, rows=20, columns=16)
    method = options(3, 16, salient_weight=salient_weight, scale_dtype=scale_dtype)
    diagonal = linear.diagonal(method)
    scale, zero = calibrate(linear.weight, diagonal, dataclasses.replace(method.grid, bits=bits), method, stale)
    weight, pivots = linear.weight.double().numpy(), [float(value) ** 2 for value in diagonal]
    expected = reference.calibrate(weight, pivots, bits, settings(method), stale)
    weighting = reference.weighting_of(weight, pivots, salient_weight)
    for row, (best, ours) in enumerate(zip(expected, zip(scale.tolist(), zero.tolist(), strict=True), strict=True)):
        errors = [reference.search_error(weight[row].tolist(), weighting[row], *pair, bits) for pair in (best, ours)]
        assert errors[1] <= errors[0] * (1 + 1e-4)
    expected_scale, expected_zero = torch.tensor(expected).T
    same = scale == expected_scale
    assert same.float().mean() >= 0.9
    assert torch.equal(zero[same], expected_zero[same])
    assert stale == bool((zero == 2 ** (bits - 1)).all())


def test_of_equal_scales_the_fitted_one_is_kept():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 1e-30  # whose errors underflow to 0
    method = options(3, scale_dtype="float32")
    scale, zero = calibrate(weight, torch.ones(8), method.grid, method)
    fitted_scale, fitted_zero = fit_group(weight, method.grid)
    assert torch.equal(scale, fitted_scale)
    assert torch.equal(zero, fitted_zero)


def test_salient_elements_come_nearer_when_they_weigh_more():
    linear = problem(7, rows=40, columns=32)
    diagonal = linear.diagonal(options(3))
    mask = salient(linear.weight, diagonal)
    assert 0.005 < mask.float().mean() < 0.2
    errors = []
    for salient_weight in (0.0, 1.0, 100.0):
        method = options(3, 32, salient_weight=salient_weight)
        scale, zero = (part.unsqueeze(1) for part in calibrate(linear.weight, diagonal, method.grid, method))
        error = (decode(encode(linear.weight, scale, zero, method.grid), scale, zero) - linear.weight).abs() ** 2.4
        errors.append((error[mask].sum().item(), error[~mask].sum().item()))
    assert errors[2][0] < errors[1][0] < errors[0][0]
    assert errors[0][1] < errors[1][1] < errors[2][1]


def test_no_element_may_be_salient():
    ones = torch.ones(4, 8)
    assert not salient(ones, torch.ones(8)).any()
    assert not salient(ones[:1, :1], torch.ones(1)).any()
    scale, _ = calibrate(ones, torch.ones(8), Grid(bits=3), options(3, salient_weight=9.0))
    assert torch.isfinite(scale).all()


def test_low_elements_are_not_salient():
    """Few that matter less than the rest lie far below the mean, and set nothing apart."""
    weight = torch.ones(8, 8)
    weight[0, 0] = 0.0
    assert not salient(weight, torch.ones(8)).any()
    weight[1, 1] = 3.0
    assert salient(weight, torch.ones(8)).nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_as_stored(bits, dtype):
    quantized = problem(bits).quantize(options(bits, scale_dtype=dtype))
    assert torch.equal(quantized.scale_OG, quantized.scale_OG.to(getattr(torch, dtype)).float())
    binary = [group for group, own in enumerate(quantized.group_bits) if own == 1]
    assert torch.equal(quantized.zero_OG[:, binary], quantized.zero_OG[:, binary].to(getattr(torch, dtype)).float())


def test_stale_symmetry_ends_with_the_first_group_of_enough_bits():
    linear = problem(1, columns=64, spread=0.0)
    scale = torch.ones(64)
    scale[:8] = scale[16:24] = 0.1
    scale[24:40] = 30.0
    quiet = Problem(linear.weight, linear.bias, linear.hessian * scale * scale[:, None], linear.sample * scale)
    stale = quiet.quantize(options(4, stale_symmetry=True))
    fresh = quiet.quantize(options(4))
    assert list(stale.group_bits) == [3, 4, 3, 5, 5, 4, 4, 4]
    assert (stale.zero_OG[:, 0] == 4).all()
    assert not (fresh.zero_OG[:, 0] == 4).all()
    assert not (stale.zero_OG[:, 2] == 4).all()


def test_published_levels_of_one_bit_groups():
    weight = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    method = options(2, 4, preset="as_published")
    for centred, levels in ((True, [1.5, 4.5]), (False, [0.0, 6.0])):  # 3 -+ 1.5 and 3 -+ 3
        scale, zero = calibrate(
            weight, torch.ones(4), Grid(bits=1), dataclasses.replace(method, centred_binary=centred)
        )
        assert decode(torch.tensor([0.0, 1.0]), scale, zero).tolist() == levels


def test_linears_of_a_stage_have_bits_of_their_own():
    linear, other = problem(0, columns=96), problem(1, rows=7, columns=96)
    method = options(2)
    statistics = InputStatistics(hessian_II=linear.hessian, sample_TI=linear.sample)
    importance = torch.linspace(0.2, 3, 12).repeat_interleave(8)
    weights, biases = [linear.weight, other.weight * importance], [linear.bias, None]
    together = method.quantize(
        LinearGroup(names=["k", "v"], weights=weights, biases=biases, statistics=statistics)
    ).weights
    assert together[0].group_bits != together[1].group_bits
    for weight, bias, quantized in zip(weights, biases, together, strict=True):
        group = LinearGroup(names=["k"], weights=[weight], biases=[bias], statistics=statistics)
        assert torch.equal(method.quantize(group).weights[0].decode(), quantized.decode())


@pytest.mark.parametrize("preset", PRESETS)
def test_same_input_gives_the_same_output_and_is_left_alone(preset):
    linear, method = problem(2, dead=(4,)), options(2, preset=preset)
    before = [part.clone() for part in (linear.weight, linear.bias, linear.hessian, linear.sample)]
    first, second = linear.quantize(method).pack(), linear.quantize(method).pack()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    after = (linear.weight, linear.bias, linear.hessian, linear.sample)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_order_of_the_rows_does_not_matter():
    linear, method = problem(6, rows=16), options(2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = Problem(linear.weight[order], linear.bias[order], linear.hessian, linear.sample)
    quantized, other = linear.quantize(method), shuffled.quantize(method)
    assert quantized.group_bits == other.group_bits
    assert (quantized.codes_OI[order] != other.codes_OI).any(1).sum() <= 1


def test_block_size_does_not_matter():
    linear = problem(8, rows=32, columns=96)
    first, second = (linear.quantize(options(3, 24, block_size=size)) for size in (5, 128))
    assert first.group_bits == second.group_bits
    assert (first.codes_OI != second.codes_OI).any(1).sum() <= 1


def test_searched_scales_and_mixed_bits_lower_the_error():
    ratios = {"searched": [], "mixed": []}
    for seed in range(6):
        linear = problem(seed, rows=24, columns=64)
        plain, searched, mixed = (
            gptq_reference.objective(
                linear.weight.numpy(), linear.quantize(options(2, **fields)).decode().numpy(), linear.hessian.numpy()
            )
            for fields in ({"bit_allocation": False, "search_steps": 0}, {"bit_allocation": False}, {})
        )
        ratios["searched"].append(searched / plain)
        ratios["mixed"].append(mixed / searched)
    assert np.mean(ratios["searched"]) < 0.97
    assert np.mean(ratios["mixed"]) < 0.97


AWKWARD = {
    "plain": lambda weight: weight,
    "zero row": lambda weight: torch.cat([torch.zeros_like(weight[:1]), weight[1:]]),
    "all zero": torch.zeros_like,
    "constant rows": lambda weight: weight[:, :1].expand_as(weight).clone(),
    "all equal": lambda weight: torch.full_like(weight, 0.3),
    "outlier": lambda weight: weight.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1e4)),
    "tiny": lambda weight: weight * 1e-12,
}


@given(
    bits=st.integers(2, 7),
    rows=st.sampled_from([1, 2, 5]),
    columns=st.sampled_from([1, 5, 16, 33, 50]),
    group_size=st.sampled_from([1, 4, 8, 64]),
    kind=st.sampled_from(list(AWKWARD)),
    preset=st.sampled_from(PRESETS),
    dead=st.sampled_from(["none", "first", "all"]),
    salient_weight=st.sampled_from([1.0, 3.0]),
)
def test_awkward_shapes_stay_finite(bits, rows, columns, group_size, kind, preset, dead, salient_weight):
    unseen = {"none": [], "first": [0], "all": list(range(columns))}[dead]
    made = problem(rows, rows, columns, tokens=5, dead=unseen)
    made.weight = AWKWARD[kind](made.weight)
    method = options(bits, group_size, preset=preset, salient_weight=salient_weight, search_steps=3)
    quantized = made.quantize(method)
    decoded = quantized.decode()
    assert torch.isfinite(decoded).all()
    assert torch.isfinite(quantized.scale_OG).all()
    assert torch.isfinite(quantized.zero_OG).all()
    assert (quantized.scale_OG > 0).all()
    assert quantized.published_bits_per_weight == bits
    per_column = torch.tensor(quantized.group_bits).repeat_interleave(group_size)[:columns]
    assert (quantized.codes_OI < 2**per_column).all()
    tensors = quantized.pack()
    assert quantized.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert torch.equal(MixedWeight.unpack(tensors, quantized.spec(), quantized.shape).decode(), decoded)
    if kind == "all zero":
        assert decoded.abs().max() < 1e-7


def test_higher_rung_of_the_ladder_is_reported():
    linear = problem(9, columns=16)
    shift = 0.04 * linear.hessian.diagonal().mean() + torch.linalg.eigvalsh(linear.hessian)[0]
    linear.hessian = linear.hessian - shift * torch.eye(16)
    assert linear.outcome(options(3)).damping == 0.05


def test_needs_and_presets():
    assert options(3).needs.hessian
    assert options(3).needs.sample
    assert not options(3).needs.drift
    assert not options(3, bit_allocation=False).needs.sample
    folded = options(3, fold=0.5)
    assert folded.needs.drift
    assert folded.needs.sample
    corrected, published = (SlimLlm.presets[name] for name in ("corrected", "as_published"))
    assert options(3) == SlimLlm(grid=options(3).grid)
    assert corrected.keys() == published.keys()
    assert all(corrected[name] != published[name] for name in corrected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"damping": 0.0}, r"options\.damping = 0\.0 must be above 0 and at most 1"),
        ({"damping": float("nan")}, r"options\.damping = nan must be"),
        ({"absolute_damping": -1.0}, r"options\.absolute_damping = -1\.0 must be at least 0 and finite"),
        ({"block_size": 0}, r"options\.block_size = 0 must be at least 1"),
        ({"probability_floor": 1.0}, r"options\.probability_floor = 1\.0 must be at least 0 and below 1"),
        ({"search_range": 1.0}, r"options\.search_range = 1\.0 must be between 0 and 1"),
        ({"search_steps": -1}, r"options\.search_steps = -1 must be at least 0"),
        ({"salient_weight": float("inf")}, r"options\.salient_weight = inf must be at least 0 and finite"),
    ],
)
def test_refused_options(fields, message):
    with pytest.raises(QuantizationError, match=message):
        options(3, **fields)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid(bits=3), "slim_llm gives each group its own bits; set group_size"),
        (Grid(bits=3, group_size=8, convention="gptq-sym"), "leave the symmetric convention out"),
        (Grid(bits=1, group_size=8), "weight_bits = 1: slim_llm is defined for 2 to 7 bits"),
        (Grid(bits=8, group_size=8), "weight_bits = 8: slim_llm is defined for 2 to 7 bits"),
    ],
)
def test_refused_grids(grid, message):
    with pytest.raises(QuantizationError, match=message):
        SlimLlm(grid=grid)


def test_overflow_is_refused():
    linear = problem(0)
    linear.weight = linear.weight * 1e9
    with pytest.raises(QuantizationError, match="use scale_dtype: float32"):
        linear.quantize(options(3))


def test_hessian_that_is_not_finite_is_refused():
    linear = problem(0)
    linear.hessian[2, 3] = linear.hessian[3, 2] = float("nan")
    with pytest.raises(QuantizationError, match="not finite"):
        linear.quantize(options(3))
