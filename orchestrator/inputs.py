"""Everything a sweep needs besides its file: model directories, token windows, task identities. All reading of models
and data on the driver's side happens here, before anything is written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators.corpora import Corpus, calibration_windows, evaluation_windows
from evaluators.errors import EvaluationError
from evaluators.harness import chat_of, check_protocol, count_units, task_identity
from orchestrator.config import CalibrationConfig, PerplexityConfig, Sweep, TaskConfig
from orchestrator.errors import BitatlasError
from orchestrator.execution import check_native
from orchestrator.models.checkpoint import checkpoint_digest
from orchestrator.models.loading import ModelShape, load_tokenizer, model_shape
from orchestrator.models.source import node_cache, resolve_model
from orchestrator.plan import Evaluation, Identities, content_hash

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Windows = NDArray[np.int64]

# Raise when the same tokens or items would be scored otherwise; part of every evaluation's identity.
_PERPLEXITY_VERSION = "perplexity/1"
_TASK_VERSION = "task/1"


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """A model found: where it is, which one it is, and its shape."""

    source: str
    dtype: str
    directory: Path
    digest: str
    shape: ModelShape


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What `prepare` found. Keys are (model name, the section's `key`).

    Args:
        allow_code_execution: whether programs that models wrote may be run.
    """

    models: dict[str, ModelInput]
    calibrations: dict[tuple[str, str], Windows] = field(default_factory=dict)
    windows: dict[tuple[str, str], Windows] = field(default_factory=dict)
    identities: Identities
    allow_code_execution: bool = False


def prepare(sweep: Sweep, file: str) -> Inputs:
    """Resolve models, check that every scheme fits them, and tokenize every corpus.

    Args:
        file: the sweep file's name, for errors.
    Raises:
        BitatlasError: anything that would make a job fail for want of input: one sentence with the field.
    """
    models: dict[str, ModelInput] = {}
    calibrations: dict[tuple[str, str], Windows] = {}
    windows: dict[tuple[str, str], Windows] = {}
    tokens: dict[tuple[str, str], str] = {}
    evaluations: dict[tuple[str, str], str] = {}
    units: dict[str, int] = {}
    for index, model in enumerate(sweep.models):
        where = f"{file}: models[{index}].source"
        found = _find(model.source, model.dtype, where)
        for other in (
            other for other, known in models.items() if (known.digest, known.dtype) == (found.digest, found.dtype)
        ):
            raise BitatlasError(f"{where} = {model.source!r} is the same checkpoint as model {other!r}; name it once")
        models[model.name] = found
        check_schemes(sweep, found, model.name, file)
        check_native(sweep, model.name, found.shape, file)
        tokenizer = load_tokenizer(found.directory, where)
        needed = sweep.calibration if any(scheme.needs_calibration for scheme in sweep.grid) else ()
        for number, calibration in enumerate(needed):
            place = f"{file}: calibration[{number}]" if len(sweep.calibration) > 1 else f"{file}: calibration"
            _check_length(calibration.sequence_length, found, place)
            ids = _calibration_tokens(calibration, tokenizer, place)
            calibrations[model.name, calibration.key] = ids
            tokens[model.name, calibration.key] = _digest(ids)
        for number, corpus in enumerate(sweep.evaluation.perplexity):
            place = f"{file}: evaluation.perplexity[{number}]"
            _check_length(corpus.sequence_length, found, place)
            ids = _evaluation_tokens(corpus, tokenizer, place)
            windows[model.name, corpus.key] = ids
            evaluations[model.name, corpus.key] = _perplexity_hash(corpus, ids)
        for number, task in enumerate(sweep.evaluation.tasks):
            evaluations[model.name, task.key] = _task_hash(task, tokenizer, f"{file}: evaluation.tasks[{number}]")
            if task.slices > 1 and task.key not in units:
                units[task.key] = _units(task, f"{file}: evaluation.tasks[{number}]")
    identities = Identities(
        models={name: found.digest for name, found in models.items()},
        calibrations=tokens,
        evaluations=evaluations,
        units=units,
    )
    return Inputs(
        models=models,
        calibrations=calibrations,
        windows=windows,
        identities=identities,
        allow_code_execution=sweep.evaluation.allow_code_execution,
    )


def _find(source: str, dtype: str, where: str) -> ModelInput:
    from quantizers.errors import QuantizationError

    directory = resolve_model(source, where)
    try:
        shape = model_shape(directory, dtype, where)
    except QuantizationError as error:
        raise BitatlasError(f"{where} = {source!r}: {error}") from error
    if not shape.linears:
        raise BitatlasError(f"{where} = {source!r} has no decoder blocks")
    digest = checkpoint_digest(directory, node_cache())
    return ModelInput(source=source, dtype=dtype, directory=directory, digest=digest, shape=shape)


def check_schemes(sweep: Sweep, model: ModelInput, name: str, file: str) -> None:
    """Raise unless every scheme of the grid fits every linear of a model, and the matrices over its vocabulary.

    Raises:
        BitatlasError: names the grid entry, the layer and what would fit.
    """
    from quantizers.errors import QuantizationError
    from quantizers.method import check_grids
    from quantizers.vocabulary import check_vocabulary

    for scheme in sweep.grid:
        try:
            check_grids(scheme.build(), model.shape.linears, of=f" of {name}")
            check_vocabulary(scheme.vocabulary(), model.shape.matrices, of=f" of {name}")
        except QuantizationError as error:
            raise BitatlasError(f"{file}: grid entry {scheme.label}: {error}") from error


def _check_length(sequence_length: int, model: ModelInput, where: str) -> None:
    longest = model.shape.max_positions
    if longest is not None and sequence_length > longest:
        raise BitatlasError(
            f"{where}.sequence_length = {sequence_length} is longer than the model's context of {longest} tokens"
        )


def _calibration_tokens(calibration: CalibrationConfig, tokenizer: Any, where: str) -> Windows:
    try:
        return calibration_windows(
            Corpus.parse(calibration.corpus),
            tokenizer,
            samples=calibration.samples,
            sequence_length=calibration.sequence_length,
            seed=calibration.seed,
        )
    except EvaluationError as error:
        raise BitatlasError(f"{where}: {error}") from error


def _evaluation_tokens(perplexity: PerplexityConfig, tokenizer: Any, where: str) -> Windows:
    try:
        return evaluation_windows(
            Corpus.parse(perplexity.corpus),
            tokenizer,
            sequence_length=perplexity.sequence_length,
            max_windows=perplexity.max_windows,
            cut=perplexity.cut,
        )
    except EvaluationError as error:
        raise BitatlasError(f"{where}: {error}") from error


def _perplexity_hash(perplexity: PerplexityConfig, ids: Windows) -> str:
    """What is measured and on which tokens. What was measured before there were recipes keeps its hash."""
    facts = dict(perplexity.protocol)
    if perplexity.divergence:
        facts["divergence"] = divergence_facts()
    return content_hash([_PERPLEXITY_VERSION, _digest(ids), *([facts] if facts else [])])


def divergence_facts() -> dict[str, Any]:
    """By what the divergence from the unquantized model is measured."""
    from evaluators.divergence import TOP_K, VERSION

    return {"reference": "fp", "top_k": TOP_K, "version": VERSION}


def _task_hash(task: TaskConfig, tokenizer: Any, where: str) -> str:
    try:
        check_protocol(task.name, task.num_fewshot)
        facts: list[Any] = [_TASK_VERSION, task_identity(task.name, task.num_fewshot), task.limit, task.num_fewshot]
        chat = chat_of(tokenizer, task.name, task.chat, task.thinking_tokens)
        facts += [] if chat is None else [chat.identity]
        return content_hash(facts if task.rounding == "float32" else [*facts, {"rounding": task.rounding}])
    except EvaluationError as error:
        raise BitatlasError(f"{where}: {error}") from error


def _units(task: TaskConfig, where: str) -> int:
    """The most slices that a task can be cut into."""
    try:
        return count_units(task.name, limit=task.limit, num_fewshot=task.num_fewshot)
    except EvaluationError as error:
        raise BitatlasError(f"{where}: {error}") from error


def _digest(ids: Windows) -> str:
    return hashlib.sha256(f"{ids.shape}".encode() + ids.tobytes()).hexdigest()


def evaluation_windows_of(inputs: Inputs, model: str, evaluation: Evaluation) -> Windows | None:
    """The token windows of a perplexity evaluation; None for a task, whose data the worker reads itself."""
    return inputs.windows.get((model, evaluation.key))
