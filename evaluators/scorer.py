"""Log-likelihoods of continuations for lm-eval's tasks, with the meaning of its own HFLM and less work.

What is saved: hidden states only, the head only where a continuation is scored, equal inputs run once. What is equal:
tokenization, split, truncation and BOS, so scores agree with HFLM within float error. A batch depends on nothing but
the set of requests, so a score does not depend on the machine.
Shape letters: B batch, T tokens, N scored positions, H hidden.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM

from evaluators.errors import EvaluationError
from evaluators.head import hidden_states, split, token_log_probabilities

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Padded tokens per forward pass. On one CPU core 512 to 4096 are equally fast (SmolLM2-135M) and 8192 is slower. It is
# fixed because in bfloat16 the batch moves the last bits of a score; change `SCORER_VERSION` in `harness` with it.
TOKEN_BUDGET = 2048

# HFLM's own default for a model that does not state its context.
_DEFAULT_MAX_LENGTH = 2048

Encoded = tuple[tuple[str, str], list[int], list[int]]


@dataclass(frozen=True)
class _Scored:
    """One distinct (model input, continuation): the log-probabilities wanted of it end at the input's last token."""

    tokens: tuple[int, ...]
    continuation: tuple[int, ...]


class Scorer(TemplateLM):  # type: ignore[misc]  # lm_eval is untyped
    """An lm-eval `LM` around a transformers causal language model that is already in memory.

    `TemplateLM` splits context and continuation (trailing spaces of the context go to the continuation) and feeds an
    empty context with the prefix token; this class encodes, truncates, batches and scores.

    Attributes:
        num_truncated: requests so far whose context was cut on the left to fit the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        token_budget: int = TOKEN_BUDGET,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Take a model in evaluation mode and its tokenizer.

        Args:
            model: a transformers causal language model.
            tokenizer: its tokenizer.
            token_budget: most padded tokens of one forward pass; a longer request runs alone.
            progress: called with distinct inputs done and their number after every forward pass.

        Raises:
            EvaluationError: the model cannot be split into decoder and head, or the tokenizer has neither BOS nor EOS.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.num_truncated = 0
        self._model = split(model)
        self._max_length = self._model.max_length or _DEFAULT_MAX_LENGTH
        self._token_budget = token_budget
        self._progress = progress
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

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation, and whether greedy decoding would produce it."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused: no supported task needs it."""
        raise EvaluationError("rolling log-likelihood tasks are not supported yet: use evaluators.perplexity")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Refused: generation is not supported yet."""
        raise EvaluationError("tasks that generate text are not supported yet: choose a multiple-choice task")

    def _loglikelihood_tokens(self, requests: list[Encoded], **_: Any) -> list[tuple[float, bool]]:
        wanted = [self._scored(*request) for request in requests]
        by_input: dict[tuple[int, ...], list[_Scored]] = defaultdict(list)
        for item in dict.fromkeys(wanted):
            by_input[item.tokens].append(item)
        scores: dict[_Scored, tuple[float, bool]] = {}
        # Longest first: memory is at its peak at once, and time is over-estimated rather than under.
        inputs = sorted(by_input, key=lambda tokens: (-len(tokens), tokens))
        done = 0
        for batch in _batches(inputs, self._token_budget):
            self._score(batch, by_input, scores)
            done += len(batch)
            if self._progress is not None:
                self._progress(done, len(inputs))
        return [scores[item] for item in wanted]

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

    @torch.inference_mode()
    def _score(
        self,
        batch: Sequence[tuple[int, ...]],
        by_input: dict[tuple[int, ...], list[_Scored]],
        scores: dict[_Scored, tuple[float, bool]],
    ) -> None:
        ids_BT = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
        for row, tokens in enumerate(batch):
            ids_BT[row, : len(tokens)] = torch.tensor(tokens)
        rows: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        items: list[_Scored] = []
        for row, tokens in enumerate(batch):
            for item in by_input[tokens]:
                length = len(item.continuation)
                rows += [row] * length
                columns += range(len(tokens) - length, len(tokens))
                targets += item.continuation
                items.append(item)
        hidden_BTH = hidden_states(self._model, ids_BT)
        log_probabilities_N, greedy_N = token_log_probabilities(
            self._model, hidden_BTH[rows, columns], torch.tensor(targets)
        )
        lengths = [len(item.continuation) for item in items]
        parts = zip(
            torch.split(log_probabilities_N.double().cpu(), lengths),
            torch.split(greedy_N.cpu(), lengths),
            strict=True,
        )
        for item, (log_probabilities, greedy) in zip(items, parts, strict=True):
            scores[item] = float(log_probabilities.sum()), bool(greedy.all())


def _batches(inputs: Sequence[tuple[int, ...]], token_budget: int) -> Iterator[Sequence[tuple[int, ...]]]:
    """Cut inputs, longest first, into batches whose padded size stays within the budget."""
    start = 0
    while start < len(inputs):
        size = max(1, token_budget // max(1, len(inputs[start])))
        yield inputs[start : start + size]
        start += size
