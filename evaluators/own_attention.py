"""Attention of our own inside a transformers model, by transformers' attention interface.

Shape letters: Q queries, K keys; tensors of attention are [batch, heads, tokens, head width].
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAME = "bitatlas"

# What transformers hands to every attention function, and what changes nothing here.
_IGNORED = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states"})


@dataclass(frozen=True)
class Bends:
    """How a layer's attention differs from the plain one.

    Attributes:
        scaling: of the logits; None is one over the root of the head width.
        window: a token sees the last `window` tokens, itself included; None: all.
        softcap: logits are softcap * tanh(logits / softcap); None leaves them alone.
    """

    scaling: float | None
    window: int | None
    softcap: float | None


class Mixer(Protocol):
    """What does the attention of one forward pass."""

    def mix(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bends: Bends
    ) -> torch.Tensor:
        """Mixed values, of the shape of `query` with the width of `value`."""


@contextmanager
def attention_by(decoder: Any, mixer: Mixer) -> Iterator[Callable[..., torch.Tensor]]:
    """A decoder whose attention is `mixer`'s, as a function of its keyword arguments to hidden states.

    Running it raises a TypeError if the model's attention needs something that is not known here.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    try:
        yield lambda **inputs: decoder(**inputs, use_cache=False, mixer=mixer).last_hidden_state
    finally:
        decoder.set_attn_implementation(before)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    mixer: Mixer,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function in transformers' sense."""
    del attention_mask  # transformers makes none for a name it does not know
    meant = {name for name, given in others.items() if given is not None} - _IGNORED
    if meant:
        raise TypeError(f"attention with {', '.join(sorted(meant))}")
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # torch types every attribute of a module as a tensor
    mixed = mixer.mix(layer, query, key, value, Bends(scaling, sliding_window, softcap))
    return mixed.transpose(1, 2).contiguous(), None


def mixed_by_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask_QK: torch.Tensor | None, bends: Bends
) -> torch.Tensor:
    """Attention under a boolean mask that broadcasts to [batch, heads, Q, K]; None is the causal triangle."""
    groups = query.shape[1] // key.shape[1]
    if query.shape[2] == 1 and groups > 1 and bends.softcap is None:
        # The queries that share a head's keys as rows of one product: five times faster on CPU in bfloat16.
        packed = query.view(query.shape[0], key.shape[1], groups, query.shape[3])
        mixed = scaled_dot_product_attention(packed, key, value, attn_mask=mask_QK, scale=bends.scaling)
        return mixed.view(query.shape[:3] + value.shape[3:])
    if bends.softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask_QK, is_causal=mask_QK is None, scale=bends.scaling, enable_gqa=True
        )
    key, value = _once_per_query_head(key, groups), _once_per_query_head(value, groups)
    if mask_QK is None:
        mask_QK = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    logits = query @ key.transpose(2, 3) * (bends.scaling if bends.scaling is not None else query.shape[-1] ** -0.5)
    capped = bends.softcap * torch.tanh(logits / bends.softcap)
    weights = capped.masked_fill(~mask_QK, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


def _once_per_query_head(part: torch.Tensor, groups: int) -> torch.Tensor:
    """Keys or values [batch, heads, K, D], each head repeated. For `repeat_interleave` torch_npu lists no bfloat16."""
    return part.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)
