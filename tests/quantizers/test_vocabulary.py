"""Embedding and head: rounded like any weight, in parts, and put wherever the model has them."""

import pytest
import torch

from quantizers import vocabulary
from quantizers.apply import StoredBlock, installed
from quantizers.bank import Bank
from quantizers.block_source import InMemory
from quantizers.errors import NumericalError, QuantizationError
from quantizers.gptaq import Gptaq
from quantizers.gptq import Gptq
from quantizers.grid import Grid
from quantizers.rtn import round_to_nearest
from quantizers.stream import quantize_blocks
from quantizers.vocabulary import (
    PackedMatrix,
    check_vocabulary,
    matrices_of,
    quantize_matrix,
    vocabulary_bytes,
)
from tests.quantizers.conftest import MODELS, build, logits

GRIDS = [
    Grid(bits=8),
    Grid(bits=4, group_size=16),
    Grid(bits=3, group_size=32, tail_group=True),
    Grid(bits=4, group_size=16, convention="sq-sym"),
    Grid(bits=1, group_size=16),
]
NAMES = {"embedding": "model.embed_tokens", "head": "lm_head"}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_has_them(case, tied):
    model = build(case, tie_word_embeddings=tied)
    found = matrices_of(model)
    assert {role: one.name for role, one in found.items()} == ({"embedding": NAMES["embedding"]} if tied else NAMES)
    assert {one.shape for one in found.values()} == {(96, 48)}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_rows_are_the_whole_rounded_to_nearest(monkeypatch, grid, dtype):
    weight = torch.randn(50, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[7] = 0
    monkeypatch.setattr(vocabulary, "_ROWS_AT_ONCE", 16)  # the last part is of two rows
    made = quantize_matrix("lm_head", weight, grid)
    expected = round_to_nearest(weight.float(), grid)
    assert torch.equal(made.weight.codes_OI, expected.codes_OI)
    assert torch.equal(made.weight.decode(), expected.decode())
    lost = (weight.float() - expected.decode()).square().sum() / weight.float().square().sum()
    assert made.weight_error == pytest.approx(lost.item(), rel=1e-5)
    matrix = vocabulary.VocabularyMatrix(name="lm_head", shape=(50, 48))
    packed = sum(tensor.nbytes for tensor in made.weight.pack().values())
    assert vocabulary_bytes({"head": grid}, {"head": matrix}) == made.weight.stored_bytes == packed


def test_no_number_is_refused_by_name():
    weight = torch.ones(8, 16)
    weight[5, 3] = float("nan")
    with pytest.raises(NumericalError, match=r"^model\.embed_tokens\.weight holds NaN or infinity$"):
        quantize_matrix("model.embed_tokens", weight, Grid(bits=4))


def test_what_the_model_lacks_and_what_does_not_fit_is_refused():
    tied, untied = (matrices_of(build("llama", tie_word_embeddings=tie)) for tie in (True, False))
    check_vocabulary({"embedding": Grid(bits=4, group_size=16), "head": Grid(bits=8)}, untied)
    with pytest.raises(QuantizationError, match=r"the head of tiny is its embedding \(tied weights\); give embedding"):
        check_vocabulary({"head": Grid(bits=8)}, tied, of=" of tiny")
    with pytest.raises(QuantizationError, match=r"group_size = 32 does not divide the 48 inputs of lm_head of tiny"):
        check_vocabulary({"head": Grid(bits=8, group_size=32)}, untied, of=" of tiny")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_put_in_and_restored(windows, tied, dtype):
    model = build("llama", tie_word_embeddings=tied).to(dtype)
    expected = build("llama", tie_word_embeddings=tied).to(dtype)
    found, grid = matrices_of(model), Grid(bits=3)
    made = [quantize_matrix(one.name, model.get_submodule(one.name).weight, grid) for one in found.values()]
    with torch.no_grad():
        for one in made:
            expected.get_submodule(one.name).weight.copy_(one.weight.decode())
    before = dict(model.named_parameters())
    plain = logits(model, windows)
    with installed(model, [StoredBlock(linears=[], vocabulary=made)]):
        assert torch.equal(logits(model, windows), logits(expected, windows))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(logits(model, windows), plain)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not torch.equal(logits(expected, windows), plain)


@pytest.mark.parametrize("tied", [True, False])
def test_a_bank_has_them_too(windows, tied):
    model = build("llama", tie_word_embeddings=tied)
    plain = logits(model, windows)
    variants = {
        one.name: {
            bits: PackedMatrix(one.name, model.get_submodule(one.name).weight, Grid(bits=bits)) for bits in (2, 8)
        }
        for one in matrices_of(model).values()
    }
    bank = Bank(model, variants)
    assert bank.apply(dict.fromkeys(variants, 2)) == list(variants)
    expected = build("llama", tie_word_embeddings=tied)
    made = [quantize_matrix(name, expected.get_submodule(name).weight, Grid(bits=2)) for name in variants]
    with installed(expected, [StoredBlock(linears=[], vocabulary=made)]):
        assert torch.equal(logits(model, windows), logits(expected, windows))
    bank.apply({})
    assert torch.equal(logits(model, windows), plain)


def test_a_matrix_is_rounded_once_and_never_by_what_stands_in_its_place(monkeypatch):
    """The float weight is what is rounded, also where another variant is in the model by then."""
    model = build("llama")
    name = NAMES["embedding"]
    rounded = []
    monkeypatch.setattr(
        vocabulary, "quantize_matrix", lambda *given: rounded.append(given[2].bits) or quantize_matrix(*given)
    )
    weight = model.get_submodule(name).weight.detach().clone()
    variants = {bits: PackedMatrix(name, model.get_submodule(name).weight, Grid(bits=bits)) for bits in (1, 4)}
    bank = Bank(model, {name: variants})
    for bits in (1, 4, 1, 4):
        bank.apply({name: bits})
        assert torch.equal(
            model.get_submodule(name).weight, quantize_matrix(name, weight, Grid(bits=bits)).weight.decode()
        )
    assert rounded == [1, 4]


def test_another_shape_is_refused_and_undone(windows):
    model = build("llama")
    plain = logits(model, windows)
    made = quantize_matrix(NAMES["embedding"], torch.ones(4, 48), Grid(bits=4))
    with (
        pytest.raises(ValueError, match=r"embed_tokens: artifact of shape \(4, 48\), model has \(96, 48\)"),
        installed(model, [StoredBlock(linears=[], vocabulary=[made])]),
    ):
        pytest.fail("entered")
    assert torch.equal(logits(model, windows), plain)


def quantized(model, method, windows, embedding=None):
    blocks = quantize_blocks(InMemory(model), method, windows, embedding=embedding)
    return {linear.name: linear.weight.decode() for block in blocks for linear in block.linears}


@pytest.mark.parametrize("tied", [True, False])
def test_blocks_see_what_a_quantized_embedding_puts_out(windows, tied):
    """As if the model had it; its own is what comes back."""
    model, other = (build("llama", tie_word_embeddings=tied) for _ in range(2))
    made = quantize_matrix(NAMES["embedding"], model.get_submodule(NAMES["embedding"]).weight, Grid(bits=2))
    with torch.no_grad():
        other.get_submodule(NAMES["embedding"]).weight.copy_(made.weight.decode())
    plain = logits(model, windows)
    method = Gptq(grid=Grid(bits=3, group_size=16))
    found, expected = quantized(model, method, windows, made), quantized(other, method, windows)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert any(not torch.equal(found[name], weight) for name, weight in quantized(model, method, windows).items())
    assert torch.equal(logits(model, windows), plain)


def test_the_float_path_and_the_float_side_of_a_drift_keep_the_float_embedding(windows):
    model = build("llama")
    made = quantize_matrix(NAMES["embedding"], model.get_submodule(NAMES["embedding"]).weight, Grid(bits=2))
    method = Gptq(grid=Grid(bits=3, group_size=16), path="float")
    found, expected = quantized(model, method, windows, made), quantized(model, method, windows)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    # GPTAQ's correction is of what the quantized model has drifted: none before the first block, but for an embedding.
    first = "model.layers.0.self_attn.q_proj"
    for embedding, same in ((None, True), (made, False)):
        corrected, plain = (
            quantized(model, Gptaq(grid=Grid(bits=3, group_size=16), alpha=alpha), windows, embedding)[first]
            for alpha in (0.25, 0.0)
        )
        assert torch.equal(corrected, plain) == same
