"""Prompts as conversations: the tokenizer's own chat template, and how to ask it for a thinking mode.

Modes are a convention of each family's template, so they are known by what the template contains and refused by name
where it is none of these. Source: the templates and model cards of openPangu-Embedded-7B V1.1 and of Qwen3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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


_NONE = Mode(thinks=False)
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
    Convention(name="without thinking modes", modes={"default": _NONE}),
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
        mode: as it was asked for.
        convention: the name of the template's family.
        thinks: whether the model may think before it answers.
        thought: the tokens around a thought; None where models of this family do not think.
        dropped_system: whether the template refused system messages, so that some were left out.
    """

    def __init__(self, tokenizer: Any, mode: str) -> None:
        """Take a tokenizer with a chat template.

        Args:
            tokenizer: of transformers, or with its `get_chat_template`, `apply_chat_template` and
                `convert_tokens_to_ids`.
            mode: one of `CHAT_MODES`.

        Raises:
            EvaluationError: no template, a mode that it does not have, or no single tokens around a thought.
        """
        convention = _convention(tokenizer)
        if mode not in convention.modes:
            raise EvaluationError(
                f"chat: {mode} is no mode of this model: its chat template is of the kind {convention.name!r}, which "
                f"knows {', '.join(convention.modes)}: set chat to one of these"
            )
        self.mode = mode
        self.convention = convention.name
        self.thinks = convention.modes[mode].thinks
        self.thought = None if convention.marks is None else Thought(**_ids(tokenizer, *convention.marks))
        self.dropped_system = False
        self._mode = convention.modes[mode]
        self._tokenizer = tokenizer

    def identity(self, thinking_tokens: int) -> dict[str, Any]:
        """What conversations depend on besides task and tokenizer's vocabulary, for a job's content hash."""
        template = hashlib.sha256(str(self._tokenizer.get_chat_template()).encode()).hexdigest()
        return {"chat": self.mode, "template": template, "version": VERSION} | (
            {"thinking_tokens": thinking_tokens} if self.thinks else {}
        )

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: with `role` and `content`.
            add_generation_prompt: end where the assistant's turn begins; else within the last message.

        Raises:
            EvaluationError: the template refuses the conversation.
        """
        import jinja2

        turns = self._with_suffix(messages)
        try:
            return self._rendered(turns, add_generation_prompt)
        except jinja2.TemplateError as error:
            spoken = [turn for turn in turns if turn["role"] != "system"]
            if len(spoken) == len(turns):
                raise EvaluationError(f"the model's chat template refuses the conversation: {error}") from error
            self.dropped_system = True  # as lm-eval's own models do; rows say so
            return self._rendered(spoken, add_generation_prompt)

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
        for index in range(len(turns) - 1, -1, -1):
            if self._mode.suffix and turns[index]["role"] == "user":
                turns[index] = {**turns[index], "content": turns[index]["content"] + self._mode.suffix}
                break
        return turns


def check_chat(tokenizer: Any, mode: str, *, scores_choices: bool) -> Chat:
    """What `Chat` makes, where it can be used for a task.

    Args:
        tokenizer: the model's.
        mode: one of `CHAT_MODES`.
        scores_choices: whether the task scores log-likelihoods of choices.

    Raises:
        EvaluationError: as `Chat`, or choices would be scored where a thought comes first.
    """
    chat = Chat(tokenizer, mode)
    if scores_choices and chat.thinks:
        modes = _convention(tokenizer).modes
        without = [name for name, other in modes.items() if not other.thinks]
        remedy = f"set chat to {' or '.join(without)}" if without else "leave chat out"
        raise EvaluationError(
            f"chat: {mode} lets the model think before it answers, and choices are scored without a thought: {remedy}"
        )
    return chat


def chat_facts(chat: Chat, thinking_tokens: int) -> dict[str, Any]:
    """What rows say of conversations.

    Args:
        chat: with what it has rendered.
        thinking_tokens: for a thought, on top of the task's own limit; 0 where none comes.
    """
    facts: dict[str, Any] = {"chat": chat.mode}
    if chat.thought is not None:
        facts["chat_template"] = chat.convention
    if chat.thinks:
        facts["thinking_tokens"] = thinking_tokens
    if chat.dropped_system:
        facts["system_messages"] = "left out"
    return facts


def _convention(tokenizer: Any) -> Convention:
    try:
        template = tokenizer.get_chat_template()
    except (AttributeError, ValueError):
        raise EvaluationError(
            "chat needs a chat template and the model's tokenizer has none: leave chat out, or add the template to the "
            "checkpoint (chat_template.jinja)"
        ) from None
    return next(found for found in CONVENTIONS if all(piece in template for piece in found.reads))


def _ids(tokenizer: Any, opens: str, closes: str) -> dict[str, int]:
    vocabulary = tokenizer.get_vocab()
    missing = [mark for mark in (opens, closes) if mark not in vocabulary]
    if missing:
        raise EvaluationError(
            f"the chat template marks thoughts by {' and '.join(missing)}, which are no single tokens of the model: "
            "leave chat out, or repair the tokenizer"
        )
    return {"opens": int(vocabulary[opens]), "closes": int(vocabulary[closes])}
