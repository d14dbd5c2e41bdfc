"""Linears by modelled operators, against exact arithmetic and against the simulated path."""

import copy

import pytest
import torch
from torch import nn

from quantizers.activations import ActivationGrid, ActivationQuantizer
from quantizers.apply import StoredBlock, StoredLinear, installed
from quantizers.block_source import InMemory
from quantizers.errors import NoKernelError, QuantizationError
from quantizers.grid import Grid
from quantizers.methods import METHODS
from quantizers.native import natively_installed
from quantizers.rtn import round_to_nearest
from quantizers.stream import quantize_blocks
from tests.reference.npu_operators import ModelledOperators

OPERATORS = ModelledOperators()
TOKENS = ActivationGrid(bits=8)
GRIDS = {
    "w8a8": Grid(bits=8, convention="sq-sym"),
    "w8a16 per channel": Grid(bits=8, scale_dtype="bfloat16"),
    "w8a16 in groups": Grid(bits=8, group_size=32, convention="sq-sym", scale_dtype="bfloat16"),
    "w4a16 per channel": Grid(bits=4, convention="awq-asym", scale_dtype="bfloat16"),
    "w4a16 in groups": Grid(bits=4, group_size=64, scale_dtype="bfloat16", tail_group=True),
}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a step, relative


class One(nn.Module):
    """A model of one linear."""

    def __init__(self, dtype, bias=True, shape=(24, 96)):
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype).requires_grad_(requires_grad=False)

    def forward(self, inputs):
        return self.linear(inputs)


def stored_in(model, grid, *, quantize_inputs=False):
    weight = round_to_nearest(model.linear.weight.float(), grid)
    inputs = ActivationQuantizer(grid=TOKENS) if quantize_inputs else None
    return StoredBlock(linears=[StoredLinear(name="linear", weight=weight, inputs=inputs)])


def inputs_like(model, tokens=(5, 7)):
    width, dtype = model.linear.in_features, model.linear.weight.dtype
    return torch.randn(*tokens, width, generator=torch.Generator().manual_seed(4)).to(dtype)


def natively(model, block, inputs):
    with natively_installed(model, [block], OPERATORS):
        return model(inputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_products_are_exact(dtype, bias):
    """Integers times integers, then both scales, then one rounding: against int64 and float64."""
    model = One(dtype, bias=bias)
    block = stored_in(model, GRIDS["w8a8"], quantize_inputs=True)
    inputs = inputs_like(model)
    outputs = natively(model, block, inputs)
    weight = block.linears[0].weight
    scale = inputs.float().abs().amax(-1, keepdim=True) / 127
    codes = torch.round(inputs.float() / scale).long()
    products = codes @ (weight.codes_OI.long() - 128).T
    assert products.abs().max() > 1 << 11  # more than the outputs' dtypes can count
    exact = products.double() * scale.double() * weight.scale_OG[:, 0].double()
    if bias:
        exact += model.linear.bias.double()
    assert outputs.dtype == dtype
    assert outputs.shape == (5, 7, 24)
    error = (outputs.double() - exact).abs()
    assert (error <= 1.01 * ROUNDING[dtype] * exact.abs() + 1e-6).all()


def test_quantized_activations_agree_with_the_simulation_in_float32():
    """There nothing is rounded between codes and products, so that both compute the same but for the output's dtype."""
    model = One(torch.bfloat16)
    block, inputs = stored_in(model, GRIDS["w8a8"], quantize_inputs=True), inputs_like(model)
    outputs = natively(model, block, inputs)
    wide = copy.deepcopy(model).float()
    with installed(wide, [block]):
        expected = wide(inputs.float())
    assert (outputs.float() - expected).abs().max() <= 1.01 * ROUNDING[torch.bfloat16] * expected.abs().max()
    assert (expected - copy.deepcopy(model).float()(inputs.float())).abs().max() > 0  # it does quantize


@pytest.mark.parametrize("grid", [name for name in GRIDS if name != "w8a8"])
@pytest.mark.parametrize("bias", [True, False])
def test_quantized_weights_agree_with_the_simulation(grid, bias):
    model = One(torch.bfloat16, bias=bias)
    block, inputs = stored_in(model, GRIDS[grid]), inputs_like(model)
    outputs = natively(model, block, inputs)
    weight = block.linears[0].weight.decode().bfloat16().double()
    exact = inputs.double() @ weight.T + (model.linear.bias.double() if bias else 0)
    assert ((outputs.double() - exact).abs() <= 1.01 * ROUNDING[torch.bfloat16] * exact.abs() + 1e-6).all()
    with installed(model, [block]):
        simulated = model(inputs)
    # Both round the same sum once: they differ where it lies between two numbers, by one step.
    assert ((outputs - simulated).double().abs() <= 2.02 * ROUNDING[torch.bfloat16] * exact.abs() + 1e-6).all()


def logits(model, windows):
    with torch.inference_mode():
        return model(windows).logits.double()


@pytest.mark.parametrize("case", ["llama", "llama with biases", "qwen2", "gemma2"])
@pytest.mark.parametrize("name", ["smoothquant", "awq", "gptq"])
def test_whole_models_agree_with_the_simulation(make_model, windows, case, name):
    """Smoothing changes norms, AWQ biases too.

    Quantized activations multiply what rounds otherwise: a value that lies near the middle of two codes may go to the
    other one. So the yardstick is how far the simulation in 16 bits is from the one in float32.
    """
    model = make_model(case, hidden_size=64, intermediate_size=96).half()
    wide = copy.deepcopy(model).float()
    grid, inputs = (GRIDS["w8a8"], TOKENS) if name == "smoothquant" else (Grid(bits=4, group_size=32), None)
    method = METHODS[name](grid=grid, activations=inputs)
    blocks = list(quantize_blocks(InMemory(model), method, windows[:2]))
    assert any(block.dense for block in blocks) == (name != "gptq")
    before = logits(model, windows)
    with installed(wide, blocks):
        exact = logits(wide, windows)
    with installed(model, blocks):
        simulated = logits(model, windows)
    with natively_installed(model, blocks, OPERATORS):
        native = logits(model, windows)
    assert (native - exact).norm() < 1.2 * (simulated - exact).norm()
    assert torch.equal(logits(model, windows), before)


def test_changed_biases_reach_the_operator():
    model = One(torch.bfloat16)
    block = stored_in(model, GRIDS["w4a16 per channel"])
    inputs = inputs_like(model)
    before = natively(model, block, inputs)
    changed = StoredBlock(linears=block.linears, dense={"linear.bias": model.linear.bias + 8})
    after = natively(model, changed, inputs)
    assert ((after - before).float() - 8).abs().max() < 0.1
    assert model.linear.bias.abs().max() < 1  # put back


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_token_that_is_not_finite_stays_so_and_alone(grid, value):
    model = One(torch.bfloat16)
    block, inputs = stored_in(model, GRIDS[grid], quantize_inputs=grid == "w8a8"), inputs_like(model)
    sound = natively(model, block, inputs)
    inputs[1, 2, 5] = value
    broken = natively(model, block, inputs)
    assert not broken[1, 2].isfinite().any()
    broken[1, 2] = sound[1, 2]
    assert torch.equal(broken, sound)


def test_everything_is_restored_and_hooks_still_run():
    model = One(torch.bfloat16)
    block, inputs = stored_in(model, GRIDS["w8a16 per channel"]), inputs_like(model)
    before, parameters = model(inputs), dict(model.named_parameters())
    seen = []
    model.linear.register_forward_hook(lambda *told: seen.append(told))
    with natively_installed(model, [block, block], OPERATORS):
        inside = model(inputs)
    assert len(seen) == 1
    assert not torch.equal(inside, before)
    assert torch.equal(model(inputs), before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert "forward" not in vars(model.linear)


def test_restored_after_an_exception():
    model = One(torch.bfloat16)
    inputs = inputs_like(model)
    before = model(inputs)

    def broken():
        yield stored_in(model, GRIDS["w8a16 per channel"])
        raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"), natively_installed(model, broken(), OPERATORS):
        pytest.fail("entered")
    assert torch.equal(model(inputs), before)


def test_a_linear_without_a_kernel_is_named():
    model = One(torch.bfloat16)
    with (
        pytest.raises(NoKernelError, match="linear: weight_bits = 3 has no kernel; use 8 or 4"),
        natively_installed(model, [stored_in(model, Grid(bits=3))], OPERATORS),
    ):
        pytest.fail("entered")
    other = One(torch.bfloat16, shape=(24, 64))
    with (
        pytest.raises(ValueError, match=r"linear: artifact of shape \(24, 64\), model has \(24, 96\)"),
        natively_installed(model, [stored_in(other, GRIDS["w8a16 per channel"])], OPERATORS),
    ):
        pytest.fail("entered")
    norm = StoredBlock(linears=[StoredLinear(name="", weight=stored_in(model, GRIDS["w8a8"]).linears[0].weight)])
    with pytest.raises(QuantizationError, match="not a Linear"), natively_installed(model, [norm], OPERATORS):
        pytest.fail("entered")
