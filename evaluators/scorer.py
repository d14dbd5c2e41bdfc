"""Log-likelihoods and texts for lm-eval's tasks, with the meaning of its own HFLM and less work.

What is saved: each distinct prefix is computed once (`prefix_tree`), nothing is padded, the head runs only where a
continuation is scored. What is equal: tokenization, split, truncation and BOS, so scores agree with HFLM within float
error. A plan depends on the requests of one unit of documents (`slices`), the model's shape and the kind of device
alone, so a score does not depend on what else is scored.
Shape letters: T tokens of a pack, M targets, H hidden.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM

from evaluators.decoding import Decoding, decoding_of
from evaluators.errors import EvaluationError
from evaluators.generation import NUM_SLOTS, Generated, Generator
from evaluators.head import log_probabilities_at, split
from evaluators.hflm_rounding import narrow_log_probabilities_at, narrow_sum
from evaluators.pack_size import PACK_TOKENS, pack_tokens_for
from evaluators.prefix_tree import Segment, num_distinct_tokens, packs_of, segments_of
from evaluators.sequence_rows import RowRunner, row_packs_of, rows_of
from evaluators.slices import unit_of
from evaluators.tree_attention import TreeRunner, cost_for, reason_against

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from evaluators.chat import Chat
    from evaluators.prefix_tree import Tokens

# HFLM's own default for a model that does not state its context.
_DEFAULT_MAX_LENGTH = 2048

Encoded = tuple[tuple[str, str], list[int], list[int]]


@dataclass(frozen=True)
class _Scored:
    """One distinct (model input, continuation): the log-probabilities wanted of it end at the input's last token."""

    tokens: Tokens
    continuation: Tokens


@dataclass
class Work:
    """What scoring has taken so far.

    Attributes:
        computed_tokens: through the model.
        distinct_tokens: nodes of the requests' token trie: the least that could be computed.
        requested_tokens: of all requests, each on its own: what is computed without sharing.
        scored_positions: through the head.
    """

    computed_tokens: int = 0
    distinct_tokens: int = 0
    requested_tokens: int = 0
    scored_positions: int = 0


@dataclass(frozen=True)
class _Unit:
    """Requests of one unit of documents, by their places among all."""

    task: str | None
    number: int | None
    indices: list[int] = field(default_factory=list, compare=False)

    def seed(self, seed: int) -> int:
        """Where texts are drawn, each unit draws otherwise, whatever was drawn before it."""
        if self.number is None:
            return seed
        return int.from_bytes(hashlib.sha256(f"{seed} {self.task} {self.number}".encode()).digest()[:7], "big")


class Scorer(TemplateLM):  # type: ignore[misc]  # lm_eval is untyped
    """An lm-eval `LM` around a transformers causal language model that is already in memory.

    `TemplateLM` splits context and continuation (trailing spaces of the context go to the continuation) and feeds an
    empty context with the prefix token; this class encodes, truncates, batches and scores.

    Attributes:
        num_truncated: requests so far whose context was cut on the left to fit the model.
        scoring: "token trees", "padded rows" with the reason why trees cannot be trusted with this model, or "rows (as
            HFLM)"; with the size of packs where it is not the usual one.
        work: what has been computed so far.
        generated: what was generated for each (task, document), in the order of its requests.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        pack_tokens: int | None = None,
        memory_share: float = 1.0,
        seed: int = 0,
        chat: Chat | None = None,
        as_hflm: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Take a model in evaluation mode and its tokenizer.

        Args:
            model: a transformers causal language model.
            tokenizer: its tokenizer.
            pack_tokens: most tokens of one forward pass; a longer segment runs alone. None is what suits the device.
            memory_share: how much of that to take at a time, where all of it did not fit; texts side by side too.
            seed: of what is drawn when texts are generated.
            chat: renders conversations, where prompts are conversations.
            as_hflm: compute log-likelihoods as HFLM does with `batch_size=1`, rounded as there.
            progress: called with requests done and their number.

        Raises:
            EvaluationError: the model cannot be split into decoder and head, or the tokenizer has neither BOS nor EOS.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.num_truncated = 0
        self._model = split(model)
        self._max_length = self._model.max_length or _DEFAULT_MAX_LENGTH
        self._as_hflm = as_hflm
        self._log_probabilities_at = narrow_log_probabilities_at if as_hflm else log_probabilities_at
        self._add = partial(narrow_sum, dtype=model.dtype) if as_hflm else math.fsum
        against = "as HFLM" if as_hflm else reason_against(self._model)
        self._trusts_trees = against is None
        self.scoring = "token trees" if against is None else f"{'' if as_hflm else 'padded '}rows ({against})"
        if pack_tokens is None:
            pack_tokens = pack_tokens_for(self._model) if self._trusts_trees else PACK_TOKENS
            pack_tokens = max(1, int(pack_tokens * memory_share))
        if pack_tokens != PACK_TOKENS:
            self.scoring += f", packs of {pack_tokens} tokens"
        self._pack_tokens = pack_tokens
        self._num_slots = max(1, int(NUM_SLOTS * memory_share))
        self.work = Work()
        self.generated: dict[tuple[str | None, int | None], list[Generated]] = defaultdict(list)
        self._seed = seed
        self._chat = chat
        self._end_tokens = _end_tokens(model, tokenizer)
        self._progress = progress
        self._before, self._total = 0, 0  # requests of earlier units, and of all
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if prefix is None:
            raise EvaluationError(f"{type(tokenizer).__name__} has neither a BOS nor an EOS token: set one of them")
        self._prefix_token_id = int(prefix)
        self._prefix_text = tokenizer.decode([prefix])

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS, else EOS."""
        return self._prefix_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; special tokens by the tokenizer's own default, and never a second BOS."""
        if add_special_tokens is None and string.startswith(self._prefix_text):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    @property
    def tokenizer_name(self) -> str:
        """Part of lm-eval's key for cached requests; none are cached."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, in the scorer's mode.

        Raises:
            EvaluationError: the template refuses the conversation.
        """
        if self._chat is None:
            raise AssertionError("a scorer of conversations is made with `chat`")
        return self._chat.render(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation, and whether greedy decoding would produce it."""
        del disable_tqdm
        scores: dict[int, tuple[float, bool]] = {}
        for unit in self._units(requests):
            found = super().loglikelihood([requests[index] for index in unit.indices], disable_tqdm=True)
            scores |= dict(zip(unit.indices, found, strict=True))
        return [scores[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused: no supported task needs it."""
        raise EvaluationError("rolling log-likelihood tasks are not supported yet: use evaluators.perplexity")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The continuation of each request's context, by its own generation arguments.

        Raises:
            EvaluationError: an argument that is not known, more new tokens than the model's context, a scorer that
                rounds as HFLM, or a model that texts cannot be generated with.
        """
        del disable_tqdm
        if self._as_hflm:
            raise EvaluationError("only choices are scored with HFLM's rounding, and this task writes texts")
        texts: dict[int, Generated] = {}
        generator = Generator(self._model, self.tokenizer, self._end_tokens, num_slots=self._num_slots)
        for unit in self._units(requests):
            groups: dict[str, list[int]] = defaultdict(list)
            for index in unit.indices:
                groups[json.dumps(requests[index].args[1], sort_keys=True)].append(index)
            for arguments, indices in groups.items():
                decoding = decoding_of(
                    json.loads(arguments),
                    seed=unit.seed(self._seed),
                    thought=None if self._chat is None else self._chat.thought,
                    thinking_tokens=0 if self._chat is None else self._chat.thinking_tokens,
                )
                contexts = [self._context(requests[index].args[0], decoding) for index in indices]
                found = generator.generate(
                    contexts,
                    decoding,
                    pack_tokens=self._pack_tokens,
                    progress=self._progress_after(len(texts), len(requests)),
                )
                texts |= dict(zip(indices, found, strict=True))
        for index, request in enumerate(requests):
            self.generated[request.task_name, request.doc_id].append(texts[index])
        return [texts[index].text for index in range(len(requests))]

    def _units(self, requests: Sequence[Any]) -> Iterator[_Unit]:
        """Requests that are scored together, unit by unit; those that name no document are one unit."""
        units: dict[_Unit, _Unit] = {}
        for index, request in enumerate(requests):
            number = None if request.doc_id is None else unit_of(request.doc_id)
            unit = _Unit(request.task_name, number)
            units.setdefault(unit, unit).indices.append(index)
        self._before, self._total = 0, len(requests)
        for unit in units:
            yield unit
            self._before += len(unit.indices)

    def _progress_after(self, before: int, total: int) -> Callable[[int, int], None] | None:
        progress = self._progress
        return None if progress is None else lambda done, _: progress(before + done, total)

    def _context(self, text: str, decoding: Decoding) -> Tokens:
        """The tokens of a context, cut on the left so that its continuation fits the model."""
        longest = self._max_length - decoding.max_new_tokens
        if longest < 1:
            raise EvaluationError(
                f"max_gen_toks = {decoding.max_new_tokens} leaves no room for a prompt in the model's context of "
                f"{self._max_length} tokens: ask for fewer"
            )
        tokens = self.tok_encode(text) or [self._prefix_token_id]
        if len(tokens) > longest:
            self.num_truncated += 1
        return tuple(tokens[-longest:])

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[Encoded], **_: Any) -> list[tuple[float, bool]]:
        wanted = [self._scored(*request) for request in requests]
        by_input: dict[Tokens, list[_Scored]] = defaultdict(list)
        for item in dict.fromkeys(wanted):
            by_input[item.tokens].append(item)
        inputs = sorted(by_input)
        self.work.distinct_tokens += num_distinct_tokens(inputs)
        self.work.requested_tokens += sum(len(item.tokens) for item in wanted)
        items = [by_input[tokens] for tokens in inputs]
        sheet = _Sheet(items)
        done = 0
        for pack, hidden_TH in self._hidden(inputs, sheet.scored_from):
            self.work.computed_tokens += sum(map(len, pack))
            nodes, places, targets = sheet.wanted(pack)
            if nodes:
                log_probabilities_M, greedy_M = self._log_probabilities_at(
                    self._model, hidden_TH[nodes], torch.tensor(places), torch.tensor(targets)
                )
                sheet.note(log_probabilities_M.tolist(), greedy_M.tolist())
            self.work.scored_positions += len(nodes)
            done += sum(segment.num_finished for segment in pack)
            if self._progress is not None:  # inputs are as many requests as there are to one on average
                in_unit = len(requests) * done // len(inputs)
                self._progress(self._before + in_unit, max(self._total, len(requests)))
        return [sheet.score(item, self._add) for item in wanted]

    def _hidden(
        self, inputs: Sequence[Tokens], scored_from: Sequence[int]
    ) -> Iterable[tuple[Sequence[Segment], torch.Tensor]]:
        """Packs of all inputs, with their hidden states [T, H]."""
        packs: Iterable[Sequence[Segment]]
        runner: TreeRunner | RowRunner
        if self._trusts_trees:
            runner = TreeRunner(self._model)
            packs = packs_of(segments_of(inputs, scored_from, cost_for(self._model)), self._pack_tokens)
        else:
            runner = RowRunner(self._model)
            packs = row_packs_of(rows_of(inputs, scored_from), self._pack_tokens, pad=not self._as_hflm)
        for pack in packs:
            yield pack, runner.run(pack)

    def _scored(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> _Scored:
        if not context or not continuation or len(continuation) > self._max_length:
            raise EvaluationError(
                f"continuation {texts[1][:40]!r} makes {len(continuation)} tokens; it must make 1 to "
                f"{self._max_length}: the task does not fit this model"
            )
        tokens = context + continuation
        if len(tokens) > self._max_length + 1:
            self.num_truncated += 1
        return _Scored(tuple(tokens[-(self._max_length + 1) :][:-1]), tuple(continuation))


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a text by the model's generation settings or by its tokenizer."""
    settings = getattr(model, "generation_config", None)
    ends = [getattr(settings, "eos_token_id", None), tokenizer.eos_token_id]
    return {int(token) for end in ends if end is not None for token in (end if isinstance(end, list) else [end])}


class _Sheet:
    """What is wanted at which position, and what was found there."""

    def __init__(self, items: Sequence[Sequence[_Scored]]) -> None:
        """Take the items of each input, in the inputs' order."""
        self._items = items
        # An item's scored positions are the last of its input, one per token of its continuation.
        self.scored_from = [len(group[0].tokens) - max(len(item.continuation) for item in group) for group in items]
        self._found = {item: [(math.nan, False)] * len(item.continuation) for group in items for item in group}
        self._waiting: list[list[tuple[_Scored, int]]] = []

    def wanted(self, pack: Sequence[Segment]) -> tuple[list[int], list[int], list[int]]:
        """The pack's tokens whose hidden states are wanted; per target the index among these, ascending; the targets.

        Where several items want the same target of the same token, it is asked for once.
        """
        by_node: dict[int, dict[int, list[tuple[_Scored, int]]]] = defaultdict(lambda: defaultdict(list))
        start = 0
        for segment in pack:
            for scored in segment.scored:
                for item in self._items[scored.sequence]:
                    offset = scored.first - (len(item.tokens) - len(item.continuation))  # in the continuation
                    for place, node in enumerate(scored.nodes, start=offset):
                        if place >= 0:
                            by_node[start + node][item.continuation[place]].append((item, place))
            start += len(segment)
        nodes = sorted(by_node)
        places = [index for index, node in enumerate(nodes) for _ in by_node[node]]
        targets = [target for node in nodes for target in by_node[node]]
        self._waiting = [waiting for node in nodes for waiting in by_node[node].values()]
        return nodes, places, targets

    def note(self, log_probabilities: Sequence[float], greedy: Sequence[bool]) -> None:
        """Take what was asked for by the last `wanted`."""
        for waiting, log_probability, is_greedy in zip(self._waiting, log_probabilities, greedy, strict=True):
            for item, place in waiting:
                self._found[item][place] = (log_probability, is_greedy)

    def score(self, item: _Scored, add: Callable[[list[float]], float]) -> tuple[float, bool]:
        """The log-likelihood of a continuation, and whether greedy decoding would produce it."""
        found = self._found[item]
        return add([log_probability for log_probability, _ in found]), all(greedy for _, greedy in found)
