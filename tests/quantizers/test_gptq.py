"""GPTQ: against optimal brain quantization in float64, and the identities that hold whatever the data."""

import itertools

import numpy as np
import pytest
import torch

from quantizers.errors import QuantizationError
from quantizers.gptq import Gptq, gptq
from quantizers.grid import Grid, fit_group
from quantizers.method import LinearGroup
from quantizers.rtn import round_to_nearest
from quantizers.statistics import InputStatistics
from tests.reference import gptq as reference
from tests.reference.grids import CONVENTION


def objective(weight, decoded, hessian):
    return reference.objective(weight.numpy(), decoded.numpy(), hessian.numpy())


def compare(weight, hessian, options, lax_rows=0):
    """Compare codes, scales, groups and objective with the float64 reference; return the share of equal codes."""
    grid = options.grid
    quantized, damping = gptq(weight, hessian, options)
    expected = reference.quantize(
        weight.numpy(),
        hessian.numpy(),
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.symmetric,
        scale_dtype=grid.scale_dtype,
        act_order=options.act_order,
        static_groups=options.static_groups,
        damping=options.damping,
    )
    assert damping == options.damping
    columns = weight.shape[1]
    group = [column // grid.group_columns(columns) for column in range(columns)]
    if quantized.column_group_I is not None:
        group = quantized.column_group_I.tolist()
    assert group == expected.group
    rows_differ = (quantized.codes_OI.numpy() != expected.codes).any(1)
    assert rows_differ.sum() <= lax_rows
    same = torch.from_numpy(~rows_differ)
    # bfloat16 and float16 scales must be the same numbers; float32 ones are a rounding apart.
    tolerance = 2e-6 if grid.scale_dtype == "float32" or options.static_groups is False or grid.binary else 0
    scale, decoded = torch.from_numpy(expected.scale)[same], torch.from_numpy(expected.weight)[same]
    torch.testing.assert_close(quantized.scale_OG.double()[same], scale, rtol=tolerance, atol=0)
    torch.testing.assert_close(quantized.decode().double()[same], decoded, rtol=1e-5, atol=1e-6)
    ours, theirs = (objective(weight, part, hessian) for part in (quantized.decode(), torch.tensor(expected.weight)))
    assert ours == pytest.approx(theirs, rel=1e-4)
    return float(np.mean(quantized.codes_OI.numpy() == expected.codes))


# float32 rounds the corrected weights to about 1e-6 of a step, so of the 16 x 72 codes of a case about one in a
# thousand cases meets a tie on another side than float64; from there on its row may differ. One row may.
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("act_order", "static_groups"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("group_size", [0, 24, 32])  # 32 leaves a tail of 8
def test_equals_the_reference(make_problem, bits, symmetric, act_order, static_groups, group_size):
    weight, hessian = make_problem(bits, 16, 72)
    grid = Grid(bits=bits, convention=CONVENTION[symmetric], group_size=group_size, tail_group=True)
    compare(weight, hessian, Gptq(grid=grid, act_order=act_order, static_groups=static_groups), lax_rows=1)


@pytest.mark.parametrize("damping", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_equals_the_reference_for_other_options(make_problem, damping, scale_dtype):
    weight, hessian = make_problem(7, 16, 50)
    options = Gptq(grid=Grid(bits=3, group_size=10, scale_dtype=scale_dtype), damping=damping, block_size=7)
    compare(weight, hessian, options, lax_rows=1)


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [1, 4])
def test_equals_the_reference_with_dead_inputs(make_problem, bits, act_order, static_groups):
    dead = (0, 5, 16, 17, 18, 19, 20, 21, 22, 23, 47)  # one whole group among them
    weight, hessian = make_problem(8, 16, 48, dead=dead)
    options = Gptq(grid=Grid(bits=bits, group_size=8), act_order=act_order, static_groups=static_groups)
    compare(weight, hessian, options, lax_rows=1)
    quantized, _ = gptq(weight, hessian, options)
    if bits > 1:
        assert (quantized.decode()[:, list(dead)] == 0).all()


def test_equals_the_reference_on_few_tokens(make_problem):
    """Fewer tokens than inputs: the Hessian is singular and damping alone makes it invertible."""
    weight, hessian = make_problem(9, 16, 64, tokens=20)
    values = torch.linalg.eigvalsh(hessian.double())
    assert (values > 1e-5 * values.max()).sum() == 20
    compare(weight, hessian, Gptq(grid=Grid(bits=4)), lax_rows=1)


def test_nearly_all_codes_equal_the_reference(make_problem):
    """Over many problems, not one code in a thousand differs."""
    same = []
    for seed, bits in itertools.product(range(4), (2, 4)):
        weight, hessian = make_problem(100 + seed, 32, 64)
        same.append(compare(weight, hessian, Gptq(grid=Grid(bits=bits, group_size=16)), lax_rows=32))
    assert np.mean(same) >= 0.999


def equal(first, second):
    assert torch.equal(first.codes_OI, second.codes_OI)
    assert torch.equal(first.scale_OG, second.scale_OG)
    assert torch.equal(first.decode(), second.decode())
    assert (first.zero_OG is None) == (second.zero_OG is None)
    if first.zero_OG is not None and second.zero_OG is not None:
        assert torch.equal(first.zero_OG, second.zero_OG)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [0, 32])
def test_inputs_that_do_not_correlate_make_it_rtn(make_problem, act_order, bits, symmetric, group_size):
    """With a diagonal Hessian no column corrects another: bit for bit RTN."""
    weight, hessian = make_problem(bits, 8, 80)
    grid = Grid(bits=bits, convention=CONVENTION[symmetric], group_size=group_size, tail_group=True)
    for diagonal in (torch.ones(80), hessian.diagonal()):
        quantized, _ = gptq(weight, torch.diag(diagonal), Gptq(grid=grid, act_order=act_order))
        equal(quantized, round_to_nearest(weight, grid))
        if not act_order:  # groups are fitted as they are reached, to weights that nothing has corrected
            quantized, _ = gptq(weight, torch.diag(diagonal), Gptq(grid=grid, act_order=False, static_groups=False))
            equal(quantized, round_to_nearest(weight, grid))


@pytest.mark.parametrize(("act_order", "static_groups"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("group_size", [0, 48])
def test_block_size_does_not_matter(make_problem, act_order, static_groups, group_size):
    """Sums are taken in another order, so a tie may fall the other way: in at most one row of 32 here."""
    weight, hessian = make_problem(3, 32, 200)
    results = []
    for block_size in (1, 32, 128, 1000):
        options = Gptq(
            grid=Grid(bits=4, group_size=group_size, tail_group=True),
            act_order=act_order,
            static_groups=static_groups,
            block_size=block_size,
        )
        results.append(gptq(weight, hessian, options)[0])
    errors = [objective(weight, result.decode(), hessian) for result in results]
    for result, error in zip(results, errors, strict=True):
        differ = (result.codes_OI != results[0].codes_OI).any(1)
        assert differ.sum() <= 1
        assert error == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize("act_order", [False, True])
def test_block_size_changes_no_bit_where_sums_are_exact(monkeypatch, act_order):
    """Weights of whole sixteenths, steps of 1 and a factor of whole numbers: float32 rounds nothing."""
    rows, columns = 8, 200
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-7 * 16, 8 * 16, (rows, columns), generator=generator) / 16
    weight[:, 0], weight[:, -1] = -7.0, 8.0
    sparse = torch.rand(columns, columns, generator=generator) < 4 / columns
    factor = torch.eye(columns) + torch.triu(sparse * torch.randint(-1, 2, sparse.shape, generator=generator), 1)
    monkeypatch.setattr("quantizers.gptq.inverse_cholesky", lambda hessian, damping, _: (factor, damping))
    hessian = torch.diag(torch.rand(columns, generator=generator) + 0.5)  # its diagonal gives the order
    grid = Grid(bits=4, group_size=0)
    results = [
        gptq(weight, hessian, Gptq(grid=grid, act_order=act_order, block_size=size))[0]
        for size in (1, 3, 32, 128, 1000)
    ]
    for result in results:
        equal(result, results[0])
    assert (results[0].scale_OG == 1).all()
    assert not torch.equal(results[0].codes_OI, round_to_nearest(weight, grid).codes_OI)

    order = torch.argsort(hessian.diagonal(), descending=True) if act_order else torch.arange(columns)
    work, upper = weight.double()[:, order], factor.double()
    for index, column in enumerate(order):  # algorithm 1 with every correction made at once
        quantized = results[0].decode().double()[:, column]
        assert torch.equal(quantized, work[:, index].round().clamp(-7, 8))
        work -= torch.outer(work[:, index] - quantized, upper[index])


def test_order_of_the_inputs_does_not_matter_with_act_order(make_problem):
    weight, hessian = make_problem(4, 32, 96)
    shuffle = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    options = Gptq(grid=Grid(bits=3))
    quantized, _ = gptq(weight, hessian, options)
    shuffled, _ = gptq(weight[:, shuffle], hessian[shuffle][:, shuffle], options)
    equal(
        quantized,
        type(shuffled)(
            grid=shuffled.grid,
            codes_OI=shuffled.codes_OI[:, shuffle.argsort()],
            scale_OG=shuffled.scale_OG,
            zero_OG=shuffled.zero_OG,
        ),
    )
    plain = Gptq(grid=Grid(bits=3), act_order=False)  # and does without
    first, _ = gptq(weight, hessian, plain)
    second, _ = gptq(weight[:, shuffle], hessian[shuffle][:, shuffle], plain)
    assert not torch.equal(first.codes_OI, second.codes_OI[:, shuffle.argsort()])


def test_most_important_inputs_come_first(make_problem):
    """The first column in the order is rounded to nearest: nothing has corrected it."""
    weight, hessian = make_problem(5, 16, 40)
    important, unimportant = int(hessian.diagonal().argmax()), int(hessian.diagonal().argmin())
    assert 0 not in (important, unimportant)
    nearest = round_to_nearest(weight, Grid(bits=3)).decode()

    def corrected(act_order, column):
        quantized, _ = gptq(weight, hessian, Gptq(grid=Grid(bits=3), act_order=act_order))
        return int((quantized.decode()[:, column] != nearest[:, column]).sum())

    assert corrected(act_order=True, column=important) == 0
    assert corrected(act_order=True, column=unimportant) > 4
    assert corrected(act_order=False, column=0) == 0
    assert corrected(act_order=True, column=0) > 0


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("static_groups", [False, True])
def test_objective_is_below_that_of_rtn(make_problem, bits, group_size, static_groups):
    ratios = []
    for seed, act_order in itertools.product(range(5), (False, True)):
        weight, hessian = make_problem(seed, 16, 64)
        grid = Grid(bits=bits, group_size=group_size)
        quantized, _ = gptq(weight, hessian, Gptq(grid=grid, act_order=act_order, static_groups=static_groups))
        nearest = round_to_nearest(weight, grid)
        ratios.append(objective(weight, quantized.decode(), hessian) / objective(weight, nearest.decode(), hessian))
    assert np.mean(ratios) < 0.9
    assert max(ratios) < 1.1


@pytest.mark.parametrize("block_size", [1, 16, 128])
@pytest.mark.parametrize("act_order", [False, True])
def test_dynamic_groups_are_fitted_to_corrected_weights(make_problem, block_size, act_order):
    """The released code fits a group inside a block to weights without the block's own corrections."""
    weight, hessian = make_problem(6, 16, 48)
    grid = Grid(bits=2, group_size=8)
    options = Gptq(grid=grid, act_order=act_order, static_groups=False, block_size=block_size)
    quantized, _ = gptq(weight, hessian, options)
    decoded = quantized.decode().double()
    importance = hessian.diagonal()
    order = torch.argsort(importance, descending=True) if act_order else torch.arange(48)
    damped = hessian.double() + options.damping * hessian.double().diagonal().mean() * torch.eye(48)
    for index in range(1, 6):
        done, group = order[: index * 8], order[index * 8 : index * 8 + 8]
        rest = order[index * 8 :]
        # The best weights of the rest, given the quantized ones: minimise tr((W - Q) H (W - Q)^T) over them.
        error = weight.double()[:, done] - decoded[:, done]
        correction = torch.linalg.solve(damped[rest][:, rest], damped[rest][:, done] @ error.T).T
        corrected = (weight.double()[:, rest] + correction)[:, :8]
        scale, zero = fit_group(corrected.float(), grid)
        torch.testing.assert_close(quantized.scale_OG[:, index], scale, rtol=2e-3, atol=0)
        uncorrected, _ = fit_group(weight[:, group], grid)
        assert ((quantized.scale_OG[:, index] - uncorrected).abs() > 2e-3 * uncorrected).sum() > 8
        assert (quantized.zero_OG[:, index] == zero).float().mean() > 0.9


def test_column_groups_are_stored_only_where_they_are_needed(make_problem):
    weight, hessian = make_problem(0, 4, 32)
    for act_order, static_groups, group_size in itertools.product([False, True], [False, True], [0, 8, 32]):
        options = Gptq(grid=Grid(bits=4, group_size=group_size), act_order=act_order, static_groups=static_groups)
        needed = act_order and not static_groups and group_size == 8
        quantized, _ = gptq(weight, hessian, options)
        assert (quantized.column_group_I is not None) == needed == options.stores_column_groups(32)
        if needed:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
            assert quantized.column_group_I[order].tolist() == [place // 8 for place in range(32)]


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_stacked_linears_equal_separate_ones(make_problem, static_groups, symmetric):
    weight, hessian = make_problem(10, 24, 64)
    method = Gptq(
        grid=Grid(bits=3, group_size=16, convention=CONVENTION[symmetric]),
        static_groups=static_groups,
    )
    weights = list(torch.split(weight, [12, 8, 4]))
    together = method.quantize(LinearGroup.of(weights, InputStatistics(hessian_II=hessian)))
    differ = 0
    for part, quantized in zip(weights, together.weights, strict=True):
        alone, damping = gptq(part, hessian, method)
        assert damping == together.damping
        assert quantized.codes_OI.shape == part.shape
        differ += int((quantized.codes_OI != alone.codes_OI).any(1).sum())
    assert differ <= 1  # matrix products of other shapes may round otherwise, as for block sizes


def test_weights_and_hessian_are_left_alone(make_problem):
    weight, hessian = make_problem(11, 4, 16, dead=(3,))
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, Gptq(grid=Grid(bits=4)))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_all_inputs_dead():
    quantized, _ = gptq(torch.randn(4, 8), torch.zeros(8, 8), Gptq(grid=Grid(bits=4)))
    assert (quantized.decode() == 0).all()


def test_higher_rung_of_the_ladder_is_reported(make_problem):
    weight, hessian = make_problem(12, 4, 16)
    hessian = (
        hessian - 0.04 * hessian.diagonal().mean() * torch.eye(16) - torch.linalg.eigvalsh(hessian)[0] * torch.eye(16)
    )
    outcome = Gptq(grid=Grid(bits=4)).quantize(LinearGroup.of([weight], InputStatistics(hessian_II=hessian)))
    assert outcome.damping == 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, r"options\.damping = 0\.0 must be above 0 and at most 1"),
        ({"damping": 1.5}, r"options\.damping = 1\.5 must be"),
        ({"damping": float("nan")}, r"options\.damping = nan must be"),
        ({"block_size": 0}, r"options\.block_size = 0 must be at least 1"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(QuantizationError, match=message):
        Gptq(grid=Grid(bits=4), **options)


@pytest.mark.parametrize("static_groups", [False, True])
def test_overflow_is_refused(make_problem, static_groups):
    _, hessian = make_problem(13, 4, 16)
    options = Gptq(grid=Grid(bits=4, group_size=8), static_groups=static_groups)
    with pytest.raises(QuantizationError, match="use scale_dtype: float32"):
        gptq(torch.full((4, 16), 1e7), hessian, options)


def test_refuses_a_hessian_that_is_not_finite(make_problem):
    weight, hessian = make_problem(14, 4, 16)
    hessian[2, 3] = hessian[3, 2] = float("nan")
    with pytest.raises(QuantizationError, match="not finite"):
        gptq(weight, hessian, Gptq(grid=Grid(bits=4)))
