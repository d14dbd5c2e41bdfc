"""The configurations of published models that studies are planned for before their weights are there.

Facts, by the last part of their name on the Hub; a checkpoint's own config.json is what counts when it is there.
Sources: config.json of openPangu-Embedded-7B V1.1. Of the 1B no config.json was at hand: its values are from its model
card, its tensors' names in a converted file (26 blocks, no head of its own), and the vendor's training script, which
alone names rope_theta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OPENPANGU = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "model_type": "PanguEmbedded",
    "vocab_size": 153376,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 45892,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
_1B = _OPENPANGU | {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 26,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "rope_theta": 4000000.0,
    "tie_word_embeddings": True,
}
_7B = _OPENPANGU | {
    "hidden_size": 4096,
    "intermediate_size": 12800,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 16000000.0,
    "tie_word_embeddings": False,
}

PUBLISHED: dict[str, Mapping[str, Any]] = {
    "openPangu-Embedded-1B": _1B,
    "openPangu-Embedded-1B-V1.1": _1B,
    "openPangu-Embedded-7B": _7B,
    "openPangu-Embedded-7B-V1.1": _7B,
}
