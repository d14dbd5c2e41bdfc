"""Where the blocks, norms and linears live in each model family. Data: a new family of this kind is a new row.

Every family here computes, per decoder block,
    x = x + after_attention(o(attention(q(h), k(h), v(h)))),  h = attention_norm(x)
    x = x + after_mlp(down(act(gate(h)) * up(h))),            h = mlp_norm(x)
where `after_*` is a norm in some families and nothing in the others.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantizers.errors import QuantizationError


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names inside one decoder block; dotted where nested."""

    blocks: str = "model.layers"
    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    attention_inputs: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_output: str = "self_attn.o_proj"
    after_attention: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output: str = "mlp.down_proj"
    after_mlp: str | None = None
    norm_offset: float = 0.0  # norms multiply by weight + norm_offset

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The linears of a block in the order data reaches them; those of one stage share their input."""
        return (self.attention_inputs, (self.attention_output,), self.mlp_inputs, (self.mlp_output,))


_SANDWICH = Family(
    after_attention="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    norm_offset=1.0,
)

# By `model_type` of the transformers configuration.
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(norm_offset=1.0),
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
}


def family_of(model: nn.Module) -> Family:
    """The row of a transformers model, by its `config.model_type`.

    Raises:
        QuantizationError: no row; names the nearest.
    """
    config: Any = model.config
    model_type = str(config.model_type)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, 1)
    hint = f" (nearest: {near[0]})" if near else ""
    raise QuantizationError(
        f"model_type {model_type!r} has no row in quantizers/families.py{hint}; "
        f"known: {', '.join(sorted(FAMILIES))}. A decoder with the same block structure needs one row there"
    )


def linear_at(module: nn.Module, name: str) -> nn.Linear:
    """The linear at a dotted name.

    Raises:
        QuantizationError: something else is there.
    """
    linear = module.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise QuantizationError(f"{name} is a {type(linear).__name__}, not a Linear")
    return linear


def holders(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that hold the weight of the one of this name: more than one where it is tied.

    Raises:
        QuantizationError: neither a linear nor an embedding.
    """
    named = model.get_submodule(name)
    if not isinstance(named, (nn.Linear, nn.Embedding)):
        raise QuantizationError(f"{name} is a {type(named).__name__}, neither a Linear nor an Embedding")
    return [module for module in model.modules() if getattr(module, "weight", None) is named.weight]


def blocks_of(model: nn.Module, family: Family) -> nn.ModuleList:
    """The decoder blocks of a model, in order.

    Raises:
        QuantizationError: no list of blocks is there.
    """
    blocks = model.get_submodule(family.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise QuantizationError(f"{family.blocks} is a {type(blocks).__name__}, not a list of decoder blocks")
    return blocks


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """Linears that share their input, in order: q, k and v; o; gate and up; down of each block.

    Args:
        names: full names of a model's linears, in order.
    """
    followers = tuple(f".{name}" for family in FAMILIES.values() for stage in family.stages for name in stage[1:])
    groups: list[list[str]] = []
    for name in names:
        if groups and name.endswith(followers):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups
