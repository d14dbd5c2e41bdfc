"""Running segments of a token trie through a transformers model: no padding, no mask over the whole pack.

A pack goes through the model as one row of tokens. Everything but attention treats tokens one by one; attention is done
segment by segment, over the segment's own keys and those kept of its prefix (`own_attention` takes it to the model).
Shape letters: T tokens of a pack, Q tokens of a segment, P tokens of its prefix, K = P + Q keys, H hidden; tensors of
attention are [1, heads, tokens, head width].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from evaluators.own_attention import Bends, attention_by, mixed_by_mask
from evaluators.prefix_tree import Cost, Segment, segments_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evaluators.head import SplitModel

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


@dataclass(frozen=True)
class _Pack:
    """The attention of a pack, for `own_attention`."""

    placed: Sequence[_Placed]

    def mix(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bends: Bends
    ) -> torch.Tensor:
        mixed = query.new_empty(query.shape[:3] + value.shape[3:])
        for item in self.placed:
            tokens = slice(item.start, item.start + len(item.segment))
            keys, values = key[:, :, tokens], value[:, :, tokens]
            if item.layers is not None:
                before_keys, before_values = item.layers[layer]
                keys, values = torch.cat([before_keys, keys], dim=2), torch.cat([before_values, values], dim=2)
            if item.kept is not None:
                item.kept[layer] = keys.clone(), values.clone()
            mask_QK = item.mask_QK(bends.window, query.device)
            mixed[:, :, tokens] = mixed_by_mask(query[:, :, tokens], keys, values, mask_QK, bends)
        return mixed


class TreeRunner:
    """Runs packs of segments; keeps the keys and values of prefixes as long as segments wait for them."""

    def __init__(self, model: SplitModel, *, keep_all: bool = False) -> None:
        """Take a split model; `reason_against` says whether this will do.

        Args:
            model: the split model.
            keep_all: keep those of every segment until the next pack is run, for `take`.
        """
        self._model = model
        self._keep_all = keep_all
        self._kept: dict[Segment, dict[int, KeysValues]] = {}

    def run(self, pack: Sequence[Segment]) -> torch.Tensor:
        """Hidden states [T, H] after the final norm, of the segments' tokens one after the other."""
        self._kept = {segment: layers for segment, layers in self._kept.items() if segment.num_children}
        placed, start = [], 0
        for segment in pack:
            layers = self._kept[segment.prefix] if segment.prefix is not None else None
            kept: dict[int, KeysValues] | None = {} if segment.num_children or self._keep_all else None
            placed.append(_Placed(segment=segment, start=start, layers=layers, kept=kept))
            start += len(segment)
        device = self._model.device
        ids = torch.tensor([[token for segment in pack for token in segment.tokens]], device=device)
        positions = torch.tensor([[depth for segment in pack for depth in segment.depth]], device=device)
        with attention_by(self._model.decoder, _Pack(placed)) as run:
            output = run(input_ids=ids, position_ids=positions)
        self._settle(placed)
        return output[0]

    def take(self, segment: Segment, node: int) -> dict[int, KeysValues]:
        """Keys and values per layer of a token's whole past, itself included; the segment was in the last pack."""
        ancestors = [other for other in range(node + 1) if node < segment.end[other]]
        index = torch.tensor([*range(segment.start), *(segment.start + other for other in ancestors)])
        return {
            layer: (keys[:, :, index.to(keys.device)], values[:, :, index.to(values.device)])
            for layer, (keys, values) in self._kept[segment].items()
        }

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
