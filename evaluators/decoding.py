"""How texts are continued, and what lm-eval's generation arguments mean by it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evaluators.errors import EvaluationError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from evaluators.chat import Thought

# lm-eval's HFLM generates this many tokens where a task does not say.
_DEFAULT_MAX_NEW_TOKENS = 256
# lm-eval's names for the same number, the first that is given counts.
_MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = (*_MAX_NEW_TOKENS, "until", "do_sample", "temperature", "top_k", "top_p")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How texts are continued.

    Attributes:
        max_new_tokens: at most.
        stop: a text ends before the first of these strings.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_k: draw among the `top_k` most likely; None: all.
        top_p: draw among the fewest most likely tokens that together have this probability.
        seed: of the draws; each text has a stream of its own, whatever else is in the batch.
        thought: the tokens around a thought, which is no part of the text and in which nothing stops it; None: what is
            generated is the text.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    thought: Thought | None = None

    def __post_init__(self) -> None:  # noqa: D105
        if self.max_new_tokens < 1:
            raise EvaluationError(f"max_new_tokens = {self.max_new_tokens} must be at least 1")
        if not self.temperature >= 0:
            raise EvaluationError(f"temperature = {self.temperature} must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise EvaluationError(f"top_k = {self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise EvaluationError(f"top_p = {self.top_p} must be above 0 and at most 1")


def decoding_of(
    arguments: Mapping[str, Any], *, seed: int, thought: Thought | None = None, thinking_tokens: int = 0
) -> Decoding:
    """What a task's `generation_kwargs` say, as lm-eval's HFLM reads them.

    Args:
        arguments: until, do_sample, temperature, top_k, top_p and the number of tokens under any of its names.
        seed: of the draws, where there are any.
        thought: the tokens around a thought; None where models of this kind do not think.
        thinking_tokens: for a thought, on top of the arguments' number of tokens.

    Raises:
        EvaluationError: an argument that is not known, such as num_beams.
    """
    for name in arguments:
        if name not in _KNOWN:
            raise unknown_name("generation argument", name, _KNOWN)
    given = [arguments[name] for name in _MAX_NEW_TOKENS if arguments.get(name) is not None]
    until = arguments.get("until") or ()
    temperature = float(arguments.get("temperature") or 0.0)
    do_sample = arguments.get("do_sample")
    if do_sample is False:
        temperature = 0.0
    elif do_sample and not temperature:
        temperature = 1.0  # transformers' own default
    return Decoding(
        max_new_tokens=(int(given[0]) if given else _DEFAULT_MAX_NEW_TOKENS) + thinking_tokens,
        stop=(until,) if isinstance(until, str) else tuple(until),
        temperature=temperature,
        top_k=arguments.get("top_k"),
        top_p=float(arguments.get("top_p") or 1.0),
        seed=seed,
        thought=thought,
    )
