"""Prompts as conversations: the tokenizer's own chat template, and how to ask it for a thinking mode.

Modes are a convention of each family's template, so they are known by what the template contains and refused by name
where it is none of these. Source: the templates and model cards of openPangu-Embedded-7B V1.1 and of Qwen3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from evaluators.errors import EvaluationError

ChatMode = Literal["default", "no_think", "auto_think", "slow_think"]
CHAT_MODES: tuple[str, ...] = get_args(ChatMode)
# A task's own limit is meant for the answer; a thought may take this many tokens on top of it.
THINKING_TOKENS = 2048

# Raise when the same conversation would be rendered, or its answer read, otherwise.
VERSION = "1"

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How a thinking mode is asked for.

    Attributes:
        suffix: appended to the last user turn.
        arguments: given to the template.
        thinks: whether the model may think before it answers.
    """

    suffix: str = ""
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    thinks: bool = True


@dataclass(frozen=True, kw_only=True)
class Convention:
    """A family's templates.

    Attributes:
        name: how rows call it.
        reads: strings that all of its templates contain, and others do not all.
        modes: by the names of `ChatMode`.
        marks: the tokens before and after a thought; None where models of the family do not think.
    """

    name: str
    modes: Mapping[str, Mode]
    reads: tuple[str, ...] = ()
    marks: tuple[str, str] | None = None


# The first that fits counts.
CONVENTIONS = (
    Convention(
        name="openPangu",
        reads=("[unused9]", "[unused10]"),
        modes={
            "default": Mode(),
            "no_think": Mode(suffix=" /no_think", thinks=False),
            "auto_think": Mode(suffix=" /auto_think"),
            "slow_think": Mode(),
        },
        marks=("[unused16]", "[unused17]"),
    ),
    Convention(
        name="enable_thinking",
        reads=("enable_thinking", "</think>"),
        modes={
            "default": Mode(),
            "no_think": Mode(arguments={"enable_thinking": False}, thinks=False),
            "slow_think": Mode(arguments={"enable_thinking": True}),
        },
        marks=("<think>", "</think>"),
    ),
    Convention(
        name="always thinking",
        reads=("<think>", "</think>"),
        modes={"default": Mode(), "slow_think": Mode()},
        marks=("<think>", "</think>"),
    ),
    Convention(name="without thinking modes", modes={"default": Mode(thinks=False)}),
)


@dataclass(frozen=True, kw_only=True)
class Thought:
    """The tokens between which a model thinks, by id."""

    opens: int
    closes: int

    def is_open_after(self, context: Sequence[int]) -> bool:
        """Whether a context ends within a thought, as where the template opens one."""
        for token in reversed(context):
            if token in (self.opens, self.closes):
                return token == self.opens
        return False

    def length(self, tokens: Sequence[int], *, is_open: bool) -> int | None:
        """How many of a text's first tokens are thought, its last mark included; None: it has not ended.

        Args:
            tokens: what was generated.
            is_open: whether the context ended within a thought.
        """
        for index in range(len(tokens) - 1, -1, -1):
            if tokens[index] == self.closes:
                return index + 1
        return None if is_open or self.opens in tokens else 0


class Chat:
    """Conversations of one tokenizer in one mode.

    Attributes:
        thought: the tokens around a thought; None where models of this family do not think.
        thinking_tokens: for a thought, on top of what a task allows for an answer; 0 where none comes.
    """

    def __init__(self, tokenizer: Any, mode: str, *, thinking_tokens: int | None = None) -> None:
        """Take a tokenizer with a chat template.

        Args:
            tokenizer: of transformers, or with its `get_chat_template`, `apply_chat_template` and `get_vocab`.
            mode: one of `CHAT_MODES`.
            thinking_tokens: for a thought, where the mode lets the model think; None: `THINKING_TOKENS`.

        Raises:
            EvaluationError: no template or a broken one, a mode that it does not have, or no single tokens around a
                thought.
        """
        self._template = _template(tokenizer)
        self._convention = next(found for found in CONVENTIONS if all(piece in self._template for piece in found.reads))
        modes = self._convention.modes
        if mode not in modes:
            raise EvaluationError(
                f"chat: {mode} is no mode of this model: its chat template is of the kind {self._convention.name!r}, "
                f"which knows {', '.join(modes)}: set chat to one of these"
            )
        self._tokenizer, self._name, self._mode = tokenizer, mode, modes[mode]
        self.thought = _thought(tokenizer, self._convention)
        self.thinking_tokens = (thinking_tokens or THINKING_TOKENS) if self._mode.thinks else 0
        self._dropped_system = False
        self.render([{"role": "user", "content": "Hello"}])  # a broken template is found before anything runs

    def check_choices(self) -> None:
        """Refuse to score choices where a thought comes before the answer.

        Raises:
            EvaluationError: says which mode does without.
        """
        if not self._mode.thinks:
            return
        without = [name for name, mode in self._convention.modes.items() if not mode.thinks]
        remedy = f"set chat to {' or '.join(without)}" if without else "leave chat out"
        raise EvaluationError(
            f"chat: {self._name} lets the model think before it answers, and choices are scored without a thought: "
            f"{remedy}"
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What answers depend on besides task and vocabulary, for a job's content hash."""
        template = hashlib.sha256(self._template.encode()).hexdigest()
        return {"chat": self._name, "template": template, "version": VERSION} | self._length

    @property
    def facts(self) -> dict[str, Any]:
        """What rows say of the conversations rendered so far."""
        facts: dict[str, Any] = {"chat": self._name}
        if self.thought is not None:
            facts["chat_template"] = self._convention.name
        return facts | self._length | ({"system_messages": "left out"} if self._dropped_system else {})

    @property
    def _length(self) -> dict[str, int]:
        return {"thinking_tokens": self.thinking_tokens} if self._mode.thinks else {}

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without its system messages where the template refuses these, as in lm-eval.

        Args:
            messages: with `role` and `content`.
            add_generation_prompt: end where the assistant's turn begins; else within the last message.

        Raises:
            EvaluationError: the template refuses the conversation.
        """
        import jinja2

        turns = self._with_suffix(messages)
        spoken = [turn for turn in turns if turn["role"] != "system"]
        try:
            return self._rendered(turns, add_generation_prompt)
        except jinja2.TemplateError as error:
            refusal = error
        if len(spoken) < len(turns):
            with suppress(jinja2.TemplateError):
                text = self._rendered(spoken, add_generation_prompt)
                self._dropped_system = True
                return text
        raise EvaluationError(f"the model's chat template refuses the conversation: {refusal}") from refusal

    def _rendered(self, turns: Sequence[Message], add_generation_prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._mode.arguments,
        )
        return text

    def _with_suffix(self, messages: Sequence[Message]) -> list[Message]:
        turns = list(messages)
        last = max((index for index, turn in enumerate(turns) if turn["role"] == "user"), default=None)
        if last is not None:
            turns[last] = {**turns[last], "content": turns[last]["content"] + self._mode.suffix}
        return turns


def _template(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except (AttributeError, ValueError):
        raise EvaluationError(
            "chat needs a chat template and the model's tokenizer has none: leave chat out, or add the template to the "
            "checkpoint (chat_template.jinja)"
        ) from None


def _thought(tokenizer: Any, convention: Convention) -> Thought | None:
    if convention.marks is None:
        return None
    vocabulary = tokenizer.get_vocab()
    missing = [mark for mark in convention.marks if mark not in vocabulary]
    if missing:
        raise EvaluationError(
            f"the chat template marks thoughts by {' and '.join(missing)}, which are no single tokens of the model: "
            "leave chat out, or repair the tokenizer"
        )
    opens, closes = (int(vocabulary[mark]) for mark in convention.marks)
    return Thought(opens=opens, closes=closes)
