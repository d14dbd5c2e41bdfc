"""BiLLM: against float64 loops over its equations, and what must hold whatever the data."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.billm import Billm, billm, binarize_block, search_num_salient, search_split, squared_error
from quantizers.errors import QuantizationError
from quantizers.grid import Grid
from quantizers.linalg import inverse_cholesky
from quantizers.method import LinearGroup
from quantizers.statistics import InputStatistics
from tests.reference import billm as reference
from tests.reference import gptq as gptq_reference

PRESETS = list(Billm.presets)
ULP = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2e-6}


def options(*, scale_dtype="float16", preset="corrected", **fields):
    grid = Grid(bits=1, scale_dtype=scale_dtype)
    return Billm(grid=grid, **(dict(Billm.presets[preset]) | fields))


def quantize(weight, hessian, method):
    outcome = method.quantize(LinearGroup.of([weight], InputStatistics(hessian_II=hessian)))
    assert outcome.damping == method.damping
    return outcome.weights[0]


def objective(weight, decoded, hessian):
    return gptq_reference.objective(weight.numpy(), decoded.numpy(), hessian.numpy())


def compare_block(block, expected, scale_dtype):
    """Equal choices and signs; levels equal but for a last place where float32 meets a tie of the rounding."""
    assert block.salient_B.nonzero().flatten().tolist() == expected.salient
    other = ~block.salient_B.numpy()
    assert np.array_equal(block.sparse_ON.numpy().astype(bool), expected.sparse[:, other])
    pairs = [
        [*levels["salient"], levels["concentrated"][0], levels["sparse"][0]] for levels in expected.levels
    ]  # [row][pair](mean, scale)
    expected_levels = torch.tensor(pairs, dtype=torch.float64).permute(2, 1, 0)
    levels = torch.stack([block.mean_PO, block.scale_PO]).double()
    tolerance = ULP[scale_dtype] * expected_levels.abs().max()
    torch.testing.assert_close(levels, expected_levels, rtol=ULP[scale_dtype], atol=1e-7)
    decoded, theirs = block.decode().double(), torch.from_numpy(expected.weight)
    assert (decoded - theirs).abs().max() <= 4 * tolerance
    return float((levels.float() == expected_levels.float()).float().mean())


def slowly(weight, hessian, method):
    return reference.quantize(
        weight.numpy(),
        hessian.numpy(),
        block_size=method.block_size,
        damping=method.damping,
        scale_dtype=method.grid.scale_dtype,
        salient_metric=method.salient_metric,
        search_on=method.search_on,
        search_other_order=method.search_other_order,
        max_salient=method.max_salient,
        split_over_salient=method.split_over_salient,
    )


def compare(weight, hessian, method):
    """Compare every block with the reference; return the share of equal levels."""
    expected = slowly(weight, hessian, method)
    quantized = quantize(weight, hessian, method)
    same = [
        compare_block(block, theirs, method.grid.scale_dtype)
        for block, theirs in zip(quantized.blocks, expected, strict=True)
    ]
    return float(np.mean(same))


@pytest.mark.parametrize("salient_metric", ["hessian", "magnitude"])
@pytest.mark.parametrize("search_on", ["loss", "weight", "salience"])
@pytest.mark.parametrize("search_other_order", [1, 2])
@pytest.mark.parametrize("split_over_salient", [False, True])
def test_equals_the_reference(make_problem, salient_metric, search_on, search_other_order, split_over_salient):
    weight, hessian = make_problem(1, 9, 43)
    method = options(
        salient_metric=salient_metric,
        search_on=search_on,
        search_other_order=search_other_order,
        split_over_salient=split_over_salient,
        block_size=16,  # leaves a tail of 11
        max_salient=7,  # so 4 others at least: all splits of 2 are without error, and tie
    )
    assert compare(weight, hessian, method) > 0.98


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("preset", PRESETS)
def test_equals_the_reference_in_every_precision(make_problem, preset, scale_dtype):
    weight, hessian = make_problem(2, 12, 48)
    same = compare(weight, hessian, options(preset=preset, block_size=24, scale_dtype=scale_dtype))
    assert scale_dtype == "float32" or same > 0.98


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (9, 1), (2, 2), (5, 3), (1, 33)])
@pytest.mark.parametrize("preset", PRESETS)
def test_equals_the_reference_in_awkward_shapes(make_problem, preset, rows, columns):
    """So few weights that choices tie, with errors near 0: only values are compared."""
    weight, hessian = make_problem(3, rows, columns, tokens=99)
    method = options(preset=preset, block_size=16, damping=0.1)
    theirs = np.concatenate([block.weight for block in slowly(weight, hessian, method)], 1)
    ours = quantize(weight, hessian, method).decode().double()
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=2 * ULP["float16"], atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_the_reference_with_dead_inputs(make_problem, preset):
    dead = (0, 5, 16, 17, 18, 19, 20, 21, 22, 23, 31)  # a whole block among them
    weight, hessian = make_problem(4, 8, 32, dead=dead)
    method = options(preset=preset, block_size=8)
    compare(weight, hessian, method)
    quantized = quantize(weight, hessian, method)
    assert (quantized.blocks[2].decode() == 0).all()
    assert torch.isfinite(quantized.decode()).all()


def test_equals_the_reference_on_few_tokens(make_problem):
    weight, hessian = make_problem(5, 8, 32, tokens=10)
    compare(weight, hessian, options(block_size=16))


@pytest.mark.parametrize("preset", PRESETS)
def test_split_is_at_the_best_quantile(preset):
    """Membership by an order statistic is membership by the interpolated quantile."""
    for seed in range(8):
        values = torch.randn(6, 5 + seed, generator=torch.Generator().manual_seed(seed))
        num_zeros = 6 if preset == "as_published" else 0
        prices = torch.rand(values.shape[1], generator=torch.Generator().manual_seed(seed)) + 0.1
        threshold = search_split(values, prices, num_zeros)
        padded = np.pad(values.numpy().astype(np.float64), ((0, 0), (0, num_zeros // 6)))
        salient = list(range(values.shape[1], padded.shape[1]))
        padded_prices = np.pad(prices.numpy(), (0, num_zeros // 6))
        expected = reference.choose_split(padded, salient, num_zeros > 0, padded_prices)
        assert np.array_equal(values.abs().numpy() > threshold, expected[:, : values.shape[1]])


def test_finds_outlying_columns():
    """The search on weights sets apart the columns that do not belong to the rest, and no others."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 128, generator=generator)
    weight[:, [7, 50, 127]] *= 8
    block = binarize_block(weight, torch.ones(128), options())
    assert block.salient_B.nonzero().flatten().tolist() == [7, 50, 127]


def test_metric_ranks_the_columns():
    """Input 3 hardly matters (a large diagonal of U), input 5 does."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 16, generator=generator)
    weight[:, 3] *= 6
    weight[:, 5] *= 3
    diagonal = torch.ones(16)
    diagonal[3] = 1e3
    chosen = {
        metric: binarize_block(weight, diagonal, options(salient_metric=metric, max_salient=1)).salient_B
        for metric in ("hessian", "magnitude")
    }
    assert chosen["magnitude"].nonzero().flatten().tolist() == [3]
    assert chosen["hessian"].nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0])
@given(seed=st.integers(0, 1000), rows=st.integers(1, 6), columns=st.integers(1, 12))
def test_two_signs_are_no_worse_than_one(scale, seed, rows, columns):
    """Stored means and scales included: rounding to nearest never goes past twice the value."""
    weight = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(columns)
    once, twice = squared_error(weight, 1, ones), squared_error(weight, 2, ones)
    assert (twice <= once * (1 + 1e-5) + 1e-12 * scale**2).all()
    block = binarize_block(weight, ones, options())
    salient = block.salient_B.nonzero().flatten()
    values = weight[:, salient].double()
    first = (
        block.mean_PO[0, :, None] + torch.where(block.sign_OB[:, salient].bool(), 1, -1) * block.scale_PO[0, :, None]
    )
    once = (values - first.double()).square().sum(1)
    twice = (values - block.decode()[:, salient].double()).square().sum(1)
    assert (twice <= once * (1 + 1e-5) + 1e-12 * scale**2).all()


def test_error_falls_with_every_salient_column():
    """Two signs in a column rather than one; on average over rows, until 2 others are left, which have no error."""
    weight = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(64)
    errors = [
        (squared_error(weight[:, :k], 2, ones[:k]).sum() + squared_error(weight[:, k:], 1, ones[k:]).sum()).item()
        for k in range(1, 63)
    ]
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert search_num_salient(weight, ones, options(search_other_order=1)) == 49
    assert search_num_salient(weight, ones, options(search_other_order=1, max_salient=99)) == 62


def test_two_signs_come_close_to_the_split():
    """Why the search for salient columns gives the others two signs: on normal weights that is what they attain."""
    weight = torch.randn(2048, 128, generator=torch.Generator().manual_seed(0))
    method = options(max_salient=1)
    block = binarize_block(weight, torch.ones(128), method)
    split = ((block.decode() - weight)[:, ~block.salient_B].square().sum() / weight.square().sum()).item()
    ones = torch.ones(128)
    once, twice = ((squared_error(weight, order, ones).sum() / weight.square().sum()).item() for order in (1, 2))
    assert once == pytest.approx(1 - 2 / np.pi, abs=0.01)
    assert split == pytest.approx(0.13, abs=0.005)
    assert twice == pytest.approx(split, rel=0.05)


def relative_objectives(problem, choices):
    """Of each `search_on`, the objective relative to that of quantizing to zero."""
    weight, hessian = problem
    whole = objective(weight, torch.zeros_like(weight), hessian)
    return {
        name: objective(weight, quantize(weight, hessian, options(search_on=name)).decode(), hessian) / whole
        for name in choices
    }


def test_search_on_weights_is_good_where_no_input_sticks_out(make_problem):
    for seed in range(4):
        found = relative_objectives(make_problem(seed, 64, 192), ["loss", "weight", "salience"])
        assert found["weight"] < 0.9 * found["salience"]
        assert found["loss"] < 1.05 * found["weight"]


def test_search_on_the_loss_is_best_where_inputs_stick_out(make_problem):
    """Squared errors of weights do not see inputs, so that search gives far too many columns two signs."""
    for seed in range(4):
        weight, hessian = make_problem(seed, 64, 192)
        factors = torch.ones(192)
        factors[torch.randperm(192, generator=torch.Generator().manual_seed(seed))[:6]] = 20
        found = relative_objectives((weight, hessian * factors * factors[:, None]), ["loss", "weight", "salience"])
        assert found["loss"] < 0.8 * found["weight"]
        assert found["loss"] < found["salience"]


@pytest.mark.parametrize("preset", PRESETS)
def test_later_blocks_correct_earlier_ones(make_problem, preset):
    """The error is below that of the same blocks without correction, as a diagonal Hessian has them."""
    ratios = []
    for seed in range(6):
        weight, hessian = make_problem(seed, 32, 128)
        method = options(preset=preset, block_size=32)
        corrected = quantize(weight, hessian, method).decode()
        alone = quantize(weight, torch.diag(hessian.diagonal()), method).decode()
        ratios.append(objective(weight, corrected, hessian) / objective(weight, alone, hessian))
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.95


@pytest.mark.parametrize("preset", PRESETS)
def test_blocks_are_independent_where_inputs_do_not_correlate(make_problem, preset):
    weight, hessian = make_problem(6, 16, 70)
    hessian, method = torch.diag(hessian.diagonal()), options(preset=preset, block_size=32)
    inverse, _ = inverse_cholesky(hessian, method.damping)
    whole = billm(weight, inverse, method).decode()
    parts = [
        binarize_block(columns, diagonal, method).decode()
        for columns, diagonal in zip(weight.split(32, 1), inverse.diagonal().split(32), strict=True)
    ]
    assert torch.equal(whole, torch.cat(parts, 1))


@pytest.mark.parametrize("preset", PRESETS)
def test_powers_of_two_change_nothing(make_problem, preset):
    weight, hessian = make_problem(7, 8, 48)
    method = options(preset=preset, block_size=24, scale_dtype="float32")
    decoded = quantize(weight, hessian, method).decode()
    for factor in (2.0**-60, 2.0**30, 2.0**100):  # squares of the first and the last are outside float32
        assert torch.equal(quantize(weight * factor, hessian, method).decode(), decoded * factor)


@pytest.mark.parametrize("preset", PRESETS)
def test_order_of_the_rows_does_not_matter(make_problem, preset):
    weight, hessian = make_problem(8, 24, 48)
    shuffle = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    method = options(preset=preset, block_size=24)
    plain, shuffled = (quantize(rows, hessian, method).decode() for rows in (weight, weight[shuffle]))
    torch.testing.assert_close(plain[shuffle], shuffled, rtol=1e-3, atol=1e-6)


def test_linears_of_a_stage_are_quantized_each_by_itself(make_problem):
    weight, hessian = make_problem(9, 24, 48)
    method, statistics = options(block_size=16), InputStatistics(hessian_II=hessian)
    weights = list(torch.split(weight, [12, 8, 4]))
    together = method.quantize(LinearGroup.of(weights, statistics))
    for part, quantized in zip(weights, together.weights, strict=True):
        assert quantized.shape == part.shape
        assert torch.equal(quantized.decode(), quantize(part, hessian, method).decode())
    assert not torch.equal(together.weights[0].decode(), quantize(weight, hessian, method).decode()[:12])


@pytest.mark.parametrize("preset", PRESETS)
def test_same_input_same_artifact(make_problem, preset):
    weight, hessian = make_problem(10, 16, 64)
    before = weight.clone(), hessian.clone()
    first, second = (quantize(weight, hessian, options(preset=preset, block_size=32)).pack() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def _awkward(case):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 20, generator=generator) * 0.05
    match case:
        case "zeros":
            weight.zero_()
        case "a row of zeros":
            weight[2] = 0
        case "constant":
            weight.fill_(0.125)
        case "constant rows":
            weight[:] = torch.linspace(-1, 1, 6)[:, None]
        case "huge outlier":
            weight[1, 3] = 3e4
        case "tiny":
            weight *= 1e-30
        case "subnormal":
            weight *= 1e-42
        case "few values":
            weight = weight.sign()
    return weight


AWKWARD = ["zeros", "a row of zeros", "constant", "constant rows", "huge outlier", "tiny", "subnormal", "few values"]


@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("block_size", [1, 7, 20, 128])
@pytest.mark.parametrize("salient_metric", ["hessian", "magnitude"])
def test_awkward_weights(case, preset, block_size, salient_metric):
    weight = _awkward(case)
    for scale_dtype in ("float16", "float32"):
        method = options(preset=preset, block_size=block_size, salient_metric=salient_metric, scale_dtype=scale_dtype)
        quantized = quantize(weight, torch.eye(20), method)
        decoded = quantized.decode()
        assert torch.isfinite(decoded).all()
        for block in quantized.blocks:
            assert (block.scale_PO >= 0).all()
        errors = (decoded - weight).double().square().sum(1)
        assert (errors <= weight.double().square().sum(1) * (1 + 1e-6) + 1e-12).all()
        if case in ("zeros", "a row of zeros"):
            assert (decoded[2] == 0).all()
            assert all((block.sign_OB[2] == 1).all() for block in quantized.blocks)
        if case in ("constant", "constant rows"):
            torch.testing.assert_close(decoded, weight, rtol=1e-6 if scale_dtype == "float32" else 1e-3, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_searches_survive_the_largest_weights(preset):
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * 1e36
    decoded = quantize(weight, torch.eye(16) * 1e-4, options(preset=preset, scale_dtype="float32")).decode()
    assert torch.isfinite(decoded).all()
    assert (decoded - weight).double().square().sum() < 0.5 * weight.double().square().sum()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_single_column_is_its_own_mean(preset):
    weight = torch.tensor([[0.5], [-2.0], [0.0]])
    quantized = quantize(weight, torch.ones(1, 1), options(preset=preset))
    assert torch.equal(quantized.decode(), weight)
    assert quantized.num_salient == 0


def test_all_inputs_dead(make_problem):
    weight, _ = make_problem(11, 4, 8)
    assert (quantize(weight, torch.zeros(8, 8), options()).decode() == 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_more_bytes_than_published(make_problem, preset):
    weight, hessian = make_problem(12, 256, 256)
    quantized = quantize(weight, hessian, options(preset=preset))
    stored = quantized.stored_bytes * 8 / weight.numel()
    assert 1 < quantized.published_bits_per_weight < 1.4
    assert stored == pytest.approx(3.0, abs=0.07)


def test_needs():
    needs = options().needs
    assert needs.hessian
    assert not any((needs.drift, needs.sample, needs.ranges, needs.block))
    assert options(fold=0.5).needs.drift
    assert options().true_sequential
    assert not options(preset="as_published").true_sequential


def test_presets_name_options():
    for preset in PRESETS:
        made = options(preset=preset)
        assert all(getattr(made, name) == value for name, value in Billm.presets[preset].items())
    assert options() == Billm(grid=Grid(bits=1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, r"options\.block_size = 0 must be at least 1"),
        ({"damping": 0.0}, r"options\.damping = 0\.0 must be above 0 and at most 1"),
        ({"max_salient": 0}, r"options\.max_salient = 0 must be at least 1"),
        ({"search_other_order": 3}, r"options\.search_other_order = 3 must be 1 or 2"),
        ({"salient_metric": "size"}, r"options\.salient_metric = 'size' is none of hessian, magnitude"),
        ({"search_on": "both"}, r"options\.search_on = 'both' is none of loss, weight, salience"),
        ({"grid": Grid(bits=2)}, r"weight_bits = 2: billm is defined for 1 bit"),
        ({"grid": Grid(bits=1, group_size=64)}, r"group_size = 64: .* leave group_size out or per_channel"),
        ({"grid": Grid(bits=1, convention="gptq-sym")}, r"leave the symmetric convention out"),
    ],
)
def test_refused_options(fields, message):
    with pytest.raises(QuantizationError, match=message):
        Billm(**({"grid": Grid(bits=1)} | fields))


def test_overflow_is_refused():
    with pytest.raises(QuantizationError, match="does not fit float16; use scale_dtype: float32"):
        quantize(torch.full((4, 16), 1e7), torch.eye(16), options())


def test_refuses_a_hessian_that_is_not_finite(make_problem):
    weight, hessian = make_problem(13, 4, 16)
    hessian[2, 3] = hessian[3, 2] = float("nan")
    with pytest.raises(QuantizationError, match="not finite"):
        quantize(weight, hessian, options())
