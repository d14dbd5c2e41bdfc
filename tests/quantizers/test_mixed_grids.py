"""Linears with grids of their own: what each gets is what it would get in a uniform cell."""

from dataclasses import replace

import pytest
import torch

from quantizers.activations import ActivationGrid
from quantizers.apply import installed
from quantizers.block_source import InMemory
from quantizers.errors import QuantizationError
from quantizers.families import fused_groups
from quantizers.grid import Grid
from quantizers.method import check_grids, total_stored_bytes
from quantizers.methods import method_class
from quantizers.stream import check_model, linears_of, quantize_blocks
from tests.quantizers.conftest import build, distance, logits

FOUR, THREE = Grid(bits=4, group_size=16), Grid(bits=3, group_size=8)
DOWN = "*.mlp.down_proj"
FIRST_QKV = "model.layers.0.self_attn.[qkv]_proj"


def quantized(name, model, windows, grid=FOUR, **options):
    method = method_class(name)(grid=grid, **options)
    blocks = quantize_blocks(InMemory(model), method, windows)
    return {linear.name: linear for block in blocks for linear in block.linears}


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def windows():
    return torch.randint(96, (4, 24), generator=torch.Generator().manual_seed(0))


def is_own(name):
    return name.endswith("mlp.down_proj") or (
        name.startswith("model.layers.0.") and name[-6:] in ("q_proj", "k_proj", "v_proj")
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [("rtn", {}), ("gptq", {"path": "float"}), ("smoothquant", {}), ("awq", {"clip": False, "num_ratios": 4})],
)
def test_each_linear_is_as_in_the_uniform_cell_of_its_grid(model, windows, name, options):
    """Where the inputs that calibrate are the float model's, nothing else differs."""
    mixed = quantized(name, model, windows, layers=((DOWN, THREE), (FIRST_QKV, THREE)), **options)
    uniform = {grid: quantized(name, model, windows, grid, **options) for grid in (FOUR, THREE)}
    assert {is_own(linear) for linear in mixed} == {True, False}
    for linear, found in mixed.items():
        grid = THREE if is_own(linear) else FOUR
        assert found.weight.grid == grid
        if name != "awq":  # whose search of up -> down rescales up too, for the grid that down has
            assert torch.equal(found.weight.codes_OI, uniform[grid][linear].weight.codes_OI), linear
            assert torch.equal(found.weight.scale_OG, uniform[grid][linear].weight.scale_OG), linear


def test_on_the_quantized_path_earlier_linears_keep_what_they_had(model, windows):
    last = "model.layers.1.mlp.down_proj"
    mixed = quantized("gptq", model, windows, layers=((last, THREE),))
    uniform = quantized("gptq", model, windows)
    for linear, found in mixed.items():
        same = torch.equal(found.weight.codes_OI, uniform[linear].weight.codes_OI)
        assert same == (linear != last), linear


def test_the_first_pattern_that_fits_counts():
    method = method_class("rtn")(grid=FOUR, layers=((DOWN, THREE), ("*", Grid(bits=8))))
    assert method.of("model.layers.3.mlp.down_proj").grid == THREE
    assert method.of("model.layers.3.mlp.up_proj").grid == Grid(bits=8)
    assert method.of("model.layers.3.mlp.up_proj").layers == ()
    plain = method_class("rtn")(grid=FOUR)
    assert plain.of("anything") is plain


def test_bytes_are_those_of_the_grids(model):
    linears = linears_of(model)
    method = method_class("rtn")(grid=FOUR, layers=((DOWN, THREE),))
    by_hand = sum(
        method_class("rtn")(grid=THREE if name.endswith("down_proj") else FOUR).stored_bytes(*shape)
        for name, shape in linears.items()
    )
    found = {linear.name: linear.stored_bytes for linear in quantized_linears(model, method)}
    assert total_stored_bytes(method, linears) == by_hand == sum(found.values())


def quantized_linears(model, method):
    return [linear for block in quantize_blocks(InMemory(model), method, None) for linear in block.linears]


def test_linears_that_share_their_input_must_share_their_grid(model, windows):
    layers = (("*.q_proj", THREE),)
    message = r"q_proj.*k_proj.* share their input and must share their grid"
    with pytest.raises(QuantizationError, match=message):
        check_model(model, method_class("rtn")(grid=FOUR, layers=layers))
    with pytest.raises(QuantizationError, match=message):
        quantized("rtn", model, windows, layers=layers)


def test_a_pattern_that_names_nothing_and_a_group_that_does_not_fit(model):
    linears = linears_of(model)
    with pytest.raises(QuantizationError, match=r"layers: '\*\.down' names no linear; full names are like 'model\.la"):
        check_grids(method_class("rtn")(grid=FOUR, layers=(("*.down", THREE),)), linears)
    odd = Grid(bits=4, group_size=12)
    with pytest.raises(
        QuantizationError, match=r"group_size = 12 does not divide the 80 inputs of model\.layers\.0\.mlp"
    ):
        check_grids(method_class("rtn")(grid=FOUR, layers=((DOWN, odd),)), linears)


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma2"])
def test_groups_are_the_stages_of_the_family(case):
    names = list(linears_of(build(case)))
    groups = [[name.rpartition(".")[2][:-5] for name in group] for group in fused_groups(names)]
    assert groups == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]] * 2


O_PROJ, QKV = "*.self_attn.o_proj", "*.self_attn.[qkv]_proj"
EVERY_METHOD = [
    ("rtn", FOUR, {}),
    ("gptq", FOUR, {}),
    ("gptq", FOUR, {"path": "float"}),
    ("gptq", FOUR, {"fold": 1.0}),
    ("gptaq", FOUR, {}),
    ("awq", FOUR, {"num_ratios": 4}),
    ("smoothquant", Grid(bits=8), {}),
    ("billm", Grid(bits=1), {}),
    ("slim_llm", Grid(bits=2, group_size=16), {}),
]


@pytest.mark.parametrize(("name", "grid", "options"), EVERY_METHOD)
@pytest.mark.parametrize("case", ["llama", "llama without groups"])
def test_linears_that_are_left_alone_compute_what_they_did(windows, name, grid, options, case):
    """In a block that is rescaled around them too; and whatever is left alone, the model is nearer to the float one."""
    model = build(case)
    alone = ((QKV, None), (DOWN, None))
    method = method_class(name)(grid=grid, layers=alone, **options)
    blocks = list(quantize_blocks(InMemory(model), method, windows))
    found = {linear.name for block in blocks for linear in block.linears}
    assert {linear.rpartition(".")[2] for linear in found} == {"o_proj", "gate_proj", "up_proj"}
    linears = linears_of(model)
    left = {linear for linear in linears if method.leaves_alone(linear)}
    assert left == set(linears) - found
    changed = {parameter.removesuffix(".weight") for block in blocks for parameter in block.dense} & left
    assert not changed or name in ("awq", "smoothquant")
    plain = logits(model, windows)
    all_of_them = distance(model, windows, replace(method, layers=()))
    assert 0 < distance(model, windows, method) < all_of_them
    assert torch.equal(logits(model, windows), plain)


@pytest.mark.parametrize("name", ["awq", "smoothquant"])
def test_what_is_rescaled_around_a_linear_that_is_left_alone_changes_nothing(windows, name):
    """With a grid fine enough to be exact, what is left is the rescaling, which preserves the function."""
    model = build("llama without groups")
    fine = Grid(bits=8, group_size=1, scale_dtype="float32")
    method = method_class(name)(grid=fine, layers=((QKV, None), ("*.gate_proj", None), ("*.up_proj", None)))
    assert distance(model, windows, method) < 1e-6 * logits(model, windows).square().mean()


def test_what_is_left_alone_is_no_part_of_bytes_and_fits_any_group(model):
    linears = linears_of(model)
    method = method_class("rtn")(grid=Grid(bits=4, group_size=48), layers=((DOWN, None), (O_PROJ, None)))
    check_grids(method, linears)  # down has 80 inputs, o has 64
    assert total_stored_bytes(method, linears) == sum(one.stored_bytes for one in quantized_linears(model, method))


def test_leaving_alone_is_for_whole_groups_and_not_for_all(model, windows):
    with pytest.raises(QuantizationError, match=r"q_proj.*k_proj.* share their input and must share their grid"):
        check_model(model, method_class("rtn")(grid=FOUR, layers=(("*.q_proj", None),)))
    with pytest.raises(QuantizationError, match=r"q_proj.*k_proj.* share their input and must share their grid"):
        quantized("gptq", model, windows, layers=(("*.q_proj", None),))
    with pytest.raises(QuantizationError, match=r"layers: every linear is left alone, so that nothing is quantized"):
        check_model(model, method_class("rtn")(grid=FOUR, layers=(("*", None),)))


def test_quantized_activations_leave_them_alone_too(windows):
    """W8A8 on one stage alone: the hooks are where the codes are."""
    model = build("llama")
    activations = ActivationGrid(bits=8)
    method = method_class("rtn")(grid=Grid(bits=8), activations=activations, layers=((QKV, None), (DOWN, None)))
    blocks = list(quantize_blocks(InMemory(model), method, windows))
    with installed(model, blocks):
        hooked = {name for name, module in model.named_modules() if module._forward_pre_hooks}
    assert {name.rpartition(".")[2] for name in hooked} == {"o_proj", "gate_proj", "up_proj"}
