"""The search file: a sweep file with a section `search`. Every complaint names the file and the field."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from evaluators.tasks import generates
from orchestrator.config import (
    CorpusField,
    Strict,
    Sweep,
    TaskName,
    describe,
    expand,
    parse_sweep,
    read_yaml,
    with_absolute_data,
)
from orchestrator.errors import BitatlasError
from orchestrator.reads import Reads, Task, Text
from orchestrator.scheme import UNQUANTIZED_BITS, VOCABULARY_FIELDS, Scheme, own_grid, parse_scheme

if TYPE_CHECKING:
    from quantizers.grid import Grid

SamplerName = Literal["level-switch", "tpe", "gp", "random"]
FrontSamplerName = Literal["nsga2", "tpe", "random"]
Corpora = Annotated[
    tuple[CorpusField, ...], BeforeValidator(lambda value: (value,) if isinstance(value, (str, dict)) else value)
]
"""One corpus or several."""
ObjectiveName = Literal["kl_divergence", "perplexity", "task"]


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


class StageConfig(Strict):
    """One stage of a generation: `survivors` go on after `windows` windows."""

    windows: int = Field(ge=1)
    survivors: int = Field(ge=1)


class SensitivityConfig(Strict):
    """Each choice of each group alone, with all else float (`fp`) or at the largest uniform choice that fits."""

    bases: tuple[Literal["fp", "uniform"], ...] = Field(default=("fp",), min_length=1)
    windows: int = Field(default=2, ge=1)
    rounds: int = Field(default=1, ge=0)  # of level-switch: steps from the best start measured, and solved again


class MatrixConfig(Strict):
    """The choices of the embedding or the head: each of these bits (16 leaves it alone) with each of these groups."""

    weight_bits: Annotated[tuple[Any, ...], BeforeValidator(_listed)] = Field(min_length=1)
    group_size: Annotated[tuple[Any, ...], BeforeValidator(_listed)] | None = Field(default=None, min_length=1)


Matrix = Annotated[
    MatrixConfig,
    BeforeValidator(lambda value: {"weight_bits": value} if isinstance(value, (int, list, tuple)) else value),
]
"""Bits alone, or bits and groups."""


class FrontConfig(Strict):
    """The whole front of bytes against loss by a multi-objective sampler; `cells` of it are evaluated in full."""

    sampler: FrontSamplerName = "nsga2"
    evaluations: int = Field(default=200, ge=2)
    cells: int = Field(default=3, ge=1)


class ObjectiveTask(Strict):
    """A task of choices whose documents steer, in place of a corpus."""

    name: TaskName
    num_fewshot: int | None = Field(default=None, ge=0)

    @field_validator("name")
    @classmethod
    def _of_choices(cls, name: str) -> str:
        if generates(name):
            raise PydanticCustomError(
                "told", "the answers to {task} are texts, which have no loss; name a task of choices", {"task": name}
            )
        return name


class SearchConfig(Strict):
    """What is searched, by what, on which tokens, and for how long.

    Budgets are stored bits per weight of the decoder's linears, scales and zeros included, or bytes of the checkpoint;
    where embedding or head are searched too, bytes alone.
    Counts of evaluations are of allocations on all `windows`: one that is measured on some of them counts in part.
    """

    bank: dict[str, Any]
    pinned: dict[str, Any] = Field(default_factory=dict)
    embedding: Matrix | None = None
    head: Matrix | None = None
    budgets: tuple[float | dict[str, int], ...] = ()
    front: FrontConfig | None = None
    objective: ObjectiveName = "kl_divergence"
    task: ObjectiveTask | None = None
    corpus: Corpora = ()
    sequence_length: int = Field(default=512, ge=2)
    windows: int = Field(default=16, ge=1)
    guard_windows: int = Field(default=8, ge=1)
    sampler: SamplerName = "level-switch"
    evaluations: int = Field(default=100, ge=1)
    offspring: int = Field(default=16, ge=1)
    stages: tuple[StageConfig, ...] = ()
    patience: int = Field(default=10, ge=1)
    sensitivity: SensitivityConfig = SensitivityConfig()
    starts: bool = True  # without them a sampler is on its own, to compare with
    evaluate_starts: bool = False  # knapsacks as cells too, likewise
    seed: int = Field(default=0, ge=0)

    @field_validator("budgets")
    @classmethod
    def _numbers(cls, budgets: tuple[Any, ...]) -> tuple[Any, ...]:
        for budget in budgets:
            if isinstance(budget, dict):
                if list(budget) != ["checkpoint_bytes"] or budget["checkpoint_bytes"] < 1:
                    raise PydanticCustomError("told", "a budget is a number of bits, or {checkpoint_bytes: N}")
            elif not 0 < budget <= 16:
                raise PydanticCustomError("told", "bits per weight must be above 0 and at most 16")
        return budgets

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if not self.budgets and self.front is None:
            raise PydanticCustomError("told", "search names neither budgets nor front; give at least one")
        stages = self.all_stages
        windows, survivors = [one.windows for one in stages], [self.offspring, *(one.survivors for one in stages)]
        if windows != sorted(set(windows)) or windows[-1] != self.windows:
            raise PydanticCustomError(
                "told", f"stages must have rising windows, the last one all {self.windows} (search.windows)"
            )
        if survivors != sorted(survivors, reverse=True):
            raise PydanticCustomError("told", f"stages must have falling survivors, of {self.offspring} offspring")
        for role in VOCABULARY_FIELDS:
            if getattr(self, role) is not None and not all(isinstance(budget, dict) for budget in self.budgets):
                raise PydanticCustomError(
                    "told",
                    "search.{role} has choices, and budgets in bits are of the decoder's linears alone; give "
                    "{{checkpoint_bytes: N}}",
                    {"role": role},
                )
        if not self.starts and self.sampler == "level-switch":
            raise PydanticCustomError("told", "search.starts = false: level-switch begins with a start; leave it true")
        if self.sensitivity.windows > self.windows:
            raise PydanticCustomError("told", f"sensitivity.windows is more than the {self.windows} search.windows")
        return self

    @model_validator(mode="after")
    def _steered_by_one_text(self) -> SearchConfig:
        if (self.objective == "task") != (self.task is not None):
            raise PydanticCustomError(
                "told", "search.objective = task and search.task belong together; give both or none"
            )
        if self.task is not None and self.model_fields_set & {"corpus", "sequence_length"}:
            raise PydanticCustomError(
                "told",
                "search.corpus and search.sequence_length are of token windows; with objective = task leave both out",
            )
        return self

    @property
    def objective_name(self) -> str:
        """`kl_divergence`, `perplexity` or `task arc_easy`."""
        return self.objective if self.task is None else f"task {self.task.name}"

    @property
    def all_stages(self) -> tuple[StageConfig, ...]:
        """The stages, or a quarter of the windows for all and all windows for a quarter of the offspring."""
        if self.stages:
            return self.stages
        few = max(1, self.windows // 8)
        last = StageConfig(windows=self.windows, survivors=1)
        if few == self.windows:
            return (last,)
        return (StageConfig(windows=few, survivors=max(1, self.offspring // 8)), last)


@dataclass(frozen=True, kw_only=True)
class Search:
    """A whole search file.

    Args:
        sweep: what the found allocations end in, with the uniform cells of `grid`.
        bank: one scheme per choice, as the bank's sweep quantizes them.
        schemes: the same as cells would have them; `bank` differs where a method can look at float inputs.
        pinned: pattern of linears -> their one scheme, likewise of the bank; None leaves them alone.
        matrices: "embedding" and "head", where they are searched -> the grids to choose among; None leaves it alone.
    """

    sweep: Sweep
    settings: SearchConfig
    bank: tuple[Scheme, ...]
    schemes: tuple[Scheme, ...]
    pinned: Mapping[str, Scheme | None]
    matrices: Mapping[str, tuple[Grid | None, ...]]

    @property
    def model(self) -> str:
        """The model's name."""
        return self.sweep.models[0].name

    @property
    def reads(self) -> Reads:
        """What steers it."""
        task = self.settings.task
        return Reads(
            texts=tuple(
                Text(where=f"search.corpus[{index}]", corpus=corpus)
                for index, corpus in enumerate(self.settings.corpus)
            ),
            tasks=() if task is None else (Task(where="search.task", name=task.name, num_fewshot=task.num_fewshot),),
        )

    def bank_sweep(self) -> Sweep:
        """The sweep that makes the bank: every choice as a uniform cell."""
        pinned = [scheme for scheme in self.pinned.values() if scheme is not None]
        grid = tuple(dict.fromkeys([*self.bank, *pinned]))
        return self.sweep.model_copy(update={"name": f"{self.sweep.name}-bank"[:80], "grid": grid})


def read_search(path: Path) -> Search:
    """Read and check a search file.

    Raises:
        BitatlasError: absent, not YAML, or not a valid search: one sentence with the file and the field.
    """
    document = read_yaml(path, "a search file")
    search = parse_search(document, str(path))
    return replace(search, sweep=with_absolute_data(search.sweep, path))


def parse_search(document: Any, file: str) -> Search:
    """Check a search document.

    Args:
        document: what the YAML holds.
        file: the name to put before every complaint.
    Raises:
        BitatlasError: names the field and the rule.
    """
    if not isinstance(document, dict):
        kind = "empty" if document is None else f"a {type(document).__name__}, not a mapping"
        raise BitatlasError(f"{file} is {kind}; a search needs name, models, evaluation and search")
    if "search" not in document:
        hint = "; `bitatlas run` runs a sweep file" if "grid" in document else ""
        raise BitatlasError(f"{file}: search is missing: a section that names a bank and budgets{hint}")
    try:
        settings = SearchConfig.model_validate(document["search"])
    except ValidationError as error:
        raise BitatlasError(f"{file}: {_within(describe(error))}") from error
    schemes = _choices(settings.bank, f"{file}: search.bank", file)
    rest = {key: value for key, value in document.items() if key != "search"}
    uniform = [scheme.as_entry() for scheme in schemes]
    sweep = parse_sweep({**rest, "grid": rest.get("grid") or uniform}, file)
    if "grid" not in rest:
        sweep = sweep.model_copy(update={"grid": ()})
    if len(sweep.models) != 1:
        raise BitatlasError(f"{file}: models names {len(sweep.models)} models; a search is of one")
    if len(sweep.calibration) > 1:
        raise BitatlasError(f"{file}: calibration names {len(sweep.calibration)} recipes; a search has one")
    if not settings.corpus and settings.task is None and not sweep.calibration:
        raise BitatlasError(
            f"{file}: search.corpus is missing, and there is no calibration whose corpus could be read on"
        )
    if sweep.evaluation.execution != "simulated":
        raise BitatlasError(f"{file}: evaluation.execution = {sweep.evaluation.execution!r}: a search is simulated")
    pinned = {
        pattern: _pinned(schemes[0], value, f"{file}: search.pinned[{pattern!r}]")
        for pattern, value in settings.pinned.items()
    }
    return Search(
        sweep=sweep,
        settings=settings,
        bank=tuple(_bank_scheme(scheme) for scheme in schemes),
        schemes=schemes,
        pinned=pinned,
        matrices={
            role: _grids(schemes[0], role, getattr(settings, role), f"{file}: search.{role}")
            for role in VOCABULARY_FIELDS
            if getattr(settings, role) is not None
        },
    )


def _within(told: str) -> str:
    if told.startswith("search"):
        return told
    return f"search: {told}" if told.startswith("unknown key") else f"search.{told}"


def _choices(bank: Mapping[str, Any], where: str, file: str) -> tuple[Scheme, ...]:
    from quantizers.method import Method
    from quantizers.uniform_weight import UniformWeight

    if "layers" in bank:
        raise BitatlasError(f"{where}.layers: linears get their bits by the search; use pinned for those that are set")
    for role in VOCABULARY_FIELDS:
        if role in bank:
            raise BitatlasError(f"{where}.{role}: the {role} is no linear of the bank; its choices are search.{role}")
    try:
        schemes = expand(dict(bank), 0, file)
    except BitatlasError as error:
        raise BitatlasError(str(error).replace(f"{file}: grid[0]", where)) from error
    first, method = schemes[0], schemes[0].build()
    for scheme in schemes:
        if replace(scheme, weight_bits=first.weight_bits, group_size=first.group_size) != first:
            raise BitatlasError(f"{where}: choices differ in weight_bits and group_size alone; {scheme.label} does not")
    if first.activation_bits != 16:
        raise BitatlasError(f"{where}.activation_bits: a search is of weights; leave activations alone")
    alone = type(method).transform is Method.transform or method.only_rescales
    if not alone or method.encoding != UniformWeight.encoding:
        raise BitatlasError(
            f"{where}.method = {first.method!r}: its variants cannot stand beside each other, or take bytes that only "
            "the weights tell; use gptq, gptaq, awq or rtn"
        )
    return tuple(schemes)


def _bank_scheme(scheme: Scheme) -> Scheme:
    """The scheme with float inputs, where its method has the choice and the file says nothing.

    A variant that was made behind other variants makes up for their errors, and would stand among others.
    """
    from orchestrator.scheme import option_defaults
    from quantizers.methods import method_class

    options = json.loads(scheme.options)
    if "path" not in option_defaults(method_class(scheme.method)) or not scheme.build().needs.calibration:
        return scheme
    return replace(scheme, options=json.dumps(options | {"path": "float"}, sort_keys=True))


def _grids(scheme: Scheme, role: str, asked: MatrixConfig, where: str) -> tuple[Grid | None, ...]:
    """The grids of a matrix's choices, of the bank's convention."""
    found: dict[Grid | None, None] = {}
    for bits, group_size in itertools.product(asked.weight_bits, asked.group_size or (scheme.group_size or None,)):
        own = {"weight_bits": bits, "group_size": group_size or "per_channel"}
        try:
            one = parse_scheme(scheme.as_entry() | {role: bits if bits == UNQUANTIZED_BITS else own}, "")
        except BitatlasError as error:
            raise BitatlasError(f"{where}{str(error).removeprefix(f'.{role}')}") from error
        found[one.vocabulary().get(role)] = None
    return tuple(found)


def _pinned(scheme: Scheme, value: Any, where: str) -> Scheme | None:
    """The bank's scheme that a pinned group gets: bits, or weight_bits and group_size; None leaves it alone."""
    own = own_grid(value, scheme.as_entry(), where)
    if own is None:
        return None
    bits, group_size = own
    entry = scheme.as_entry() | {"weight_bits": bits, "group_size": group_size or "per_channel"}
    return _bank_scheme(parse_scheme(entry, where))
