"""A checkpoint becomes a model: whole, memory-mapped, and never by code from the checkpoint."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import BitatlasError
from orchestrator.models.loading import load_model, load_tokenizer, model_shape
from quantizers.errors import QuantizationError


@pytest.fixture(scope="module")
def originals(tmp_path_factory, make_checkpoint):
    """The same random weights tied, untied and sharded."""
    base = tmp_path_factory.mktemp("models")
    return {
        "tied": make_checkpoint(base / "tied"),
        "untied": make_checkpoint(base / "untied", tie_word_embeddings=False),
        "sharded": make_checkpoint(base / "sharded", shard_size="50KB"),
    }


@pytest.fixture
def checkpoint(originals, tmp_path):
    return shutil.copytree(originals["tied"], tmp_path / "model")


def configure(directory, **changes):
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def reference(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


@pytest.mark.parametrize("kind", ["tied", "untied", "sharded"])
def test_weights_and_logits_are_those_of_transformers(originals, kind):
    model, expected = load_model(originals[kind]), reference(originals[kind])
    state = expected.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    tokens = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_a_tied_head_is_the_embedding(originals):
    for kind in ("tied", "untied"):
        model = load_model(originals[kind])
        same = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert same == (kind == "tied")


def test_shards_equal_the_whole(originals):
    whole, sharded = (load_model(originals[kind]).state_dict() for kind in ("tied", "sharded"))
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in whole.items())


def test_weights_are_mapped_and_writes_stay_private(checkpoint):
    file = checkpoint / "model.safetensors"
    before = file.read_bytes()
    model, other = load_model(checkpoint), load_model(checkpoint)
    weight = model.model.layers[1].mlp.down_proj.weight
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(file.resolve()))
    ]
    assert any(weight.data_ptr() in pages for pages in mapped)
    original = weight.clone()
    weight.zero_()
    assert file.read_bytes() == before
    assert torch.equal(other.model.layers[1].mlp.down_proj.weight, original)
    assert torch.equal(load_model(checkpoint).model.layers[1].mlp.down_proj.weight, original)


def test_another_dtype_on_request(originals):
    model = load_model(originals["tied"], "float32")
    assert model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, load_model(originals["tied"]).lm_head.weight.float())
    assert load_model(originals["tied"], "float16").dtype == torch.float16


def test_stale_buffers_are_dropped(checkpoint):
    expected = load_model(checkpoint).model.rotary_emb.inv_freq.clone()
    change_tensors(
        checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    )
    assert torch.equal(load_model(checkpoint).model.rotary_emb.inv_freq, expected)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(NORM), f"the checkpoint lacks {NORM}"),
        (lambda tensors: [tensors.pop(NORM), tensors.pop("model.norm.weight")], f"lacks {NORM} and 1 more"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "the checkpoint has the unknown tensor extra"),
        (lambda tensors: tensors.update({NORM: torch.zeros(3)}), f"size mismatch for {NORM}"),
        (lambda tensors: tensors.pop("model.embed_tokens.weight"), "lacks model.embed_tokens.weight"),
    ],
)
def test_tensors_that_do_not_fit(checkpoint, change, words):
    change_tensors(checkpoint, change)
    with pytest.raises(BitatlasError, match=re.escape(words)) as caught:
        load_model(checkpoint, where="study.yaml: models[0].source")
    assert str(caught.value).startswith(f"study.yaml: models[0].source = '{checkpoint}': ")


def test_an_untied_head_may_not_be_left_out(checkpoint):
    configure(checkpoint, tie_word_embeddings=False)
    with pytest.raises(BitatlasError, match=r"lacks lm_head.weight"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "no-such"}, "model type `no-such` but Transformers does not recognize"),
        ({"model_type": "clip"}, "Unrecognized configuration class"),
        ({"hidden_size": "abc"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_size": 65}, "The hidden size (65) is not a multiple of the number of attention heads (4)"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "no-such"}, "KeyError: 'no-such'"),
        ({"dtype": "no-such"}, "has no attribute 'no-such'"),
        ({"dtype": "float8_e4m3fn"}, "Float8_e4m3fn"),
    ],
)
def test_a_configuration_that_cannot_be_built(checkpoint, changes, words):
    configure(checkpoint, **changes)
    for build in (load_model, lambda directory: model_shape(directory, "auto", "model")):
        with pytest.raises(BitatlasError, match=re.escape(words)) as caught:
            build(checkpoint)
        assert str(caught.value).startswith(f"model = '{checkpoint}': this architecture cannot be built (")
        assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_is_never_run(checkpoint):
    ran = checkpoint / "ran"
    (checkpoint / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Model", None]}
    configure(checkpoint, auto_map=code)
    load_model(checkpoint)  # a known model_type: transformers' own class
    configure(checkpoint, model_type="evil")
    with pytest.raises(BitatlasError, match="cannot be built"):
        load_model(checkpoint)
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"auto_map": code}))
    with pytest.raises(BitatlasError, match="no usable tokenizer"):
        load_tokenizer(checkpoint)
    assert not ran.exists()


def test_the_shape_needs_no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    shape = model_shape(checkpoint, "auto", "model")
    assert list(shape.linears)[:3] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert len(shape.linears) == 14
    assert shape.linears["model.layers.1.mlp.down_proj"] == (64, 128)
    assert (shape.max_positions, shape.vocabulary, shape.bits_per_value) == (2048, 256, 16)
    per_block = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128 + 2 * 64
    assert shape.fp_bytes == 2 * (2 * per_block + 256 * 64 + 64)


def test_the_shape_s_bytes_are_those_of_the_file(originals):
    for kind in ("tied", "untied"):
        stored = sum(tensor.nbytes for tensor in load_file(originals[kind] / "model.safetensors").values())
        assert model_shape(originals[kind], "auto", "model").fp_bytes == stored
    assert model_shape(originals["tied"], "float32", "model").bits_per_value == 32


def test_an_architecture_without_a_row(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=64, n_positions=32)).save_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match=r"model_type 'gpt2' has no row in quantizers/families.py"):
        model_shape(tmp_path, "auto", "model")


def test_the_tokenizer(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    assert len(tokenizer) == 49152
    assert tokenizer.decode(tokenizer("A house by the sea.")["input_ids"]) == "A house by the sea."


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": "{", "tokenizer_config.json": "{}"},
        {"tokenizer.json": "{}", "tokenizer_config.json": "{}"},
        {"tokenizer_config.json": "{"},
    ],
)
def test_no_usable_tokenizer(checkpoint, files):
    for name, content in files.items():
        (checkpoint / name).write_text(content)
    with pytest.raises(BitatlasError, match="no usable tokenizer") as caught:
        load_tokenizer(checkpoint)
    assert "\n" not in str(caught.value)
