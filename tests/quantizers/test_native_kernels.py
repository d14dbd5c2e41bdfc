"""Which linears have a kernel, and the sentence for those that have none."""

import dataclasses

import pytest

from quantizers.activations import ActivationGrid, ActivationQuantizer
from quantizers.apply import StoredLinear
from quantizers.block_source import InMemory
from quantizers.errors import NoKernelError
from quantizers.grid import Grid
from quantizers.methods import METHODS
from quantizers.native_kernels import Kernel, LinearForm, check_encoding, choose_kernel, form_of
from quantizers.rtn import round_to_nearest
from quantizers.stream import quantize_blocks

TOKENS = ActivationGrid(bits=8)
W8A8 = LinearForm(grid=Grid(bits=8, convention="sq-sym"), shape=(64, 96), dtype="bfloat16", inputs=TOKENS)
W8A16 = LinearForm(grid=Grid(bits=8, scale_dtype="bfloat16"), shape=(64, 96), dtype="bfloat16")
W4A16 = LinearForm(grid=Grid(bits=4, group_size=32, scale_dtype="bfloat16"), shape=(64, 96), dtype="bfloat16")


def changed(form, grid=None, inputs=None, **fields):
    """The form with some fields changed; `grid` and `inputs` are changes to these."""
    if grid:
        fields["grid"] = dataclasses.replace(form.grid, **grid)
    if inputs:
        fields["inputs"] = dataclasses.replace(form.inputs, **inputs)
    return dataclasses.replace(form, **fields)


@pytest.mark.parametrize(
    ("form", "kernel"),
    [
        (W8A8, Kernel.W8A8),
        (changed(W8A8, dtype="float16"), Kernel.W8A8),
        (changed(W8A8, {"scale_dtype": "float32", "convention": "gptq-sym"}), Kernel.W8A8),
        (changed(W8A8, {"group_size": 96}), Kernel.W8A8),  # one group is per channel
        (W8A16, Kernel.W8A16),
        (changed(W8A16, {"group_size": 32, "convention": "gptq-sym"}), Kernel.W8A16),
        (changed(W8A16, {"scale_dtype": "float16"}, dtype="float16"), Kernel.W8A16),
        (changed(W8A16, shape=(63, 65535)), Kernel.W8A16),
        (W4A16, Kernel.W4A16),
        (changed(W4A16, {"group_size": 0}), Kernel.W4A16),
        (changed(W4A16, {"group_size": 64, "tail_group": True}), Kernel.W4A16),
        (changed(W4A16, {"group_size": 48}, shape=(64, 48)), Kernel.W4A16),
    ],
)
def test_forms_with_a_kernel(form, kernel):
    assert choose_kernel(form) == kernel


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (changed(W8A16, dtype="float32"), "a model in float32 has no kernel; set its dtype to bfloat16 or float16"),
        (changed(W8A16, shape=(64, 65536)), r"shape \(64, 65536\) has no kernel; the operators end at 65535"),
        (changed(W8A8, shape=(70000, 96)), "the operators end at 65535"),
        (changed(W8A8, quantized_outputs=True), "quantized outputs have no kernel; leave quantize_qkv_outputs out"),
        *(
            (changed(W8A16, {"bits": bits}), f"weight_bits = {bits} has no kernel; use 8 or 4")
            for bits in (1, 2, 3, 5, 7)
        ),
        (changed(W4A16, inputs=None) and changed(W8A8, {"bits": 4}), "weight_bits = 4 with activation_bits = 8 has no"),
        (changed(W8A8, inputs={"bits": 4}), "weight_bits = 8 with activation_bits = 4 has no kernel here; use 8 and 8"),
        (
            changed(W8A8, inputs={"granularity": "per_tensor"}),
            "per token and symmetrically .*; leave activation_granul",
        ),
        (changed(W8A8, inputs={"symmetric": False}), "per token and symmetrically"),
        (changed(W8A8, inputs={"clip_ratio": 0.9}), "over their whole range"),
        (
            changed(W8A8, {"convention": "gptq-asym"}),
            "weights with zeros .* quantized activations; set symmetric: true",
        ),
        (
            changed(W8A8, {"group_size": 48}),
            "group_size = 48 has no kernel with quantized activations; use per_channel",
        ),
        (changed(W4A16, permuted=True), "do not follow one another have no kernel; set static_groups: true"),
        (changed(W4A16, {"group_size": 16}), "group_size = 16 has no kernel; use a multiple of 32, or per_channel"),
        (changed(W8A16, {"group_size": 48}), "group_size = 48 has no kernel"),
        (changed(W4A16, shape=(60, 96)), "4-bit weights of 60 output channels have no kernel; 8 are packed together"),
        (
            changed(W4A16, {"scale_dtype": "float16"}),
            "scale_dtype = float16 has no kernel in a model that computes in bfloat16; set scale_dtype: bfloat16",
        ),
        (changed(W8A16, {"scale_dtype": "float32"}, dtype="float16"), "set scale_dtype: float16"),
    ],
)
def test_forms_without_one(form, reason):
    with pytest.raises(NoKernelError, match=reason):
        choose_kernel(form)


def test_the_form_of_a_stored_linear(make_problem):
    weight, _ = make_problem(0, 64, 96)
    grid = Grid(bits=8, convention="sq-sym")
    stored = round_to_nearest(weight, grid)
    linear = StoredLinear(name="x", weight=stored, inputs=ActivationQuantizer(grid=TOKENS))
    assert form_of(linear, "bfloat16") == W8A8
    told = form_of(dataclasses.replace(linear, inputs=None, outputs=ActivationQuantizer(grid=TOKENS)), "float16")
    assert told == changed(W8A8, dtype="float16", quantized_outputs=True) or told.inputs is None
    assert (told.inputs, told.quantized_outputs, told.permuted) == (None, True, False)
    permuted = dataclasses.replace(stored, column_group_I=stored.codes_OI[0].int())
    assert form_of(dataclasses.replace(linear, weight=permuted), "bfloat16").permuted


@pytest.mark.parametrize("name", METHODS)
def test_methods_say_which_encoding_they_store(llama, windows, name):
    bits = METHODS[name].weight_bits[0] if 4 not in METHODS[name].weight_bits else 4
    options = {"block_size": 16} if name == "billm" else {}
    group = 0 if name == "billm" else 16
    method = METHODS[name](grid=Grid(bits=bits, group_size=group), **options)
    block = next(iter(quantize_blocks(InMemory(llama), method, windows[:2])))
    assert {linear.weight.encoding for linear in block.linears} == {method.encoding}
    if method.encoding == "uniform":
        check_encoding(method.encoding)
    else:
        with pytest.raises(NoKernelError, match=f"weights in the {method.encoding} encoding have no kernel"):
            form_of(block.linears[0], "bfloat16")
