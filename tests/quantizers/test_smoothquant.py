"""SmoothQuant against its equation, against RTN where the two agree, and on outliers, for which it was made."""

import pytest
import torch

from quantizers.activations import ActivationGrid
from quantizers.apply import installed
from quantizers.block_source import InMemory
from quantizers.errors import QuantizationError
from quantizers.grid import Grid
from quantizers.rtn import Rtn, round_to_nearest
from quantizers.smoothquant import SmoothQuant, smoothing_scale
from quantizers.stream import quantize_blocks
from tests.outliers import make_outliers
from tests.quantizers.conftest import distance, logits
from tests.reference import rescaling as reference

GRID = Grid(bits=8, convention="sq-sym", scale_dtype="float32")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_scales_equal_the_reference(alpha):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 12, generator=generator) for rows in (8, 4)]
    weights[0][:, 5] = weights[1][:, 5] = 0  # no weight reads it
    ranges = torch.rand(12, generator=generator) * 9
    ranges[2] = 0  # never active
    expected = reference.smoothing_scale(ranges.tolist(), [weight.tolist() for weight in weights], alpha)
    found = smoothing_scale(ranges, weights, alpha)
    assert torch.isfinite(found).all()
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_alone_changes_nothing(any_model, windows, alpha):
    """At 8 bits with one weight per group rounding is all but exact, so what is left would be smoothing's own."""
    method = SmoothQuant(grid=Grid(bits=8, group_size=1, convention="sq-sym", scale_dtype="float32"), alpha=alpha)
    expected = logits(any_model, windows)
    with installed(any_model, list(quantize_blocks(InMemory(any_model), method, windows))):
        found = logits(any_model, windows)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_without_smoothing_it_is_rtn(llama, windows):
    for block in quantize_blocks(InMemory(llama), SmoothQuant(grid=GRID, smooth=False), windows):
        assert not block.dense
        for linear in block.linears:
            expected = round_to_nearest(llama.get_submodule(linear.name).weight.detach(), GRID)
            assert torch.equal(linear.weight.decode(), expected.decode())


def test_only_the_two_norms_are_smoothed(llama, windows):
    block = next(quantize_blocks(InMemory(llama), SmoothQuant(grid=GRID), windows))
    prefix = "model.layers.0."
    assert set(block.dense) == {f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight"}
    for linear in block.linears:
        same = torch.allclose(linear.weight.decode(), llama.get_submodule(linear.name).weight, atol=0.02)
        assert same == linear.name.endswith(("o_proj", "down_proj"))


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_it_recovers_what_outliers_cost(llama, windows, granularity):
    make_outliers(llama, channels=3, factor=60.0)
    activations = ActivationGrid(bits=8, granularity=granularity)
    nearest = distance(llama, windows, Rtn(grid=GRID, activations=activations))
    assert distance(llama, windows, SmoothQuant(grid=GRID, activations=activations)) < 0.2 * nearest


def test_released_evaluation_quantizes_what_q_k_and_v_put_out(llama, windows):
    activations = ActivationGrid(bits=8)
    method = SmoothQuant(grid=GRID, activations=activations, **SmoothQuant.presets["as_published"])
    block = next(quantize_blocks(InMemory(llama), method, windows))
    assert [linear.outputs is not None for linear in block.linears] == [True] * 3 + [False] * 4
    assert all(linear.inputs.grid == activations for linear in block.linears)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.1}, "alpha"),
        ({"path": "quantized"}, "float path"),
        ({"activations": ActivationGrid(bits=8, granularity="per_tensor"), "quantize_qkv_outputs": True}, "static"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(QuantizationError, match=message):
        SmoothQuant(grid=GRID, **options)
