"""Format `dense`: the very weights that were evaluated, as a checkpoint that transformers loads."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from orchestrator.artifacts import ArtifactWriter, find_artifact
from orchestrator.errors import BitatlasError
from orchestrator.export.dense import export_dense, find_cell
from orchestrator.layout import Layout
from orchestrator.models.checkpoint import check_checkpoint, checkpoint_digest
from orchestrator.models.loading import load_model, load_tokenizer
from orchestrator.models.source import node_cache
from orchestrator.scheme import parse_scheme
from quantizers.apply import installed
from quantizers.block_source import InMemory
from quantizers.stream import quantize_blocks

CELL = "tiny.rtn-w3-g32.0a1b2c3d"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def layout(tmp_path_factory, tiny_checkpoint):
    """A sweep's output with one quantized cell."""
    layout = Layout(tmp_path_factory.mktemp("export") / "out")
    write_cell(layout, tiny_checkpoint, CELL)
    return layout


def write_cell(layout, checkpoint, cell):
    scheme = parse_scheme({"method": "rtn", "weight_bits": 3, "group_size": 32}, "x")
    writer = ArtifactWriter(layout.artifact("0" * 64))
    for block in quantize_blocks(InMemory(load_model(checkpoint)), scheme.build(), None):
        writer.add_block(block)
    writer.finish(
        cell=cell,
        model={
            "source": str(checkpoint),
            "dtype": "auto",
            "digest": checkpoint_digest(checkpoint, node_cache()),
        },
        scheme=scheme.as_entry(),
        code_version="rtn/1",
        seconds=1.0,
    )


@pytest.fixture(scope="module")
def exported(layout, tmp_path_factory):
    to = tmp_path_factory.mktemp("to") / "deep" / "checkpoint"
    size = export_dense(layout, CELL, to)
    assert size == sum(file.stat().st_size for file in to.glob("*.safetensors"))
    return to


def test_the_exported_weights_are_the_evaluated_ones(layout, exported, tiny_checkpoint):
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(30).reshape(1, 30)
    model = load_model(tiny_checkpoint)
    float_weight = model.model.layers[0].mlp.up_proj.weight
    reloaded = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    with installed(model, find_artifact(layout.artifact("0" * 64)).blocks()), torch.inference_mode():
        state = reloaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        assert torch.equal(model(tokens).logits, reloaded(tokens).logits)
        assert not torch.equal(float_weight, state["model.layers.0.mlp.up_proj.weight"])
    assert reloaded.dtype == torch.bfloat16


def test_openpangu_becomes_a_llama_with_all_its_biases(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    original = shutil.copytree(Path(__file__).parents[2] / "assets" / "openpangu-tiny", tmp_path / "model")
    (original / "LICENSE").write_text("the licence")
    to = tmp_path / "to"
    write_cell(Layout(tmp_path / "out"), original, "openpangu.rtn-w3-g32.0a1b2c3d")
    export_dense(Layout(tmp_path / "out"), "openpangu.rtn-w3-g32.0a1b2c3d", to)
    assert AutoConfig.from_pretrained(to, trust_remote_code=False).attention_bias is True
    reloaded, before = AutoModelForCausalLM.from_pretrained(to, dtype="auto"), load_model(original)
    for name in ("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"):
        bias = reloaded.get_parameter(f"model.layers.3.self_attn.{name}")
        assert torch.equal(bias, before.get_parameter(f"model.layers.3.self_attn.{name}"))
        assert bias.abs().max() > 0
    assert (to / "LICENSE").read_text() == "the licence"
    assert "Powered by openPangu" in (to / "NOTICE").read_text()
    assert load_tokenizer(to)("x")["input_ids"] == load_tokenizer(original)("x")["input_ids"]


def test_the_exported_checkpoint_is_one_of_ours_too(exported, tiny_checkpoint, tmp_path):
    check_checkpoint(exported, "x")
    assert checkpoint_digest(exported, tmp_path) != checkpoint_digest(tiny_checkpoint, tmp_path)
    text = "The same words."
    assert load_tokenizer(exported)(text)["input_ids"] == load_tokenizer(tiny_checkpoint)(text)["input_ids"]


def test_it_says_where_it_comes_from(exported):
    facts = json.loads((exported / "bitatlas.json").read_text())
    assert facts["cell"] == CELL
    assert facts["scheme"]["weight_bits"] == 3
    assert facts["code_version"] == "rtn/1"


def test_an_existing_target_is_refused_and_left_alone(layout, tmp_path):
    (tmp_path / "file").write_text("mine")
    for to in (tmp_path, tmp_path / "file"):
        with pytest.raises(BitatlasError, match=re.escape(f"--to {to} exists; give a directory that does not")):
            export_dense(layout, CELL, to)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("cell", ["tiny.fp", "tiny.rtn-w3-g32", ""])
def test_an_unknown_cell_is_refused_with_those_that_there_are(layout, tmp_path, cell):
    with pytest.raises(BitatlasError, match=re.escape(f"has no quantized cell {cell!r}; its cells: {CELL}")):
        export_dense(layout, cell, tmp_path / "to")
    assert not list(tmp_path.iterdir())


def test_a_directory_without_artifacts(tmp_path):
    with pytest.raises(BitatlasError, match=re.escape("its cells: none")):
        find_cell(Layout(tmp_path), CELL)


def test_unfinished_artifacts_are_no_cells(layout):
    scratch = ArtifactWriter(layout.artifact("1" * 64))
    try:
        assert find_cell(layout, CELL).manifest["cell"] == CELL
    finally:
        scratch.discard()


def test_a_model_that_is_gone(layout, tmp_path):
    artifact = find_artifact(layout.artifact("0" * 64))
    other = Layout(tmp_path / "out")
    place = other.artifact("2" * 64)
    place.mkdir(parents=True)
    manifest = artifact.manifest | {"model": {"source": "/gone/model", "dtype": "auto", "digest": "d"}}
    (place / "artifact.json").write_text(json.dumps(manifest))
    with pytest.raises(BitatlasError, match=rf"the model of {CELL} = '/gone/model' does not exist"):
        export_dense(other, CELL, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_model_that_is_not_the_quantized_one_any_more(layout, tmp_path):
    artifact = find_artifact(layout.artifact("0" * 64))
    other = Layout(tmp_path / "out")
    place = other.artifact("3" * 64)
    place.mkdir(parents=True)
    manifest = artifact.manifest | {"model": artifact.manifest["model"] | {"digest": "another"}}
    (place / "artifact.json").write_text(json.dumps(manifest))
    with pytest.raises(BitatlasError, match=r"is not the one that was planned: this node holds other weights"):
        export_dense(other, CELL, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_changed_artifact_is_not_exported(layout, tmp_path, tiny_checkpoint):
    artifact = find_artifact(layout.artifact("0" * 64))
    other = Layout(tmp_path / "out")
    place = other.artifact("0" * 64)
    place.mkdir(parents=True)
    for file in artifact.directory.iterdir():
        content = bytearray(file.read_bytes())
        if file.name == "block-0001.safetensors":
            content[-1] ^= 1
        (place / file.name).write_bytes(content)
    with pytest.raises(BitatlasError, match="was changed after it was written"):
        export_dense(other, CELL, tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command(layout, tmp_path, monkeypatch):
    from orchestrator import commands

    stream = io.StringIO()
    monkeypatch.setattr(commands, "Console", lambda: Console(file=stream, width=200))
    assert commands.export_command(layout.root, CELL, "dense", tmp_path / "to") == 0
    assert stream.getvalue().startswith(f"wrote {tmp_path / 'to'} (")
