"""Which groups SliM-LLM gives more bits and which fewer (arXiv 2405.14917, salience-determined bit allocation)."""

import dataclasses
import itertools

import pytest
import torch

from quantizers.errors import NumericalError
from quantizers.grid import decode, encode, fit_group
from quantizers.slim_llm import allocated_bits, rank_groups
from tests.quantizers.slim_problems import PRESETS, Problem, options, problem


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("columns", [8, 16, 24, 31])
def test_fewer_than_four_groups_keep_their_bits(preset, columns):
    quantized = problem(0, columns=columns).quantize(options(3, preset=preset))
    assert set(quantized.group_bits) == {3}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("bits", "columns"), list(itertools.product(range(2, 8), (64, 72, 77))))
def test_average_bits_are_exact(preset, bits, columns):
    linear = problem(bits, columns=columns)
    quantized = linear.quantize(options(bits, preset=preset, search_steps=1))
    assert quantized.published_bits_per_weight == bits
    assert set(quantized.group_bits) <= {bits - 1, bits, bits + 1}
    if preset == "as_published":
        assert len(set(quantized.group_bits)) > 1
    if columns == 77:
        assert quantized.group_bits[-1] == bits


@pytest.mark.parametrize("preset", PRESETS)
def test_allocation_follows_salience(preset):
    mixed = 0
    for seed in range(6):
        linear, method = problem(seed, columns=96), options(2, preset=preset, search_steps=1)
        bits = linear.quantize(method).group_bits
        salience = (linear.weight / linear.diagonal(method)).square().sum(0).reshape(12, 8).sum(1)
        by_salience = [bits[group] for group in salience.argsort().tolist()]
        assert by_salience == sorted(by_salience)
        mixed += len(set(bits)) > 1
    assert mixed >= 4


def test_inputs_that_matter_raise_the_bits_of_their_group():
    linear = problem(0, columns=64, spread=0.0)
    for group in (0, 3, 7):
        scale = torch.ones(64)
        scale[group * 8 : group * 8 + 8] = 30.0
        louder = Problem(linear.weight, linear.bias, linear.hessian * scale * scale[:, None], linear.sample * scale)
        assert louder.quantize(options(3, search_steps=1)).group_bits[group] == 4
        assert louder.quantize(options(3, search_steps=1, include_uniform=False)).group_bits[group] == 4


@pytest.mark.parametrize(("bits", "seed"), list(itertools.product((2, 3, 5), range(4))))
def test_choice_is_the_best_of_all_allocations(bits, seed):
    linear, method = problem(seed, columns=96), options(bits, search_steps=1)
    errors = linear.errors(method)
    assert list(errors) == [0, 1, 2, 3, 4, 5]
    ranking = rank_groups(linear.weight, linear.diagonal(method), 8)
    chosen = linear.quantize(method).group_bits
    pairs = sum(own > bits for own in chosen)
    assert errors[pairs] == min(errors.values()) <= errors[0]
    assert chosen == allocated_bits(ranking, pairs, [bits] * 12)
    # The same divergence of what the chosen bits stand for, from the whole outputs.
    parts = zip(torch.split(linear.weight, 8, 1), chosen, strict=True)
    rounded = torch.cat([to_nearest(part, dataclasses.replace(method.grid, bits=own)) for part, own in parts], 1)
    logs = [
        torch.log_softmax(torch.nn.functional.linear(linear.sample, w, linear.bias), 1)
        for w in (rounded, linear.weight)
    ]
    divergence = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean").item()
    assert divergence == pytest.approx(errors[pairs], rel=1e-3)


def to_nearest(weight, grid):
    scale, zero = (part.unsqueeze(1) for part in fit_group(weight, grid))
    return decode(encode(weight, scale, zero, grid), scale, zero)


def test_number_and_choice_of_groups_may_follow_two_rankings():
    """As released: how many change is chosen by the ranking without `damping`, and which by the one with it."""
    told_apart = 0
    for seed in range(12):
        linear = problem(seed, columns=96)
        method = options(3, preset="as_published", search_steps=1, damping=1.0)
        once = dataclasses.replace(method, damped_count=True)
        chosen = linear.quantize(method).group_bits
        assert list(chosen) == linear.slowly(method).bits
        errors = linear.errors(method)
        pairs = min(errors, key=errors.get)
        assert chosen == allocated_bits(rank_groups(linear.weight, linear.diagonal(method), 8), pairs, [3] * 12)
        told_apart += chosen != linear.quantize(once).group_bits
    assert told_apart >= 2


def test_a_hessian_that_the_absolute_damping_cannot_mend_is_refused():
    linear = problem(0, columns=96)
    linear.hessian = linear.sample[:10].T @ linear.sample[:10]
    for fields in ({"damped_count": True}, {"absolute_damping": 0.01}):
        assert linear.outcome(options(3, search_steps=1, **{"damped_count": False} | fields)).damping == 0.01
    with pytest.raises(
        NumericalError, match=r"options\.absolute_damping = 0\.0 alone.*set options\.damped_count: true"
    ):
        linear.outcome(options(3, damped_count=False))


def test_uniform_is_left_out_as_published():
    linear = problem(1, columns=96)
    with_uniform, without = (linear.errors(options(3, include_uniform=on)) for on in (True, False))
    assert with_uniform[0] > 0
    assert without == {pairs: error for pairs, error in with_uniform.items() if pairs}


def test_allocation_sees_the_bias_on_both_sides():
    linear, method = problem(4, columns=96), options(3)
    with_bias, without = linear.errors(method), linear.errors(method, bias=False)
    assert with_bias != pytest.approx(without, rel=1e-2)
    # What all outputs share leaves softmax alone.
    linear.bias = torch.full_like(linear.bias, 3.0)
    assert linear.errors(method) == pytest.approx(without, rel=1e-3)
    # A bias on one side alone looks like an error of the weights.
    linear.bias = torch.randn(8, generator=torch.Generator().manual_seed(0))
    one_sided = linear.errors(dataclasses.replace(method, bias_in_allocation=False))
    assert all(one_sided[pairs] > 2 * error for pairs, error in linear.errors(method).items())
