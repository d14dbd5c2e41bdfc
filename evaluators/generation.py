"""Texts generated in a batch that is never padded and never waits: a finished sequence gives its slot to the next.

Contexts are run as token trees, so that examples shared by all of them are computed once; then one token per slot and
step, over keys and values that stay in the slot.
Shape letters: S slots, N slots in use, C tokens that a slot holds, H hidden; keys and values are [S, heads, C, width].
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from evaluators.errors import EvaluationError
from evaluators.head import logits_of
from evaluators.own_attention import Bends, attention_by, mixed_by_mask
from evaluators.prefix_tree import packs_of, segments_of
from evaluators.tree_attention import TreeRunner, cost_for, reason_against

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from evaluators.decoding import Decoding
    from evaluators.head import SplitModel
    from evaluators.prefix_tree import Segment, Tokens
    from evaluators.tree_attention import KeysValues

# On one CPU core a step of 16 takes little longer than one of 4 (SmolLM2-135M): the weights are read once.
NUM_SLOTS = 16

# Tokens decoded beyond a stop string's own, when looking for it: tokens do not begin where it begins.
_EXTRA_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One continuation.

    Attributes:
        tokens: as generated, the end token included.
        text: decoded without special tokens, and cut before the first stop string; what follows a thought.
        thought: the thought before it, decoded without special tokens; None where there is none.
        ended_by: what ended it; "length" is a text cut at `max_new_tokens`.
    """

    tokens: tuple[int, ...]
    text: str
    thought: str | None = None
    ended_by: Literal["end token", "stop string", "length"]

    @property
    def is_loop(self) -> bool:
        """Whether it ends in a loop, as quantized models do: see `ends_in_loop`."""
        return ends_in_loop(self.tokens)


def ends_in_loop(tokens: Sequence[int], *, least_repeats: int = 3, least_tokens: int = 24) -> bool:
    """Whether the end is one piece over and over: at least three times, over at least 24 tokens."""
    longest = len(tokens) // least_repeats
    for period in range(1, longest + 1):
        span = max(least_repeats * period, least_tokens)
        if span <= len(tokens) and all(tokens[-i] == tokens[-i - period] for i in range(1, span - period + 1)):
            return True
    return False


class Generator:
    """Continues contexts with a model."""

    def __init__(
        self, model: SplitModel, tokenizer: Any, end_tokens: Collection[int], *, num_slots: int = NUM_SLOTS
    ) -> None:
        """Take a split model.

        Args:
            model: the split model.
            tokenizer: its tokenizer.
            end_tokens: ids that end a text.
            num_slots: texts that are continued at once.

        Raises:
            EvaluationError: token trees cannot be trusted with this model.
        """
        against = reason_against(model)
        if against is not None:
            raise EvaluationError(f"texts cannot be generated with {type(model.decoder).__name__} yet: {against}")
        self._model = model
        self._tokenizer = tokenizer
        self._end_tokens = frozenset(end_tokens)
        self._num_slots = num_slots

    @torch.inference_mode()
    def generate(
        self,
        contexts: Sequence[Tokens],
        decoding: Decoding,
        *,
        pack_tokens: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generated]:
        """Continue each context.

        Args:
            contexts: token ids, none empty; equal ones are continued once where nothing is drawn.
            decoding: how.
            pack_tokens: most tokens of contexts in one forward pass.
            progress: called with contexts done and their number.
        """
        copies: dict[Tokens, list[int]] = defaultdict(list)
        for index, tokens in enumerate(contexts):
            # Where tokens are drawn, equal contexts have continuations of their own.
            if decoding.temperature or tokens not in copies:
                copies[tokens].append(index)
        distinct = sorted(copies)
        capacity = max(map(len, distinct), default=0) + decoding.max_new_tokens
        slots = _Slots(self._num_slots, capacity)
        ready: deque[_Text] = deque()
        coming = self._started(distinct, copies, decoding, pack_tokens)
        done: dict[int, Generated] = {}
        num_texts = sum(map(len, copies.values()))
        while len(done) < num_texts:
            while slots.has_room:
                if not ready:
                    ready.extend(next(coming, ()))
                if not ready:
                    break
                slots.admit(ready.popleft())
            for text in slots.finished(lambda text: self._ended_by(text, decoding)):
                done[text.index] = self._generated(text, decoding)
                if progress is not None:
                    progress(len(done), num_texts)
            if slots.texts:
                self._step(slots, decoding)
        by_context = {tokens: done[indices[0]] for tokens, indices in copies.items()}
        return [done.get(index, by_context[tokens]) for index, tokens in enumerate(contexts)]

    def _started(
        self, contexts: Sequence[Tokens], copies: dict[Tokens, list[int]], decoding: Decoding, pack_tokens: int
    ) -> Iterator[list[_Text]]:
        """Contexts with their keys and values and their first new token, pack by pack."""
        runner = TreeRunner(self._model, keep_all=True)
        segments = segments_of(contexts, [len(tokens) - 1 for tokens in contexts], cost_for(self._model))
        for pack in packs_of(segments, pack_tokens):
            hidden_TH, start = runner.run(pack), 0
            texts: list[_Text] = []
            for segment in pack:
                for scored in segment.scored:
                    (node,) = scored.nodes
                    context = contexts[scored.sequence]
                    texts += self._first(
                        runner, segment, node, hidden_TH[start + node], context, copies[context], decoding
                    )
                start += len(segment)
            if texts:
                yield texts

    def _first(
        self,
        runner: TreeRunner,
        segment: Segment,
        node: int,
        hidden_H: torch.Tensor,
        context: Tokens,
        indices: Sequence[int],
        decoding: Decoding,
    ) -> list[_Text]:
        is_thinking = decoding.thought is not None and decoding.thought.is_open_after(context)
        layers = runner.take(segment, node)
        logits = logits_of(self._model, hidden_H[None]).float().cpu()
        texts = []
        for index in indices:
            text = _Text(index, segment.depth[node] + 1, layers, _stream(decoding, index), is_thinking)
            text.tokens.append(_chosen(logits, [text], decoding)[0])
            texts.append(text)
        return texts

    def _step(self, slots: _Slots, decoding: Decoding) -> None:
        """One more token for every text in a slot."""
        device = self._model.device
        ids = torch.tensor([[text.tokens[-1]] for text in slots.texts], device=device)
        positions = torch.tensor([[text.length] for text in slots.texts], device=device)
        with attention_by(self._model.decoder, slots) as run:
            hidden_NH = run(input_ids=ids, position_ids=positions)[:, 0]
        logits = logits_of(self._model, hidden_NH).float().cpu()
        for text, token in zip(slots.texts, _chosen(logits, slots.texts, decoding), strict=True):
            text.length += 1
            text.tokens.append(token)

    def _ended_by(self, text: _Text, decoding: Decoding) -> str | None:
        if text.tokens[-1] in self._end_tokens:
            return "end token"
        if self._has_stop(text, decoding):
            return "stop string"
        return "length" if len(text.tokens) >= decoding.max_new_tokens else None

    def _has_stop(self, text: _Text, decoding: Decoding) -> bool:
        # Every token holds a character or more, but for the parts of one character that several tokens make.
        tokens, stop = _answer(text, decoding), decoding.stop
        found = self._tokenizer.decode(tokens[-(max(map(len, stop), default=0) + _EXTRA_TOKENS) :])
        if not any(string in found for string in stop if string):
            return False
        # The end of a text may decode otherwise than alone, so what counts is the whole of it.
        whole = self._whole(text, decoding)
        return _cut(whole, stop) != whole

    def _whole(self, text: _Text, decoding: Decoding) -> str:
        """What follows a thought, without the blank that separates them."""
        answer = _answer(text, decoding)
        whole = self._decoded(answer)
        return whole if len(answer) == len(text.tokens) else whole.lstrip()

    def _thought(self, text: _Text, decoding: Decoding) -> str | None:
        mark, length = decoding.thought, len(text.tokens) - len(_answer(text, decoding))
        if mark is None or not length:
            return None
        return self._decoded([t for t in text.tokens[:length] if t not in (mark.opens, mark.closes)]).strip()

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _generated(self, text: _Text, decoding: Decoding) -> Generated:
        ended_by: Any = self._ended_by(text, decoding)
        return Generated(
            tokens=tuple(text.tokens),
            text=_cut(self._whole(text, decoding), decoding.stop),
            thought=self._thought(text, decoding),
            ended_by=ended_by,
        )


def _cut(text: str, stop: Sequence[str]) -> str:
    for string in stop:
        if string:
            text = text.partition(string)[0]
    return text


@dataclass(eq=False)
class _Text:
    """A text at work.

    Attributes:
        index: of its context.
        length: tokens whose keys and values are known; the last of `tokens` is not among them.
        layers: keys and values per layer until it has a slot.
        stream: of random numbers; None where nothing is drawn.
        is_thinking: whether its context ended within a thought.
    """

    index: int
    length: int
    layers: dict[int, KeysValues] | None
    stream: torch.Generator | None
    is_thinking: bool = False

    def __post_init__(self) -> None:
        self.tokens: list[int] = []


class _Slots:
    """Keys and values of the texts at work, one slot each; the first `len(texts)` slots are in use."""

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.texts: list[_Text] = []
        self._num_slots = num_slots
        self._capacity = capacity
        self._layers: dict[int, KeysValues] = {}

    @property
    def has_room(self) -> bool:
        return len(self.texts) < self._num_slots

    def admit(self, text: _Text) -> None:
        """Give a text the next slot."""
        if text.layers is None:
            raise AssertionError("a text is admitted once")
        slot = len(self.texts)
        for layer, pair in text.layers.items():
            if layer not in self._layers:
                shapes = ((self._num_slots, part.shape[1], self._capacity, part.shape[3]) for part in pair)
                keys, values = (part.new_empty(shape) for part, shape in zip(pair, shapes, strict=True))
                self._layers[layer] = keys, values
            for buffer, part in zip(self._layers[layer], pair, strict=True):
                buffer[slot, :, : text.length] = part[0]
                buffer[slot, :, text.length :] = 0  # a mask gives weight 0, and 0 times a former text's NaN is NaN
        text.layers = None
        self.texts.append(text)

    def finished(self, ended_by: Callable[[_Text], str | None]) -> list[_Text]:
        """Take out the texts that have ended; the last ones move into their slots."""
        ended = []
        for slot in reversed(range(len(self.texts))):
            if ended_by(self.texts[slot]) is None:
                continue
            ended.append(self.texts[slot])
            last = self.texts.pop()
            if slot < len(self.texts):
                self.texts[slot] = last
                for buffers in self._layers.values():
                    for buffer in buffers:
                        buffer[slot] = buffer[len(self.texts)]
        return ended

    def mix(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bends: Bends
    ) -> torch.Tensor:
        """Attention of one token per slot, whose key and value are noted first."""
        lengths_N = torch.tensor([text.length for text in self.texts], device=query.device)
        slots_N = torch.arange(len(self.texts), device=query.device)
        keys, values = self._layers[layer]
        keys[slots_N, :, lengths_N] = key[:, :, 0]
        values[slots_N, :, lengths_N] = value[:, :, 0]
        longest = max(text.length for text in self.texts) + 1
        position = torch.arange(longest, device=query.device)
        mask = position <= lengths_N[:, None]
        if bends.window is not None:
            mask &= lengths_N[:, None] - position < bends.window
        in_use = slice(len(self.texts))
        return mixed_by_mask(query, keys[in_use, :, :longest], values[in_use, :, :longest], mask[:, None, None], bends)


def _answer(text: _Text, decoding: Decoding) -> Sequence[int]:
    """The tokens after a thought; none while it lasts."""
    if decoding.thought is None:
        return text.tokens
    length = decoding.thought.length(text.tokens, is_open=text.is_thinking)
    return [] if length is None else text.tokens[length:]


def _stream(decoding: Decoding, index: int) -> torch.Generator | None:
    if not decoding.temperature:
        return None
    # Streams of neighbouring seeds are unlike each other in a Mersenne twister seeded by a well-mixed number.
    mixed = (decoding.seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9) % 2**63
    return torch.Generator().manual_seed(mixed)


def _chosen(logits_NV: torch.Tensor, texts: Sequence[_Text], decoding: Decoding) -> list[int]:
    """The next token of each text; logits that are not finite give token 0, as argmax does."""
    if not decoding.temperature:
        return [int(token) for token in logits_NV.argmax(dim=1)]
    return [_drawn(logits_V, text, decoding) for logits_V, text in zip(logits_NV, texts, strict=True)]


def _drawn(logits_V: torch.Tensor, text: _Text, decoding: Decoding) -> int:
    if not logits_V.isfinite().any():
        return int(logits_V.argmax())
    logits, ids = (logits_V / decoding.temperature).nan_to_num(-torch.inf).sort(descending=True, stable=True)
    if decoding.top_k is not None:
        logits, ids = logits[: decoding.top_k], ids[: decoding.top_k]
    probabilities = logits.softmax(0)
    before = probabilities.cumsum(0) - probabilities
    probabilities = probabilities * (before < decoding.top_p)
    return int(ids[torch.multinomial(probabilities, 1, generator=text.stream)])
