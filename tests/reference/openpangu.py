"""openPangu-Embedded's forward in float64, from its description: no library's model class is used.

Pre-norm decoder blocks, RMS norms, grouped-query attention with rotary positions and a bias on q, k, v and o, an MLP
of silu(gate) * up without biases, a last norm, and a head that is the embedding where they are tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.reference import llama_block


def logits(config: Mapping[str, Any], state: Mapping[str, Tensor], tokens_NT: Tensor) -> Tensor:
    """[windows, tokens, vocabulary], by the fields of the published config.json and the published tensor names."""
    weights = {name: tensor.double() for name, tensor in state.items()}
    epsilon = config["rms_norm_eps"]
    shape = {
        "heads": config["num_attention_heads"],
        "groups": config["num_key_value_heads"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "theta": config["rope_theta"],
    }
    hidden = weights["model.embed_tokens.weight"][tokens_NT]
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."

        def linears(module: str, names: str, bias: bool, prefix: str = prefix) -> llama_block.Linears:
            places = {f"{name}_proj": f"{prefix}{module}.{name}_proj" for name in names.split()}
            return {
                name: (weights[f"{place}.weight"], weights[f"{place}.bias"] if bias else None)
                for name, place in places.items()
            }

        attention = linears("self_attn", "q k v o", config["bias"])
        inputs = llama_block.rms_norm(hidden, weights[f"{prefix}input_layernorm.weight"], epsilon)
        hidden = hidden + llama_block.apply(attention["o_proj"], llama_block.mixed(attention, inputs, **shape))
        mlp = linears("mlp", "gate up down", False)
        inputs = llama_block.rms_norm(hidden, weights[f"{prefix}post_attention_layernorm.weight"], epsilon)
        hidden = hidden + llama_block.apply(mlp["down_proj"], llama_block.gated(mlp, inputs))
    hidden = llama_block.rms_norm(hidden, weights["model.norm.weight"], epsilon)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return torch.as_tensor(hidden @ weights[head].T)
