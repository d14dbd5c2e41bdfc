"""openPangu's configuration and weights as published, against its forward spelt out in float64."""

import json

import pytest
import torch
from safetensors.torch import save_file

from orchestrator.errors import BitatlasError
from orchestrator.models.loading import load_model, model_shape
from orchestrator.models.openpangu import llama_config
from orchestrator.models.streaming import StreamedModel
from tests.reference import openpangu as reference

CONFIG = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig"},
    "model_type": "PanguEmbedded",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 16000000.0,
    "bias": True,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 5,
    "pad_token_id": 0,
    "torch_dtype": "float32",
    "transformers_version": "4.53.2",
    "use_cache": True,
}
NEEDED = sorted(set(CONFIG) - {"auto_map", "initializer_range", "transformers_version", "use_cache", "model_type"})


def published(directory, **changes):
    """Write a random checkpoint with the tensors of the released one; returns its config and state."""
    config = CONFIG | changes
    hidden, width, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    few = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        shapes |= {f"{prefix}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, out in (("q", hidden), ("k", few), ("v", few), ("o", hidden)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (out, hidden)
            if config["bias"]:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (out,)
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, width)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (rows, hidden)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator) * 0.3 + (name.endswith("norm.weight"))
        for name, shape in shapes.items()
    }
    stale = {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.full((4,), 7.0) for index in range(2)}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(state)
    save_file({name: state[name] for name in names[::2]} | stale, directory / "model-1.safetensors")
    save_file({name: state[name] for name in names[1::2]}, directory / "model-2.safetensors")
    return config, state


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_the_mapped_model_computes_the_described_forward(tmp_path, tied, bias):
    config, state = published(tmp_path / "pangu", tie_word_embeddings=tied, bias=bias)
    model = load_model(tmp_path / "pangu")
    tokens = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(1))
    expected = reference.logits(config, state, tokens)
    with torch.no_grad():
        found = model.double()(input_ids=tokens).logits
    assert (found - expected).norm() <= 1e-6 * expected.norm()  # rotations are computed in float32


@pytest.mark.parametrize("name", [f"self_attn.{letter}_proj.bias" for letter in "qkvo"])
def test_every_bias_counts(tmp_path, name):
    """Otherwise the comparison above would not see one that is dropped. k's counts only through positions."""
    config, state = published(tmp_path / "pangu")
    tokens = torch.randint(61, (1, 24), generator=torch.Generator().manual_seed(1))
    without = state | {f"model.layers.0.{name}": torch.zeros_like(state[f"model.layers.0.{name}"])}
    change = reference.logits(config, without, tokens) - reference.logits(config, state, tokens)
    assert change.norm() > 1e-3 * reference.logits(config, state, tokens).norm()


def test_it_streams_block_by_block_too(tmp_path):
    _, state = published(tmp_path / "pangu")
    block = StreamedModel(tmp_path / "pangu", "auto", "cpu").block(1)
    for name in ("self_attn.o_proj.bias", "mlp.down_proj.weight"):
        assert torch.equal(block.get_parameter(name), state[f"model.layers.1.{name}"])


def test_planning_sees_its_linears_and_its_context(tmp_path):
    published(tmp_path / "pangu")
    shape = model_shape(tmp_path / "pangu", "auto", "model")
    assert len(shape.linears) == 14
    assert shape.linears["model.layers.1.self_attn.k_proj"] == (16, 48)
    assert (shape.max_positions, shape.vocabulary, shape.bits_per_value) == (64, 61, 32)


@pytest.mark.parametrize("field", NEEDED)
def test_a_missing_field_is_named_and_never_defaulted(field):
    config = {name: value for name, value in CONFIG.items() if name != field}
    with pytest.raises(BitatlasError, match=f"^here: config.json lacks {field}, and openPangu's"):
        llama_config(config, "here")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "config.json has rope_scaling = .*does not know"),
        ({"mlp_bias": True}, "config.json has mlp_bias = True, which the mapping of openPangu to Llama does not know"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act = 'gelu'"),
        ({"hidden_size": "48"}, "config.json: hidden_size = '48'"),
        ({"num_attention_heads": 5}, "num_attention_heads = 5 does not divide hidden_size = 48"),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 4 does not divide num_attention_heads = 6"),
        ({"rms_norm_eps": 0.0}, "config.json: rms_norm_eps = 0.0"),
        ({"rope_theta": None}, "config.json lacks rope_theta"),
    ],
)
def test_what_the_mapping_cannot_honour_is_refused(changes, complaint):
    with pytest.raises(BitatlasError, match=complaint):
        llama_config(CONFIG | changes, "here")


def test_fields_that_change_nothing_may_be_there_or_not():
    plain = {name: CONFIG[name] for name in [*NEEDED, "model_type"]}
    assert llama_config(plain, "here").to_dict() == llama_config(CONFIG | {"rope_scaling": None}, "here").to_dict()


def test_a_newer_writer_s_name_of_the_dtype_is_known():
    config = CONFIG | {"dtype": "bfloat16"}
    del config["torch_dtype"]
    assert llama_config(config, "here").dtype == torch.bfloat16


def test_a_tensor_that_no_class_reads_is_dropped_and_an_unknown_one_refused(tmp_path):
    _, state = published(tmp_path / "pangu")
    save_file(state | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, tmp_path / "pangu/model-1.safetensors")
    with pytest.raises(BitatlasError, match=r"unknown tensor model\.layers\.0\.self_attn\.q_norm\.weight"):
        load_model(tmp_path / "pangu")
