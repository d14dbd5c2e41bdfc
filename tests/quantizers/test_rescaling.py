"""Rescalings change no output, whatever is rescaled and however its norms are rounded."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quantizers.block import record_inputs, run_block
from quantizers.block_source import InMemory
from quantizers.errors import QuantizationError
from quantizers.families import family_of
from quantizers.rescaling import Rescaling, RestoredWeight, value_reaches_output_unmixed
from tests.outliers import make_outliers


def outputs(model, block, windows):
    family = family_of(model)
    hidden, arguments = record_inputs(model, family, [windows])
    with torch.no_grad():
        run_block(block, family, hidden, arguments[0])
    return hidden[0]


def rewritten(block, rescaling):
    changed = copy.deepcopy(block)
    for name, weight in rescaling.weights.items():
        changed.get_submodule(name).weight = nn.Parameter(weight.to(torch.float32))
    for name, value in rescaling.dense.items():
        owner, _, field = name.rpartition(".")
        setattr(changed.get_submodule(owner), field, nn.Parameter(value.float()))
    return changed


def rescale_everything(block, family, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rescaling = Rescaling(block, family)

    def scale(size):
        return torch.exp(torch.randn(size, generator=generator))

    rescaling.norm_to_linears(family.attention_norm, family.stages[0], scale(48))
    if value_reaches_output_unmixed(block, family):
        rescaling.linear_to_linear(family.attention_inputs[2], family.attention_output, scale(64))
    rescaling.norm_to_linears(family.mlp_norm, family.stages[2], scale(48))
    rescaling.linear_to_linear(family.mlp_inputs[1], family.mlp_output, scale(80))
    return rescaling


def test_outputs_are_kept_for_every_family(any_model, windows):
    block, family = any_model.model.layers[0], family_of(any_model)
    rescaling = rescale_everything(block, family)
    expected = outputs(any_model, block, windows)
    found = outputs(any_model, rewritten(block, rescaling), windows)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert "self_attn.k_proj" in rescaling.weights
    assert (family.attention_output in rescaling.weights) == value_reaches_output_unmixed(block, family)


@pytest.mark.parametrize("case", ["llama", "gemma", "gemma2", "qwen3"])
def test_a_norm_rounded_to_bfloat16_loses_nothing(make_model, windows, case):
    """The linears make up for the norm as stored, not for the scale that was asked for."""
    model = make_model(case).to(torch.bfloat16)
    family = family_of(model)
    block = model.model.layers[0]
    rescaling = rescale_everything(block, family)
    assert all(value.dtype == torch.bfloat16 for value in rescaling.dense.values())
    wide, wide_block = copy.deepcopy(model).float(), copy.deepcopy(block).float()
    expected = outputs(wide, wide_block, windows)
    found = outputs(wide, rewritten(wide_block, rescaling), windows)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_channels_that_are_switched_off_stay_off(llama, windows):
    with torch.no_grad():
        llama.model.layers[0].input_layernorm.weight[3] = 0
    block = llama.model.layers[0]
    rescaling = rescale_everything(block, family_of(llama))
    assert all(torch.isfinite(weight).all() for weight in rescaling.weights.values())
    assert rescaling.dense["input_layernorm.weight"][3] == 0
    expected = outputs(llama, block, windows)
    assert torch.allclose(outputs(llama, rewritten(block, rescaling), windows), expected, atol=1e-5)


def test_input_scales_say_what_inputs_are_divided_by(llama):
    family = family_of(llama)
    rescaling = Rescaling(llama.model.layers[0], family)
    scale = torch.linspace(0.5, 2, 80)
    rescaling.linear_to_linear("mlp.up_proj", "mlp.down_proj", scale)
    rescaling.linear_to_linear("mlp.up_proj", "mlp.down_proj", scale)
    assert torch.allclose(rescaling.transform().input_scales["mlp.down_proj"], scale * scale)
    assert torch.allclose(rescaling.transform().output_scales["mlp.up_proj"], scale * scale)
    assert "mlp.gate_proj" not in rescaling.transform().input_scales
    assert "mlp.down_proj" not in rescaling.transform().output_scales


def test_restored_weights_are_those_of_the_block_as_it_was(any_model):
    """To rounding, where nothing is quantized: the scales undo all that was rescaled."""
    block = any_model.model.layers[0]
    transform = rescale_everything(block, family_of(any_model)).transform()
    assert transform.output_scales
    for name, rescaled in transform.references.items():
        restored = RestoredWeight(
            weight=SimpleNamespace(decode=lambda rescaled=rescaled: rescaled),
            input_scale_I=transform.input_scales.get(name),
            output_scale_O=transform.output_scales.get(name),
        )
        torch.testing.assert_close(restored.decode(), block.get_submodule(name).weight.float(), rtol=1e-5, atol=1e-7)


def test_a_norm_that_is_not_finite_is_refused_by_name(llama):
    with torch.no_grad():
        llama.model.layers[0].input_layernorm.weight[3] = float("nan")
    rescaling = Rescaling(InMemory(llama).block(0), family_of(llama))
    with pytest.raises(QuantizationError, match=r"input_layernorm\.weight holds NaN or infinity"):
        rescaling.norm_to_linears("input_layernorm", ("self_attn.q_proj",), torch.ones(48))


def test_outliers_change_no_logits(llama, windows):
    with torch.no_grad():
        expected = llama(windows).logits
        make_outliers(llama, channels=3, factor=50.0)
        found = llama(windows).logits
    assert (found - expected).abs().max() <= 1e-4
