"""The sweep file: strict YAML in, a frozen `Sweep` out. Every complaint names the file and the field."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Hashable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from evaluators.chat import ChatMode
from evaluators.corpora import Corpus, cut_of, protocol
from evaluators.errors import EvaluationError
from evaluators.recipes import Cut
from evaluators.suites import read_suite
from evaluators.tasks import check_permission, check_task, generates
from orchestrator.errors import BitatlasError
from orchestrator.scheme import Scheme, parse_scheme

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]


def _corpus(value: Any) -> Any:
    try:
        Corpus.parse(value)
    except EvaluationError as error:
        raise PydanticCustomError("told", "{message}", {"message": str(error)}) from error
    return value


def _task(value: Any) -> Any:
    try:
        check_task(value if isinstance(value, str) else repr(value))
    except EvaluationError as error:
        raise PydanticCustomError("told", "{message}", {"message": str(error)}) from error
    return value


# A registered corpus, a published recipe, {path: ..., field: ...} or {token_ids: ...}.
CorpusField = Annotated[str | dict[str, str], BeforeValidator(_corpus)]
TaskName = Annotated[str, BeforeValidator(_task)]


def nearest(word: str, known: Iterator[str] | list[str]) -> str:
    """`; did you mean 'x'?` for the known word most like this one, or nothing."""
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


class Strict(BaseModel):
    """A section of a file: unknown keys are refused, lists are tuples, nothing is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_key",
                        "unknown key {key}{hint}; the keys here are {known}",
                        {
                            "key": repr(key),
                            "hint": nearest(str(key), list(cls.model_fields)).rstrip("?"),
                            "known": ", ".join(cls.model_fields),
                        },
                    )
            return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        return value

    @cached_property
    def key(self) -> str:
        """Canonical JSON: equal sections have equal keys."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)


class ModelConfig(Strict):
    """One model: a name for tables and a source for weights."""

    name: Name
    source: str = Field(min_length=1)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


class CalibrationConfig(Strict):
    """Which tokens calibrate: `samples` windows of `sequence_length` tokens, drawn by `seed`."""

    corpus: CorpusField
    samples: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=2048, ge=2)
    seed: int = Field(default=0, ge=0)


class PerplexityConfig(Strict):
    """Perplexity on the first `max_windows` windows of a corpus (None: all); `joiner` None is the corpus's own."""

    corpus: CorpusField
    sequence_length: int = Field(default=2048, ge=2)
    max_windows: int | None = Field(default=None, ge=1)
    bos: Literal["once", "per_window", "never"] = "once"
    joiner: str | None = None
    tail: Literal["drop", "keep"] = "drop"
    divergence: bool = False

    @model_validator(mode="after")
    def _cuts(self) -> PerplexityConfig:
        try:
            _ = self.cut
        except EvaluationError as error:
            raise PydanticCustomError("told", "{message}", {"message": str(error)}) from error
        return self

    @property
    def cut(self) -> Cut:
        """How the corpus is cut into windows."""
        return cut_of(Corpus.parse(self.corpus), bos=self.bos, joiner=self.joiner, tail=self.tail)

    @property
    def protocol(self) -> dict[str, Any]:
        """What rows say of the windows besides their length and number; a plain corpus cut by default says nothing."""
        return protocol(Corpus.parse(self.corpus), self.cut)


class TaskConfig(Strict):
    """An lm-eval task; `limit` items (None: all), `num_fewshot` shots (None: the task's own), cut into `slices`.

    With `chat`, prompts are conversations by the model's chat template, in that thinking mode; a thought may take
    `thinking_tokens` (None: 2048) on top of what the task allows for an answer.
    `rounding: hflm` computes choices as lm-eval's HFLM does, with its rounding in 16 bits.
    Slices change who scores what, and no row: identities leave them out.
    """

    name: TaskName
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    chat: ChatMode | None = None
    thinking_tokens: int | None = Field(default=None, ge=1)
    rounding: Literal["float32", "hflm"] = "float32"
    slices: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _thinks_in_conversations(self) -> TaskConfig:
        if self.thinking_tokens is not None and self.chat is None:
            raise PydanticCustomError("told", "thinking_tokens is given without chat; name the thinking mode with it")
        return self

    @model_validator(mode="after")
    def _rounds_what_it_scores(self) -> TaskConfig:
        if self.rounding != "float32" and generates(self.name):
            reason = "rounding: hflm is of tasks that score choices; this one writes texts, so leave it out"
            raise PydanticCustomError("told", reason)
        return self


class EvaluationConfig(Strict):
    """What every cell is measured on; a suite is read as the tasks that it stands for."""

    perplexity: tuple[PerplexityConfig, ...] = ()
    suite: None = Field(default=None, exclude=True)  # a known key of the file; see `_expanded`
    tasks: tuple[TaskConfig, ...] = ()
    execution: Literal["simulated", "native"] = "simulated"
    allow_code_execution: bool = False

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("suite") is None:
            return value
        try:
            suite = read_suite(value["suite"])
        except EvaluationError as error:
            raise PydanticCustomError("told", "{message}", {"message": f"suite: {error}"}) from error
        own = value.get("tasks") or []
        if not isinstance(own, list | tuple):  # refused with its own words
            return {key: item for key, item in value.items() if key != "suite"}
        named = [task.get("name") for task in own if isinstance(task, Mapping)]
        tasks = [*(task.entry for task in suite if task.name not in named), *own]
        return {key: item for key, item in value.items() if key != "suite"} | {"tasks": tuple(tasks)}

    @model_validator(mode="after")
    def _permitted(self) -> EvaluationConfig:
        for index, task in enumerate(self.tasks):
            try:
                check_permission(task.name, allow_code_execution=self.allow_code_execution)
            except EvaluationError as error:
                raise PydanticCustomError("told", "{message}", {"message": f"tasks[{index}]: {error}"}) from error
        return self

    @model_validator(mode="after")
    def _something(self) -> EvaluationConfig:
        if not self.perplexity and not self.tasks:
            raise PydanticCustomError("empty", "names neither perplexity corpora nor tasks; give at least one")
        return self


class WorkersConfig(Strict):
    """Who works: one worker per device; on CPU one core and `threads` torch threads each."""

    device: Literal["auto", "cpu", "cuda", "npu", "simulated-npu"] = "auto"
    count: int | Literal["auto"] = "auto"
    threads: int = Field(default=1, ge=1)
    per_device: int = Field(default=1, ge=1, le=16)  # workers that share an accelerator, each with its share of memory
    strict: bool = True  # on NPUs: an operator that they lack fails, and does not run on the CPU
    stuck_minutes: float = Field(default=60.0, gt=0)  # without progress, after which a worker is ended

    @field_validator("count")
    @classmethod
    def _positive(cls, count: int | str) -> int | str:
        if isinstance(count, int) and count < 1:
            raise PydanticCustomError("count", "must be at least 1, or auto")
        return count


def _as_tuple(value: Any) -> Any:
    return value if isinstance(value, tuple) else (value,)


class Sweep(Strict):
    """A whole sweep file, lists expanded: the unquantized cell of every model is always run beside `grid`."""

    name: Name
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    grid: tuple[Scheme, ...] = Field(min_length=1)
    calibration: Annotated[tuple[CalibrationConfig, ...], BeforeValidator(_as_tuple)] = ()
    evaluation: EvaluationConfig
    workers: WorkersConfig = WorkersConfig()
    data: str | None = Field(default=None, min_length=1)  # the directory of a bundle

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        seen: set[str] = set()
        for index, model in enumerate(self.models):
            if model.name in seen:
                raise PydanticCustomError(
                    "duplicate", f"models[{index}].name = {model.name!r} is used twice; give each model its own name"
                )
            seen.add(model.name)
        if not self.calibration:
            for scheme in self.grid:
                if scheme.needs_calibration:
                    raise PydanticCustomError(
                        "calibration",
                        f"calibration is missing and {scheme.method} needs data; add a calibration section",
                    )
        return self


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, which plain YAML lets win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`: what it brings may be overridden
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is no text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file; `data` becomes an absolute path.

    Raises:
        BitatlasError: absent, not YAML, or not a valid sweep: one sentence with the file and the field.
    """
    return with_absolute_data(parse_sweep(read_yaml(path, "a sweep file"), str(path)), path)


def with_absolute_data(sweep: Sweep, path: Path) -> Sweep:
    """The sweep of a file: its bundle travels with the file, so that its place is relative to that."""
    if sweep.data is None:
        return sweep
    return sweep.model_copy(update={"data": str((path.parent / sweep.data).resolve())})


def read_yaml(path: Path, kind: str) -> Any:
    """What a YAML file holds; a key that is given twice is refused.

    Args:
        kind: what it should have been, for complaints: "a sweep file".
    Raises:
        BitatlasError: absent, unreadable, or not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BitatlasError(f"{path} does not exist; give the path of {kind}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BitatlasError(f"{path} cannot be read as text: {error}") from error
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BitatlasError(f"{path}: not valid YAML{place}: {getattr(error, 'problem', None) or error}") from error
    except ValueError as error:  # a date or a tagged number that is none
        raise BitatlasError(f"{path}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise BitatlasError(f"{path}: not valid YAML: nested too deeply") from error


def parse_sweep(document: Any, file: str) -> Sweep:
    """Check a sweep document.

    Args:
        document: what the YAML holds.
        file: the name to put before every complaint.
    Raises:
        BitatlasError: names the field and the rule.
    """
    if document is None:
        raise BitatlasError(f"{file} is empty; a sweep needs name, models, grid and evaluation")
    if not isinstance(document, dict):
        raise BitatlasError(
            f"{file} holds a {type(document).__name__}, not a mapping of name, models, grid and evaluation"
        )
    if "search" in document:
        raise BitatlasError(f"{file} is a search file (it has a section search); run it with `bitatlas search`")
    document = dict(document)
    if isinstance(document.get("grid"), list):
        document["grid"] = [
            scheme for index, entry in enumerate(document["grid"]) for scheme in expand(entry, index, file)
        ]
    try:
        return Sweep.model_validate(document)
    except ValidationError as error:
        raise BitatlasError(f"{file}: {describe(error)}") from error


def expand(entry: Any, index: int, file: str) -> list[Scheme]:
    """One grid entry -> its schemes: the product of every field that is a list, options included, in written order.

    Raises:
        BitatlasError: not a mapping, an empty list, or a value that its method refuses.
    """
    where = f"{file}: grid[{index}]"
    if not isinstance(entry, dict):
        raise BitatlasError(f"{where} is {entry!r}; a grid entry is a mapping such as {{method: rtn, weight_bits: 4}}")
    axes: list[tuple[tuple[str, ...], list[Any]]] = []
    for key, value in entry.items():
        if key == "options" and isinstance(value, dict):
            axes += [(("options", name), _axis(option, f"{where}.options.{name}")) for name, option in value.items()]
        else:
            axes.append(((key,), _axis(value, f"{where}.{key}")))
    schemes = []
    for values in itertools.product(*(axis for _, axis in axes)):
        fields: dict[str, Any] = {}
        for (path, _), value in zip(axes, values, strict=True):
            if len(path) == 1:
                fields[path[0]] = value
            else:
                fields.setdefault("options", {})[path[1]] = value
        schemes.append(parse_scheme(fields, where))
    return schemes


def _axis(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    if not value:
        raise BitatlasError(f"{where} is an empty list; give at least one value")
    return value


def describe(error: ValidationError) -> str:
    """The first complaint of a validation as one line: field, value and rule."""
    first = error.errors(include_url=False)[0]
    path = ""
    for part in first["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in {"int", "str", "tuple", "dict", "literal"}:
            path += f".{part}" if path else part
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    message = message.replace("input should be", "must be").replace("a valid tuple", "a list").replace("tuple", "list")
    if first["type"] == "too_short":
        return f"{path} is empty; give at least one"
    if first["type"] in {"model_type", "dataclass_type"}:
        return f"{path} = {first['input']!r}: must be a mapping of its fields"
    if first["type"] == "missing":
        return f"{path} is missing"
    if first["type"] in {"unknown_key", "duplicate", "calibration", "empty", "told"}:
        return f"{path}: {message}" if path else message
    value = list(first["input"]) if isinstance(first["input"], tuple) else first["input"]
    return f"{path} = {value!r}: {message}"


def resolved(sweep: Sweep) -> str:
    """The sweep as YAML with every default written out; reading it again gives the same plan."""
    document = sweep.model_dump(mode="json")
    document["grid"] = [scheme.as_entry() for scheme in sweep.grid]
    if sweep.data is None:
        del document["data"]
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the same text, several times faster
    text: str = yaml.dump(document, Dumper=dumper, sort_keys=False, width=120)
    return text
