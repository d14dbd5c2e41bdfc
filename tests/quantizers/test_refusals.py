"""What is refused, and that the sentence says what, where, and the rule: weights, activations and options."""

import math

import pytest
import torch

from quantizers.activations import ActivationGrid
from quantizers.awq import Awq
from quantizers.billm import Billm
from quantizers.block_source import InMemory
from quantizers.errors import QuantizationError
from quantizers.gptaq import Gptaq
from quantizers.gptq import Gptq
from quantizers.grid import Grid
from quantizers.methods import METHODS
from quantizers.rtn import Rtn
from quantizers.slim_llm import SlimLlm
from quantizers.smoothquant import SmoothQuant
from quantizers.stream import quantize_blocks

GRID = Grid(bits=4)
STATIC = ActivationGrid(bits=8, granularity="per_tensor")
CASES = {
    "rtn": Rtn(grid=GRID),
    "gptq": Gptq(grid=GRID),
    "gptaq": Gptaq(grid=GRID),
    "billm": Billm(grid=Grid(bits=1)),
    "slim_llm": SlimLlm(grid=Grid(bits=3, group_size=16), search_steps=1),
    "awq": Awq(grid=GRID),
    "smoothquant": SmoothQuant(grid=GRID),
    "rtn with static activations": Rtn(grid=GRID, activations=STATIC),
    "rtn with folding": Rtn(grid=GRID, fold=0.5),
    "gptq on the float path": Gptq(grid=GRID, path="float"),
}
LINEARS = ("0.self_attn.v_proj", "1.self_attn.o_proj", "1.mlp.down_proj")


def test_every_method_is_here():
    assert set(METHODS) <= set(CASES)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("case", list(CASES))
def test_a_weight_that_is_not_finite_is_refused_by_name(llama, windows, case, linear, value):
    with torch.no_grad():
        llama.get_submodule(f"model.layers.{linear}").weight[3, 5] = value
    with pytest.raises(QuantizationError) as refused:
        list(quantize_blocks(InMemory(llama), CASES[case], windows))
    assert str(refused.value) == f"model.layers.{linear}.weight holds NaN or infinity"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("embed_tokens", "layers.0.self_attn.q_proj"),
        ("layers.1.input_layernorm", "layers.1.self_attn.q_proj"),
        ("layers.1.post_attention_layernorm", "layers.1.mlp.gate_proj"),
    ],
)
@pytest.mark.parametrize("case", [case for case, method in CASES.items() if method.needs.calibration])
def test_activations_that_are_not_finite_are_refused_by_name(llama, windows, case, broken, named, value):
    with torch.no_grad():
        llama.model.get_submodule(broken).weight[..., 2] = value
    with pytest.raises(QuantizationError) as refused:
        list(quantize_blocks(InMemory(llama), CASES[case], windows))
    assert str(refused.value) == f"the calibration inputs of model.{named} hold NaN or infinity"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "activation_bits = 1 is outside 2 to 8 (16 leaves activations alone)"),
        ({"bits": 9}, "activation_bits = 9 is outside 2 to 8 (16 leaves activations alone)"),
        (
            {"bits": 8, "granularity": "per_channel"},
            "activation_granularity = 'per_channel' is none of per_token, per_tensor",
        ),
        ({"bits": 8, "clip_ratio": 0.0}, "activation_clip_ratio = 0.0 must be above 0 and at most 1"),
        ({"bits": 8, "clip_ratio": 1.5}, "activation_clip_ratio = 1.5 must be above 0 and at most 1"),
        ({"bits": 8, "clip_ratio": math.nan}, "activation_clip_ratio = nan must be above 0 and at most 1"),
    ],
)
def test_refused_activation_grids(options, message):
    with pytest.raises(QuantizationError) as refused:
        ActivationGrid(**options)
    assert str(refused.value) == message


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": -0.1}, "options.fold = -0.1 must be from 0 to 1"),
        ({"fold": math.nan}, "options.fold = nan must be from 0 to 1"),
        ({"fold_damping": 0.0}, "options.fold_damping = 0.0 must be above 0 and finite"),
        ({"path": "both"}, "options.path = 'both' is none of quantized, float"),
        (
            {"path": "float", "fold": 0.5},
            "options.fold corrects earlier layers' errors, which path: float does not see",
        ),
    ],
)
def test_refused_options_of_every_method(name, options, message):
    with pytest.raises(QuantizationError) as refused:
        METHODS[name](grid=CASES[name].grid, **options)
    assert str(refused.value) == message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_fold_damping_that_is_not_finite_is_refused(value):
    with pytest.raises(QuantizationError, match=r"options\.fold_damping = \w+ must be above 0 and finite"):
        Rtn(grid=GRID, fold=0.5, fold_damping=value)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Awq, {"num_ratios": 0}, "options.num_ratios = 0 must be from 1 to 1000"),
        (Awq, {"num_ratios": 1001}, "options.num_ratios = 1001 must be from 1 to 1000"),
        (Awq, {"num_clips": 0}, "options.num_clips = 0 must be from 1 to 20"),
        (Awq, {"num_clips": 21}, "options.num_clips = 21 must be from 1 to 20"),
        (Awq, {"clip_tokens": 0}, "options.clip_tokens = 0 must be from 1 to 1048576"),
        (Awq, {"search_windows": -1}, "options.search_windows = -1 must be from 0 to 1048576"),
        (Awq, {"path": "quantized"}, "options.path = 'quantized': awq calibrates on the float path; leave it out"),
        (SmoothQuant, {"alpha": -0.1}, "options.alpha = -0.1 must be from 0 to 1"),
        (SmoothQuant, {"alpha": math.nan}, "options.alpha = nan must be from 0 to 1"),
        (
            SmoothQuant,
            {"path": "quantized"},
            "options.path = 'quantized': smoothquant calibrates on the float path; leave it out",
        ),
        (
            SmoothQuant,
            {"quantize_qkv_outputs": True, "activations": STATIC},
            "options.quantize_qkv_outputs has no static scales; use activation_granularity: per_token, or set it to "
            "false",
        ),
        (Gptaq, {"alpha": 1.5}, "options.alpha = 1.5 must be from 0 to 1"),
        (Gptaq, {"alpha": math.nan}, "options.alpha = nan must be from 0 to 1"),
        (Gptaq, {"carry": "v"}, "options.carry = 'v' is none of w, w_clamped, q"),
        (
            Gptaq,
            {"path": "float"},
            "options.path = 'float' leaves gptaq no drift to correct; use gptq, or path: quantized",
        ),
        (
            Gptaq,
            {"fold": 0.5},
            "options.fold corrects what gptaq corrects already; use gptq with fold, or fold: 0",
        ),
    ],
)
def test_refused_options(kind, options, message):
    with pytest.raises(QuantizationError) as refused:
        kind(grid=GRID, **options)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": -1}, "bits = -1 is outside 1 to 8"),
        ({"bits": math.nan}, "bits = nan is outside 1 to 8"),
        ({"bits": 4, "group_size": -8}, "group_size = -8 is negative; 0 means per channel"),
        (
            {"bits": 4, "convention": "int4"},
            "convention = 'int4' is none of gptq-asym, awq-asym, gptq-sym, gptq-sym-released, gptaq-sym, sq-sym",
        ),
        (
            {"bits": 4, "convention": "gptq-symm"},
            "convention = 'gptq-symm' is none of gptq-asym, awq-asym, gptq-sym, gptq-sym-released, gptaq-sym, sq-sym; "
            "did you mean 'gptq-sym'?",
        ),
        (
            {"bits": 1, "mse_search": True},
            "mse_search has no range to shrink at 1 bit; use 2 bits or more, or leave it out",
        ),
        ({"bits": 4, "scale_dtype": "float64"}, "scale_dtype = 'float64' is none of float16, bfloat16, float32"),
    ],
)
def test_refused_grids(options, message):
    with pytest.raises(QuantizationError) as refused:
        Grid(**options)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("size", "tail_group", "message"),
    [
        (64, True, "group_size = 64 is larger than the 48 inputs of a.b; use 48 or 16 or 8 or per_channel"),
        (
            32,
            False,
            "group_size = 32 does not divide the 48 inputs of a.b; use 48 or 16 or 8 or per_channel, or set "
            "tail_group: true for a smaller last group",
        ),
    ],
)
def test_group_sizes_that_do_not_fit(size, tail_group, message):
    with pytest.raises(QuantizationError) as refused:
        Grid(bits=4, group_size=size, tail_group=tail_group).check_fits(48, "a.b")
    assert str(refused.value) == message
