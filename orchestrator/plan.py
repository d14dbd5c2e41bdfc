"""Sweep + identities -> cells and jobs in order. Pure: no Ray, no files, no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from evaluators.corpora import Corpus
from evaluators.slices import Slice
from orchestrator.config import CalibrationConfig, PerplexityConfig, Sweep, TaskConfig
from orchestrator.execution import IDENTITIES, SIMULATED
from orchestrator.scheme import FP, UNQUANTIZED_BITS, Scheme

Evaluation = PerplexityConfig | TaskConfig


@dataclass(frozen=True, kw_only=True)
class Identities:
    """Content hashes of everything a job's outcome depends on, besides its scheme.

    Args:
        models: model name -> hash of its weights, configuration and tokenizer.
        calibrations: (model name, the calibration's `key`) -> hash of the calibration tokens.
        evaluations: (model name, the evaluation's `key`) -> hash of the tokens, or of the task with its data.
        units: a sliced task's `key` -> the most slices that it can be cut into.
    """

    models: Mapping[str, str]
    calibrations: Mapping[tuple[str, str], str]
    evaluations: Mapping[tuple[str, str], str]
    units: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model x scheme x calibration.

    Args:
        id: readable and unique: `smollm2-135m.gptq-w4-g64.1a2b3c4d`.
        scheme: None for the unquantized model.
        calibration: None where the method looks at no data.
        key: content hash that names its artifact.
    """

    id: str
    model: str
    scheme: Scheme | None
    calibration: CalibrationConfig | None
    key: str

    @property
    def method(self) -> str:
        """The method's name; `fp` for the unquantized model."""
        return self.scheme.method if self.scheme else FP

    @property
    def weight_bits(self) -> int:
        """Bits per weight code; 16 for the unquantized model."""
        return self.scheme.weight_bits if self.scheme else UNQUANTIZED_BITS

    @cached_property
    def label(self) -> str:
        """`smollm2-135m gptq-w4-g64`."""
        return f"{self.model} {self.scheme.label if self.scheme else FP}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A unit of work for one worker.

    Args:
        id: content hash: the same id means the same outcome.
        evaluation: what to measure; None for quantizing.
        needs: id of the job that must be finished first.
        slice: which part of the task to measure; None for all of it.
        whole_id: of a slice: the id of the job that measures the whole task, under which its rows will stand.
        execution: how the cell's quantized linears are computed, see `execution.py`.
    """

    id: str
    kind: Literal["quantize", "evaluate"]
    cell: Cell
    evaluation: Evaluation | None = None
    needs: str | None = None
    slice: Slice | None = None
    whole_id: str | None = None
    execution: str = SIMULATED

    @property
    def whole(self) -> Job:
        """The job that measures all of the task; itself where nothing is cut."""
        return self if self.whole_id is None else replace(self, id=self.whole_id, slice=None, whole_id=None)

    @property
    def task(self) -> str:
        """`quantize`, a corpus, or a task's name."""
        return "quantize" if self.evaluation is None else task_name(self.evaluation)

    @property
    def label(self) -> str:
        """`smollm2-135m gptq-w4-g64: arc_easy`, with ` (chat no_think)` of a conversation and ` 2/3` of a slice."""
        chat = self.evaluation.chat if isinstance(self.evaluation, TaskConfig) else None
        how = "" if chat is None else f" (chat {chat})"
        return f"{self.cell.label}: {self.task}{how}" + ("" if self.slice is None else f" {self.slice}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Cells in the order of the sweep file and jobs in the order in which to start them."""

    cells: tuple[Cell, ...]
    jobs: tuple[Job, ...]


def task_name(evaluation: Evaluation) -> str:
    """How tables call it: the corpus's label or the task's name."""
    if isinstance(evaluation, TaskConfig):
        return evaluation.name
    return Corpus.parse(evaluation.corpus).label


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))  # made once: a plan hashes hundreds of thousands


def content_hash(value: Any) -> str:
    """sha256 of a JSON value with sorted keys, as hex."""
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()


def make_plan(sweep: Sweep, identities: Identities) -> Plan:
    """Expand a sweep. Equal cells (the same grid point named twice) become one.

    Order: every model's unquantized cell first (each comparison needs it), then quantizing jobs with those that
    need calibration before the quick ones, then evaluations cell by cell.
    """
    cells: dict[str, Cell] = {}
    points = [_Point(scheme) for scheme in sweep.grid]
    for model in sweep.models:
        weights = identities.models[model.name]
        key = content_hash(["fp", weights, model.dtype])
        fp = Cell(id=f"{model.name}.{FP}", model=model.name, scheme=None, calibration=None, key=key)
        cells.setdefault(key, fp)
        for point in points:
            calibrations = sweep.calibration if point.scheme.needs_calibration else (None,)
            for calibration in calibrations:
                tokens = identities.calibrations[model.name, calibration.key] if calibration else None
                cell = point.cell(model.name, weights, model.dtype, calibration, tokens)
                cells.setdefault(cell.key, cell)

    quantize = {
        cell.key: Job(id=content_hash(["quantize", cell.key])[:16], kind="quantize", cell=cell)
        for cell in cells.values()
        if cell.scheme
    }
    evaluations: list[Evaluation] = [*sweep.evaluation.perplexity, *sweep.evaluation.tasks]
    wholes: dict[str, Job] = {}
    for cell in cells.values():
        # Of fp there is nothing to execute otherwise.
        execution = sweep.evaluation.execution if cell.scheme else SIMULATED
        for evaluation in evaluations:
            measured = identities.evaluations[cell.model, evaluation.key]
            job = Job(
                id=content_hash(["evaluate", cell.key, measured, *IDENTITIES[execution]])[:16],
                kind="evaluate",
                cell=cell,
                evaluation=evaluation,
                needs=quantize[cell.key].id if cell.scheme else None,
                execution=execution,
            )
            wholes.setdefault(job.id, job)
    evaluate = [part for whole in wholes.values() for part in _cut(whole, identities.units)]
    jobs = [
        *(job for job in evaluate if job.needs is None),
        *sorted(quantize.values(), key=lambda job: job.cell.calibration is None),
        *(job for job in evaluate if job.needs is not None),
    ]
    return Plan(cells=tuple(cells.values()), jobs=tuple({job.id: job for job in jobs}.values()))


def _cut(whole: Job, units: Mapping[str, int]) -> Iterator[Job]:
    """The slices of a task, as many as are asked for and as it has units; a job that is not cut, as it is."""
    evaluation = whole.evaluation
    asked = evaluation.slices if isinstance(evaluation, TaskConfig) else 1
    count = 1 if evaluation is None or asked == 1 else min(asked, units[evaluation.key])
    if count == 1:
        yield whole
        return
    for index in range(count):
        job_id = content_hash(["slice", whole.id, index, count])[:16]
        yield replace(whole, id=job_id, slice=Slice(index, count), whole_id=whole.id)


class _Point:
    """A scheme of the grid, with what all of its cells share."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self._label, self._entry, self._code_version = scheme.label, scheme.as_entry(), scheme.code_version

    def cell(
        self, model: str, weights: str, dtype: str, calibration: CalibrationConfig | None, tokens: str | None
    ) -> Cell:
        """Its cell of one model and one calibration.

        Args:
            weights: the model's identity.
            tokens: the calibration's identity.
        """
        key = content_hash([weights, dtype, self._entry, self._code_version, tokens])
        name = f"{model}.{self._label}.{key[:8]}"
        return Cell(id=name, model=model, scheme=self.scheme, calibration=calibration, key=key)
