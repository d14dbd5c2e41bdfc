"""Running segments of a token trie through a transformers model: no padding, no mask over the whole pack.

A pack goes through the model as one row of tokens. Everything but attention treats tokens one by one; attention is done
segment by segment, over the segment's own keys and those kept of its prefix. It reaches the model by transformers'
attention interface, under a name of its own.
Shape letters: T tokens of a pack, Q tokens of a segment, P tokens of its prefix, K = P + Q keys, H hidden; tensors of
attention are [1, heads, tokens, head width].
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from evaluators.prefix_tree import Cost, Segment, segments_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from evaluators.head import SplitModel

NAME = "bitatlas-token-trees"

# What transformers hands to every attention function, and what changes nothing here.
_IGNORED = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states"})

# Attention takes about three times as long per operation as the linears do: its products are small.
_ATTENTION_SLOWNESS = 3.0

# How far hidden states may be off plain ones for the tree to be trusted with a model: rounding, but no wrong mask.
_TOLERANCE = {torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.3

KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(eq=False, kw_only=True)
class _Placed:
    """A segment in a pack.

    Attributes:
        start: the index of its first token in the pack.
        layers: of its prefix: keys and values, prefixes of the prefix included; None without one.
        kept: filled with its own, where it is a prefix; None otherwise.
    """

    segment: Segment
    start: int
    layers: dict[int, KeysValues] | None
    kept: dict[int, KeysValues] | None
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def mask_QK(self, window: int | None, device: torch.device) -> torch.Tensor | None:  # noqa: N802 - shape letters
        """Which keys each token may look at; None for the plain causal triangle."""
        if window not in self.masks:
            self.masks[window] = self._make_mask(window, device)
        return self.masks[window]

    def _make_mask(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        segment = self.segment
        if window is not None and max(segment.depth) < window:
            return self.mask_QK(None, device)
        if window is None and not segment.start and segment.is_chain:
            return None
        index = torch.arange(len(segment))
        own = (index[None, :] <= index[:, None]) & (index[:, None] < torch.tensor(segment.end)[None, :])
        mask = torch.cat([torch.ones(len(segment), segment.start, dtype=torch.bool), own], dim=1)
        if window is not None:
            depth = torch.tensor(segment.depth)
            keys = torch.cat([torch.arange(segment.start), depth])
            mask &= depth[:, None] - keys[None, :] < window
        return mask.to(device)


class TreeRunner:
    """Runs packs of segments; keeps the keys and values of prefixes as long as segments wait for them."""

    def __init__(self, model: SplitModel) -> None:
        """Take a split model; `reason_against` says whether this will do."""
        self._model = model
        self._kept: dict[Segment, dict[int, KeysValues]] = {}

    def run(self, pack: Sequence[Segment]) -> torch.Tensor:
        """Hidden states [T, H] after the final norm, of the segments' tokens one after the other."""
        placed, start = [], 0
        for segment in pack:
            layers = self._kept[segment.prefix] if segment.prefix is not None else None
            kept: dict[int, KeysValues] | None = {} if segment.num_children else None
            placed.append(_Placed(segment=segment, start=start, layers=layers, kept=kept))
            start += len(segment)
        device = self._model.device
        ids = torch.tensor([[token for segment in pack for token in segment.tokens]], device=device)
        positions = torch.tensor([[depth for segment in pack for depth in segment.depth]], device=device)
        with _attention_by_segments(self._model.decoder):
            output = self._model.decoder(input_ids=ids, position_ids=positions, use_cache=False, pack=placed)
        self._settle(placed)
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def _settle(self, placed: Sequence[_Placed]) -> None:
        for item in placed:
            if item.kept is not None:
                self._kept[item.segment] = item.kept
            prefix = item.segment.prefix
            if prefix is not None:
                prefix.num_children -= 1
                if not prefix.num_children:
                    del self._kept[prefix]


def cost_for(model: SplitModel) -> Cost:
    """What a pair in attention costs in a model, by its shape alone: the same plan on every machine."""
    config = model.decoder.config.get_text_config()
    linears = sum(module.weight.numel() for module in model.decoder.modules() if isinstance(module, torch.nn.Linear))
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    pair = 2 * config.num_hidden_layers * heads * width  # multiplications: with a key, and with a value
    return Cost(pair=_ATTENTION_SLOWNESS * pair / max(linears, 1))


@torch.inference_mode()
def reason_against(model: SplitModel) -> str | None:
    """Why token trees cannot be trusted with a model; None if they can.

    A small forest with a kept prefix must give what plain forwards give.
    """
    sequences = sorted(tuple(token % model.embeddings for token in sequence) for sequence in _PROBES)
    plain = [model.decoder(input_ids=_row(model, tokens), use_cache=False).last_hidden_state[0] for tokens in sequences]
    segments = segments_of(sequences, [0] * len(sequences), Cost(pair=0.01, segment=0.0, wait=0.0))
    runner = TreeRunner(model)
    found = [torch.zeros_like(hidden) for hidden in plain]
    try:
        for segment in segments:  # one by one, so that prefixes come first
            hidden = runner.run([segment])
            for scored in segment.scored:
                nodes = list(scored.nodes)
                found[scored.sequence][scored.first : scored.first + len(nodes)] = hidden[nodes]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    expected, ours = torch.cat(plain).float(), torch.cat(found).float()
    if not expected.isfinite().all():
        return None  # broken by quantization, not by the tree
    off = ((ours - expected).norm() / expected.norm().clamp_min(1e-12)).item()
    allowed = _TOLERANCE.get(plain[0].dtype, _LOW_PRECISION_TOLERANCE)
    return None if off <= allowed else f"hidden states differ by {off:.2g} of their norm"


# Three sequences with a shared prefix that branches twice, and one of its own.
_PROBES = (
    (*range(11, 27), 3, 5, 8, 9),
    (*range(11, 27), 3, 5, 8, 2, 4),
    (*range(11, 27), 7, 1),
    (40, 41, 42),
)


def _row(model: SplitModel, tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([tokens], device=model.device)


@contextmanager
def _attention_by_segments(decoder: Any) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pack: Sequence[_Placed],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function in transformers' sense, over the segments of a pack."""
    del attention_mask  # transformers makes none for a name it does not know
    meant = {name for name, given in others.items() if given is not None} - _IGNORED
    if meant:
        raise TypeError(f"attention with {', '.join(sorted(meant))}")
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # torch types every attribute of a module as a tensor
    mixed = query.new_empty(query.shape[:3] + value.shape[3:])
    for item in pack:
        tokens = slice(item.start, item.start + len(item.segment))
        keys, values = key[:, :, tokens], value[:, :, tokens]
        if item.layers is not None:
            before_keys, before_values = item.layers[layer]
            keys, values = torch.cat([before_keys, keys], dim=2), torch.cat([before_values, values], dim=2)
        if item.kept is not None:
            item.kept[layer] = keys.clone(), values.clone()
        mask_QK = item.mask_QK(sliding_window, query.device)
        mixed[:, :, tokens] = _segment_attention(query[:, :, tokens], keys, values, mask_QK, scaling, softcap)
    return mixed.transpose(1, 2).contiguous(), None


def _segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_QK: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask_QK, is_causal=mask_QK is None, scale=scaling, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if mask_QK is None:
        mask_QK = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    logits = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    capped = softcap * torch.tanh(logits / softcap)
    weights = capped.masked_fill(~mask_QK, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value
