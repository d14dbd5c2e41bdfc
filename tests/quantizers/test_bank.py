"""A bank's model is the model with the same variants installed, whatever was in it before."""

import pytest
import torch

from quantizers.apply import StoredBlock, installed
from quantizers.bank import Bank
from quantizers.block_source import InMemory
from quantizers.errors import QuantizationError
from quantizers.grid import Grid
from quantizers.rtn import Rtn
from quantizers.stream import linears_of, quantize_blocks
from tests.quantizers.conftest import build

TOKENS = torch.arange(20).reshape(1, 20)


@pytest.fixture(scope="module")
def stored():
    """bits -> linear -> as it is stored."""
    model = build("llama")
    blocks = {bits: list(quantize_blocks(InMemory(model), Rtn(grid=Grid(bits=bits)), None)) for bits in (2, 4, 8)}
    return {
        bits: {linear.name: linear for block in found for linear in block.linears} for bits, found in blocks.items()
    }


@pytest.fixture
def model():
    return build("llama")


@pytest.fixture
def bank(model, stored):
    asked.clear()

    def variant(bits, name):
        def give():
            asked.append((name, bits))
            return stored[bits][name].weight

        return give

    return Bank(model, {name: {bits: variant(bits, name) for bits in stored} for name in linears_of(model)})


asked = []


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


def test_it_is_the_model_with_these_variants_installed(model, bank, stored):
    names = list(linears_of(model))
    choice = {name: (2, 4, 8)[index % 3] for index, name in enumerate(names)}
    bank.apply(dict.fromkeys(names, 8))
    bank.apply(choice)
    block = StoredBlock(linears=[stored[bits][name] for name, bits in choice.items()])
    with installed(build("llama"), [block]) as expected:
        assert torch.equal(logits(model), logits(expected))


def test_only_what_changed_is_decoded(model, bank):
    names = list(linears_of(model))
    assert bank.apply(dict.fromkeys(names, 4)) == names
    asked.clear()
    assert bank.apply(dict.fromkeys(names, 4) | {names[3]: 2, names[8]: 8}) == [names[3], names[8]]
    assert asked == [(names[3], 2), (names[8], 8)]
    assert bank.apply(dict.fromkeys(names, 4) | {names[3]: 2, names[8]: 8}) == []


def test_float_weights_come_back(model, bank):
    before = logits(model)
    names = list(linears_of(model))
    bank.apply(dict.fromkeys(names, 2))
    assert not torch.equal(logits(model), before)
    assert bank.apply({names[0]: None}) == names
    assert torch.equal(logits(model), before)
    assert set(bank.chosen.values()) == {None}


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ({"model.layers.0.mlp.down_proj": 3}, r"no variant 3 of model\.layers\.0\.mlp\.down_proj"),
        (
            {"model.layers.0.mlp.down_proj": 2, "model.layers.9.mlp.up_proj": 2},
            r"no linear model\.layers\.9\.mlp\.up_proj",
        ),
    ],
)
def test_what_it_does_not_have_is_refused_and_changes_nothing(model, bank, choice, complaint):
    before = logits(model)
    with pytest.raises(QuantizationError, match=complaint):
        bank.apply(choice)
    assert torch.equal(logits(model), before)


def test_a_variant_of_another_shape(model, stored):
    name = "model.layers.0.mlp.down_proj"
    bank = Bank(model, {name: {2: lambda: stored[2]["model.layers.0.mlp.up_proj"].weight}})
    with pytest.raises(QuantizationError, match=r"down_proj: a variant of shape \(80, 48\), not \(48, 80\)"):
        bank.apply({name: 2})
