"""Quantized activations through the engine: what methods see, what the artifact says, and what evaluation runs."""

import pytest
import torch

from quantizers.activations import ActivationGrid, ActivationQuantizer
from quantizers.apply import installed
from quantizers.block_source import InMemory
from quantizers.errors import QuantizationError
from quantizers.gptaq import Gptaq
from quantizers.gptq import Gptq
from quantizers.grid import Grid
from quantizers.rtn import Rtn
from quantizers.stream import quantize_blocks

DYNAMIC = ActivationGrid(bits=4)
STATIC = ActivationGrid(bits=4, granularity="per_tensor", symmetric=False)


def logits(model, windows):
    with torch.no_grad():
        return model(windows).logits


@pytest.mark.parametrize("activations", [DYNAMIC, STATIC])
@pytest.mark.parametrize("kind", [Rtn, Gptq, Gptaq])
def test_installed_model_quantizes_the_inputs_of_its_linears(any_model, windows, kind, activations):
    plain = logits(any_model, windows)
    method = kind(grid=Grid(bits=8), activations=activations)
    blocks = list(quantize_blocks(InMemory(any_model), method, windows))
    seen = {}
    with installed(any_model, blocks):
        for linear in (linear for block in blocks for linear in block.linears):
            module = any_model.get_submodule(linear.name)
            module.register_forward_hook(
                lambda module, given, _, name=linear.name: seen.setdefault(name, (module, given[0])) and None
            )
        assert not torch.equal(logits(any_model, windows), plain)
    for block in blocks:
        for linear in block.linears:
            _, given = seen[linear.name]
            assert linear.inputs.grid == activations
            assert linear.outputs is None
            # what reached the product lies on the grid: at most 16 values per token, or in all
            rows = given.reshape(-1, given.shape[-1]) if activations == DYNAMIC else given.reshape(1, -1)
            assert all(len(row.unique()) <= 16 for row in rows)
    assert torch.equal(logits(any_model, windows), plain)


def test_static_scales_come_from_the_float_models_ranges(llama, windows):
    blocks = list(quantize_blocks(InMemory(llama), Rtn(grid=Grid(bits=8), activations=STATIC), windows))
    seen = []
    handle = llama.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits(llama, windows)
    handle.remove()
    expected = ActivationQuantizer.calibrated(STATIC, seen[0].min(), seen[0].max())
    found = blocks[1].linears[-1]
    assert found.name == "model.layers.1.mlp.down_proj"
    assert torch.allclose(found.inputs.scale, expected.scale, rtol=1e-4)
    assert found.inputs.zero == expected.zero
    assert found.stored_bytes == found.weight.stored_bytes + 8


def test_dynamic_activations_alone_need_no_data():
    assert not Rtn(grid=Grid(bits=8), activations=DYNAMIC).needs.calibration
    assert Rtn(grid=Grid(bits=8), activations=STATIC).needs.calibration


def test_gptq_is_fitted_to_quantized_inputs(llama, windows):
    """Its Hessian is that of the inputs as the finished model will see them."""
    hessians = []

    class Watched(Gptq):
        def quantize(self, group):
            hessians.append(group.statistics.hessian_II)
            return super().quantize(group)

    seen = []
    handle = llama.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits(llama, windows)
    handle.remove()
    list(quantize_blocks(InMemory(llama), Watched(grid=Grid(bits=4), activations=DYNAMIC), windows))
    inputs = ActivationQuantizer(grid=DYNAMIC)(seen[0]).reshape(-1, 48).double()
    expected = 2 / len(windows) * inputs.T @ inputs
    assert (hessians[0].double() - expected).norm() <= 1e-4 * expected.norm()


def test_gptaq_sees_the_drift_that_quantized_inputs_bring(llama, windows):
    """With quantized activations even the first stage of the first block has drifted."""
    drifts = []

    class Watched(Gptaq):
        def quantize(self, group):
            drifts.append(group.statistics.drift_II.norm().item())
            return super().quantize(group)

    next(quantize_blocks(InMemory(llama), Watched(grid=Grid(bits=4), activations=DYNAMIC), windows))
    assert drifts[0] > 0
    drifts.clear()
    next(quantize_blocks(InMemory(llama), Watched(grid=Grid(bits=4)), windows))
    assert drifts[0] == 0


def test_the_next_block_sees_quantized_activations(llama, windows):
    """The walk's own picture of the model must be the installed model's: compare the inputs of the last linear."""
    hessians = []

    class Watched(Gptq):
        def quantize(self, group):
            hessians.append(group.statistics.hessian_II)
            return super().quantize(group)

    blocks = list(quantize_blocks(InMemory(llama), Watched(grid=Grid(bits=4), activations=DYNAMIC), windows))
    seen = []
    with installed(llama, blocks):
        llama.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, given, __: seen.append(given[0]))
        logits(llama, windows)
    inputs = seen[0].reshape(-1, 80).double()
    expected = 2 / len(windows) * inputs.T @ inputs
    assert (hessians[-1].double() - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("bits", [1, 0, 9])
def test_bad_bits(bits):
    with pytest.raises(QuantizationError, match="activation_bits"):
        ActivationGrid(bits=bits)
