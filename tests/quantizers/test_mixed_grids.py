"""Linears with grids of their own: what each gets is what it would get in a uniform cell."""

import pytest
import torch

from quantizers.block_source import InMemory
from quantizers.errors import QuantizationError
from quantizers.families import fused_groups
from quantizers.grid import Grid
from quantizers.method import check_grids, total_stored_bytes
from quantizers.methods import method_class
from quantizers.stream import check_model, linears_of, quantize_blocks
from tests.quantizers.conftest import build

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
