"""What is audited: each case runs a part of the product on a tiny model that is on the stand-in for an NPU."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluators.decoding import Decoding
from evaluators.divergence import Comparison, Recorder
from evaluators.forensics import examine
from evaluators.gate import bos_warning
from evaluators.generation import Generator
from evaluators.head import split
from evaluators.pack_size import _probe as run_pack
from evaluators.pack_size import measured_pack_tokens
from evaluators.perplexity import perplexity, window_tokens
from evaluators.scorer import Scorer
from orchestrator.artifacts import ArtifactWriter
from orchestrator.making import quantize_into
from orchestrator.models.streaming import StreamedModel
from orchestrator.scheme import parse_scheme
from orchestrator.shared_statistics import shared_statistics
from quantizers.apply import installed
from quantizers.float_statistics import collect_float_statistics
from quantizers.stream import needs_shared, shares_hessians
from tests.audit.npu_stand_in import DEVICE, Record, StandIn

VOCABULARY = 120
WINDOWS = np.random.default_rng(0).integers(0, VOCABULARY, size=(3, 24))
CONTEXTS = [(5, 6, 7, 8, 9, 10, 11), (5, 6, 7, 8, 9, 10, 11, 40, 41), (90,), (5, 6, 7)]
DTYPE = torch.bfloat16

# Llama with these biases is openPangu-Embedded's architecture; the others bend attention in their own ways.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 6, "attn_logit_softcapping": 3.0},
    "Gemma3Text": {"sliding_window": 6},
}

_PUBLISHED = {"preset": "as_published"}
_FEW_STEPS = {"search_steps": 4, "block_size": 32}
SCHEMES: dict[str, dict[str, Any]] = {
    "rtn 4 bits": {"method": "rtn", "weight_bits": 4, "group_size": 16},
    "rtn 1 bit": {"method": "rtn", "weight_bits": 1, "group_size": 16},
    "rtn mse": {"method": "rtn", "weight_bits": 3, "group_size": "per_channel", "mse_search": True},
    "rtn tail group": {
        "method": "rtn",
        "weight_bits": 2,
        "group_size": 24,
        "tail_group": True,
        "convention": "awq-asym",
    },
    "rtn float32 scales": {"method": "rtn", "weight_bits": 8, "group_size": 16, "scale_dtype": "float32"},
    "rtn with folded errors": {"method": "rtn", "weight_bits": 3, "group_size": 16, "options": {"fold": 0.5}},
    "gptq": {"method": "gptq", "weight_bits": 4, "group_size": 16},
    "gptq as published": {"method": "gptq", "weight_bits": 3, "group_size": 16, "options": _PUBLISHED},
    "gptq dynamic groups": {"method": "gptq", "weight_bits": 4, "group_size": 16, "options": {"static_groups": False}},
    "gptq without order": {"method": "gptq", "weight_bits": 4, "group_size": 16, "options": {"act_order": False}},
    "gptq symmetric mse": {
        "method": "gptq",
        "weight_bits": 2,
        "group_size": "per_channel",
        "convention": "gptq-sym",
        "mse_search": True,
    },
    "gptq float path": {"method": "gptq", "weight_bits": 4, "group_size": 16, "options": {"path": "float"}},
    "gptq with folded errors": {"method": "gptq", "weight_bits": 3, "group_size": 16, "options": {"fold": 0.5}},
    "gptq factorized on the device": {
        "method": "gptq",
        "weight_bits": 4,
        "group_size": 16,
        "options": {"factorization": "device"},
    },
    "gptq mixed bits": {"method": "gptq", "weight_bits": 4, "group_size": 16, "layers": {"*.down_proj": 3}},
    "gptq with embedding and head": {
        "method": "gptq",
        "weight_bits": 4,
        "group_size": 16,
        "embedding": 8,
        "head": {"weight_bits": 1, "group_size": 32},
    },
    "awq beside linears left alone": {
        "method": "awq",
        "weight_bits": 4,
        "group_size": 16,
        "layers": {"*.up_proj": 16, "*.gate_proj": 16},
        "options": {"num_ratios": 4},
    },
    "gptq W4A4": {"method": "gptq", "weight_bits": 4, "activation_bits": 4, "group_size": 16},
    "awq": {"method": "awq", "weight_bits": 4, "group_size": 16, "options": {"num_ratios": 4}},
    "awq both scales": {
        "method": "awq",
        "weight_bits": 3,
        "group_size": 16,
        "options": {"num_ratios": 4, "duo_scaling": True},
    },
    "awq as published": {
        "method": "awq",
        "weight_bits": 4,
        "group_size": 16,
        "options": {**_PUBLISHED, "num_ratios": 4},
    },
    "smoothquant W8A8": {"method": "smoothquant", "weight_bits": 8, "activation_bits": 8},
    "smoothquant static": {
        "method": "smoothquant",
        "weight_bits": 8,
        "activation_bits": 8,
        "activation_granularity": "per_tensor",
        "activation_symmetric": False,
    },
    "smoothquant as published": {
        "method": "smoothquant",
        "weight_bits": 4,
        "activation_bits": 4,
        "options": _PUBLISHED,
    },
    "gptaq": {"method": "gptaq", "weight_bits": 3, "group_size": 16},
    "gptaq as published": {"method": "gptaq", "weight_bits": 3, "group_size": 16, "options": _PUBLISHED},
    "billm": {"method": "billm", "weight_bits": 1, "options": {"block_size": 32, "max_salient": 4}},
    "billm as published": {
        "method": "billm",
        "weight_bits": 1,
        "options": {**_PUBLISHED, "block_size": 32, "max_salient": 4},
    },
    "slim_llm": {"method": "slim_llm", "weight_bits": 2, "group_size": 16, "options": _FEW_STEPS},
    "slim_llm as published": {
        "method": "slim_llm",
        "weight_bits": 2,
        "group_size": 16,
        "options": {**_PUBLISHED, **_FEW_STEPS},
    },
}


class Letters:
    """A tokenizer of one character per id."""

    bos_token_id, eos_token_id = 1, 2

    def decode(self, ids, **_):
        return "".join(chr(0x4E00 + int(token)) for token in ids)

    def encode(self, text, **_):
        return [ord(letter) - 0x4E00 for letter in text]

    def __call__(self, text, **_):
        return {"input_ids": self.encode(text)}


def model_of(family: str) -> Any:
    """A tiny random model on the host, in bfloat16."""
    import transformers

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    config = getattr(transformers, f"{family}Config")(**shape | FAMILIES[family])
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)
    return model.eval().requires_grad_(False).to(DTYPE)


@cache
def checkpoint_of(family: str) -> Path:
    """The directory of a model's checkpoint, which is removed when the process ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    model_of(family).save_pretrained(folder)
    return Path(folder)


def quantized(family: str, scheme: str) -> Record:
    """Quantize as a worker does, from a checkpoint to an artifact, and evaluate what the artifact holds."""
    parsed = parse_scheme(SCHEMES[scheme], scheme)
    method = parsed.build()
    tokens = torch.from_numpy(WINDOWS)
    checkpoint = checkpoint_of(family)
    with tempfile.TemporaryDirectory() as scratch, StandIn() as npu:
        source = StreamedModel(checkpoint, "bfloat16", str(DEVICE))
        shared = None
        if needs_shared(method):
            hessians = shares_hessians(method)
            collect = partial(collect_float_statistics, source, tokens, hessians=hessians)
            shared = shared_statistics(Path(scratch) / "statistics", collect, source.device)
        writer = ArtifactWriter(Path(scratch) / "artifact")
        quantize_into(writer, source, parsed, tokens, shared=shared)
        artifact = writer.finish()
        model = model_of(family).to(DEVICE)
        with installed(model, artifact.blocks()):
            perplexity(model, WINDOWS)
    return npu.record


def _divergence(model: Any) -> None:
    found: dict[int, Any] = {}
    perplexity(model, WINDOWS, observe=Recorder(window_tokens(WINDOWS), found.__setitem__, k=16))
    comparison = Comparison(window_tokens(WINDOWS), found.__getitem__)
    perplexity(model, WINDOWS, observe=comparison)
    assert comparison.result().window_kls


def _scores(model: Any, **options: Any) -> None:
    scorer = Scorer(model, Letters(), pack_tokens=64, **options)
    requests = [(("a", "b"), list(context), [3, 4, 5][: 1 + index % 3]) for index, context in enumerate(CONTEXTS)]
    assert len(scorer._loglikelihood_tokens(requests)) == len(CONTEXTS)


def _texts(model: Any, **options: Any) -> None:
    decoding = Decoding(max_new_tokens=5, **options)
    assert len(Generator(split(model), Letters(), {1}).generate(CONTEXTS, decoding, pack_tokens=64)) == len(CONTEXTS)


def _forensics(model: Any) -> None:
    model.get_parameter("model.layers.1.mlp.down_proj.weight").view(-1)[5] = torch.inf
    result = perplexity(model, WINDOWS)
    assert not np.isfinite(result.perplexity)
    examined = examine(model, WINDOWS, window_nlls=result.window_nlls)
    assert not any(run.error for run in examined.runs.values())


class _Meter:
    """Of the memory of a device."""

    def reset_peak_memory_stats(self):
        pass

    def max_memory_allocated(self):
        return 1 << 30

    def memory_allocated(self):
        return 1 << 20

    def mem_get_info(self):
        return 1 << 34, 1 << 35


def _packs(model: Any) -> None:
    measured_pack_tokens(lambda tokens: run_pack(split(model), 64), _Meter(), 1 << 20)


EVALUATIONS: dict[str, Callable[[Any], None]] = {
    "perplexity and divergence": _divergence,
    "scores by token trees": _scores,
    "scores as HFLM": partial(_scores, as_hflm=True),
    "texts": _texts,
    "drawn texts": partial(_texts, temperature=1.0, top_k=5, top_p=0.9, seed=1),
    "forensics": _forensics,
    "size of packs": _packs,
    "missing BOS": lambda model: bos_warning(model, Letters(), WINDOWS),
}


def evaluated(family: str, evaluation: str) -> Record:
    """Evaluate an unquantized model."""
    model = model_of(family)
    with StandIn() as npu:
        EVALUATIONS[evaluation](model.to(DEVICE))
    return npu.record
