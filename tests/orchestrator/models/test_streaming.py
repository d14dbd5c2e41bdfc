"""A checkpoint handed out block by block gives what the whole model in memory gives."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import BitatlasError
from orchestrator.models.loading import load_model
from orchestrator.models.streaming import StreamedModel
from quantizers.block_source import InMemory
from quantizers.gptaq import Gptaq
from quantizers.grid import Grid
from quantizers.stream import quantize_blocks


@pytest.fixture
def windows():
    return torch.randint(0, 256, (3, 32), generator=torch.Generator().manual_seed(0))


def test_the_same_artifact_as_from_memory(tiny_checkpoint, windows):
    method = Gptaq(grid=Grid(bits=3, group_size=16))
    streamed = list(quantize_blocks(StreamedModel(tiny_checkpoint, "auto", "cpu"), method, windows))
    in_memory = list(quantize_blocks(InMemory(load_model(tiny_checkpoint)), method, windows))
    for one, other in zip(streamed, in_memory, strict=True):
        for left, right in zip(one.linears, other.linears, strict=True):
            assert left.name == right.name
            assert torch.equal(left.weight.decode(), right.weight.decode())
            assert left.output_error == right.output_error


def test_only_what_was_asked_for_has_memory(tiny_checkpoint):
    source = StreamedModel(tiny_checkpoint, "auto", "cpu")
    block = source.block(1)
    expected = load_model(tiny_checkpoint).model.layers[1]
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))
        assert not parameter.requires_grad
    assert all(parameter.is_meta for parameter in source._skeleton.parameters())
    with source.shell() as shell:
        assert not shell.model.embed_tokens.weight.is_meta
        assert all(parameter.is_meta for parameter in shell.model.layers.parameters())


def test_a_dtype_can_be_asked_for(tiny_checkpoint):
    block = StreamedModel(tiny_checkpoint, "float16", "cpu").block(0)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float16}


def test_the_matrices_over_the_vocabulary(tiny_checkpoint, make_checkpoint, tmp_path):
    untied = make_checkpoint(tmp_path / "model", tie_word_embeddings=False)
    for directory, roles in ((tiny_checkpoint, ["embedding"]), (untied, ["embedding", "head"])):
        model, source = load_model(directory), StreamedModel(directory, "auto", "cpu")
        for role in roles:
            name, weight = source.vocabulary_matrix(role)
            assert torch.equal(weight, model.get_parameter(f"{name}.weight"))
            assert weight.dtype == torch.bfloat16
    assert StreamedModel(untied, "float32", "cpu").vocabulary_matrix("head")[1].dtype == torch.float32


def test_what_is_missing_or_misshapen_is_refused_by_name(make_checkpoint, tmp_path):
    directory = make_checkpoint(tmp_path / "model")
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(BitatlasError, match=rf"the checkpoint lacks {name}"):
        StreamedModel(directory, "auto", "cpu").block(1)
    save_file(tensors | {name: tensors[name][:-1].clone()}, file)
    with pytest.raises(BitatlasError, match=r"size mismatch for mlp\.up_proj\.weight"):
        StreamedModel(directory, "auto", "cpu").block(1)
