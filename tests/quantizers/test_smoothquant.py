"""SmoothQuant against its equation, against RTN where the two agree, and on outliers, for which it was made."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantizers.activations import ActivationGrid
from quantizers.apply import installed
from quantizers.block_source import InMemory
from quantizers.errors import QuantizationError
from quantizers.families import family_of
from quantizers.grid import Grid
from quantizers.rtn import Rtn, round_to_nearest
from quantizers.smoothquant import SmoothQuant, smoothing_scale
from quantizers.stream import quantize_blocks
from tests.outliers import make_outliers
from tests.quantizers.conftest import MODELS, build, distance, logits
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


MAGNITUDES = st.one_of(st.sampled_from([0.0, 1e-30, 1e-6]), st.floats(2**-10, 1e4, width=32))


@given(st.data(), st.integers(1, 12), st.floats(0, 1))
def test_scales_are_equation_4_for_any_ranges(data, channels, alpha):
    """Above the floors of 1e-5 it moves range from one side to the other, and at 1/2 leaves both equal."""
    max_abs, *rows = data.draw(st.lists(st.lists(MAGNITUDES, min_size=channels, max_size=channels), min_size=3))
    weights = [torch.tensor(rows[:1]), -torch.tensor(rows[1:])]
    largest = torch.tensor(rows).amax(0)
    expected = reference.smoothing_scale(max_abs, [weight.tolist() for weight in weights], alpha)
    found = smoothing_scale(torch.tensor(max_abs), weights, alpha)
    assert torch.isfinite(found).all()
    assert (found >= 1e-5).all()
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    plain = (torch.tensor(max_abs) > 1e-5) & (largest > 1e-5)
    balanced = smoothing_scale(torch.tensor(max_abs), weights, 0.5)
    torch.testing.assert_close(
        (torch.tensor(max_abs) / balanced)[plain], (largest * balanced)[plain], rtol=1e-4, atol=0
    )


@given(st.data(), st.integers(1, 12))
def test_limits_of_alpha(data, channels):
    """0: weights of equal range, whatever the activations; 1: activations of equal range, whatever the weights."""
    max_abs, other, weight = (
        torch.tensor(data.draw(st.lists(st.floats(2**-10, 1e4, width=32), min_size=channels, max_size=channels)))
        for _ in range(3)
    )
    all_weights = smoothing_scale(max_abs, [weight[None]], 0.0)
    torch.testing.assert_close(weight * all_weights, torch.ones(channels), rtol=1e-5, atol=0)
    assert torch.equal(all_weights, smoothing_scale(other, [weight[None]], 0.0))
    all_activations = smoothing_scale(max_abs, [weight[None]], 1.0)
    torch.testing.assert_close(max_abs / all_activations, torch.ones(channels), rtol=1e-5, atol=0)
    assert torch.equal(all_activations, smoothing_scale(max_abs, [other[None]], 1.0))


@settings(max_examples=25)
@given(st.sampled_from(list(MODELS)), st.floats(0, 1), st.integers(0, 10**6))
def test_the_smoothed_block_computes_the_same(case, alpha, seed):
    """Before anything is rounded, with outliers in the norms and a channel that is switched off."""
    model = build(case, num_hidden_layers=1, **({"layer_types": ["full_attention"]} if case == "gemma3_text" else {}))
    windows = torch.randint(0, 96, (3, 8), generator=torch.Generator().manual_seed(seed))
    family, kept = family_of(model), []
    block = model.get_submodule(f"{family.blocks}.0")
    with torch.no_grad():
        for norm in (family.attention_norm, family.mlp_norm):
            weight = block.get_submodule(norm).weight
            weight[seed % 48] = 40.0
            weight[(seed + 1) % 48] = -family.norm_offset

    class Watched(SmoothQuant):
        def transform(self, block):
            kept.append(super().transform(block))
            return kept[-1]

    list(quantize_blocks(InMemory(model), Watched(grid=GRID, alpha=alpha), windows))
    (found,) = kept
    assert set(found.references) == {*family.stages[0], *family.stages[2]}
    expected = logits(model, windows)
    for name, value in [(f"{name}.weight", value) for name, value in found.references.items()] + [*found.dense.items()]:
        owner, _, field = name.rpartition(".")
        assert not torch.equal(block.get_parameter(name), value)
        setattr(block.get_submodule(owner), field, nn.Parameter(value.clone(), requires_grad=False))
    assert (logits(model, windows) - expected).norm() <= 1e-5 * expected.norm()


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
