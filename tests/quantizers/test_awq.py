"""AWQ against its equations, against RTN where the two agree, and on the outputs it is meant to keep."""

import pytest
import torch

from quantizers.activations import ActivationGrid
from quantizers.apply import installed
from quantizers.awq import Awq, candidate_scales, clip
from quantizers.block_source import InMemory
from quantizers.errors import QuantizationError
from quantizers.float_statistics import collect_float_statistics
from quantizers.grid import Grid
from quantizers.rtn import Rtn, round_to_nearest
from quantizers.stream import quantize_blocks
from tests.outliers import make_outliers
from tests.quantizers.conftest import distance, logits
from tests.reference import rescaling as reference

GRID = Grid(bits=3, group_size=16, scale_dtype="float32")


def test_candidates_equal_the_reference():
    means = torch.rand(10, generator=torch.Generator().manual_seed(0)) * 4
    means[3] = 0
    for step, found in enumerate(candidate_scales(means, [], Awq(grid=GRID))):
        assert found.tolist() == pytest.approx(reference.awq_scale(means.tolist(), step / 20), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_clipping_equals_the_reference(bits):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(5, 20, generator=generator) ** 3
    inputs = torch.randn(30, 20, generator=generator)
    clipped = clip(weight, inputs, Grid(bits=bits, group_size=8, tail_group=True, scale_dtype="float32"), 10)
    steps = set()
    for row in range(5):
        for first in range(0, 20, 8):
            part = weight[row, first : first + 8]
            step, errors = reference.clip_bound(part.tolist(), inputs[:, first : first + 8].tolist(), bits)
            bound = part.abs().max().item() * (1 - step / 20)
            assert sorted(errors)[1] > min(errors) * (1 + 1e-4), "a tie: choose another seed"
            assert clipped[row, first : first + 8].tolist() == pytest.approx(
                part.clamp(-bound, bound).tolist(), abs=1e-6
            )
            steps.add(step)
    assert len(steps) > 1


def test_a_linear_s_ratio_is_the_best_by_the_reference(llama, windows):
    """For down the module is the linear itself: every ratio's output error on all tokens, in float64."""
    seen = []
    handle = llama.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits(llama, windows)
    handle.remove()
    inputs = seen[0].reshape(-1, 80).double()
    weight = llama.model.layers[0].mlp.down_proj.weight.detach()
    errors = []
    for step in range(20):
        scale = reference.awq_scale(inputs.abs().mean(0).tolist(), step / 20)
        rounded = torch.tensor(reference.rounded(weight.tolist(), scale, 3, 16), dtype=torch.float64)
        errors.append((inputs @ (rounded - weight.double()).T).square().sum().item())
    assert sorted(errors)[1] > min(errors) * (1 + 1e-4), "a tie: choose another model"
    scale = reference.awq_scale(inputs.abs().mean(0).tolist(), errors.index(min(errors)) / 20)
    expected = torch.tensor(reference.rounded(weight.tolist(), scale, 3, 16)) * torch.tensor(scale)
    block = next(quantize_blocks(InMemory(llama), Awq(grid=GRID, clip=False), windows))
    assert torch.allclose(block.linears[-1].weight.decode(), expected, atol=1e-4)


def test_ratio_zero_without_clipping_is_rtn(any_model, windows):
    method = Awq(grid=GRID, num_ratios=1, clip=False)
    for index, block in enumerate(quantize_blocks(InMemory(any_model), method, windows)):
        for name, value in block.dense.items():
            assert torch.equal(value, any_model.get_parameter(name)), index
        for linear in block.linears:
            expected = round_to_nearest(any_model.get_submodule(linear.name).weight.detach(), GRID)
            assert torch.equal(linear.weight.decode(), expected.decode())


def test_scaling_alone_changes_nothing(any_model, windows):
    """At 8 bits with one weight per group rounding is all but exact, so what is left would be scaling's own."""
    method = Awq(grid=Grid(bits=8, group_size=1, scale_dtype="float32"), clip=False)
    expected = logits(any_model, windows)
    with installed(any_model, list(quantize_blocks(InMemory(any_model), method, windows))):
        found = logits(any_model, windows)
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("options", [{}, {"duo_scaling": True}, {"search_windows": 2}, {"clip": False}])
def test_it_keeps_outputs_closer_than_rtn(llama, windows, options):
    make_outliers(llama, channels=4, factor=20.0)
    assert distance(llama, windows, Awq(grid=GRID, **options)) < 0.8 * distance(llama, windows, Rtn(grid=GRID))


def test_the_model_is_left_alone_and_results_are_the_same_every_time(llama, windows):
    before = {name: (id(value), value.clone()) for name, value in llama.named_parameters()}
    first, second = (list(quantize_blocks(InMemory(llama), Awq(grid=GRID), windows)) for _ in range(2))
    for name, value in llama.named_parameters():
        assert id(value) == before[name][0]
        assert torch.equal(value, before[name][1])
    for one, other in zip(first, second, strict=True):
        for left, right in zip(one.linears, other.linears, strict=True):
            assert torch.equal(left.weight.decode(), right.weight.decode())
            assert 0 < left.output_error < 1


def test_statistics_that_are_known_already_are_used(llama, windows):
    stored = list(collect_float_statistics(InMemory(llama), windows, hessians=False))
    method = Awq(grid=GRID, activations=ActivationGrid(bits=8, granularity="per_tensor"))
    given = next(quantize_blocks(InMemory(llama), method, windows, shared=stored.__getitem__))
    alone = next(quantize_blocks(InMemory(llama), method, windows))
    for left, right in zip(given.linears, alone.linears, strict=True):
        assert torch.equal(left.weight.decode(), right.weight.decode())
        assert torch.equal(left.inputs.scale, right.inputs.scale)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_width_runs(llama, windows, bits):
    blocks = list(quantize_blocks(InMemory(llama), Awq(grid=Grid(bits=bits, convention="awq-asym")), windows))
    assert all(torch.isfinite(linear.weight.decode()).all() for block in blocks for linear in block.linears)


def test_weights_that_are_not_finite_are_refused_by_name(llama, windows):
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[2, 2] = float("inf")
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        next(quantize_blocks(InMemory(llama), Awq(grid=GRID), windows))


@pytest.mark.parametrize("options", [{"num_ratios": 0}, {"num_clips": 21}, {"path": "quantized"}, {"clip_tokens": 0}])
def test_bad_options(options):
    with pytest.raises(QuantizationError, match="options"):
        Awq(grid=GRID, **options)
