"""What a search is steered by, and what its guard is measured on: windows of tokens apart from those of calibration, or
units of a task's documents."""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from evaluators.corpora import Corpus, calibration_windows
from evaluators.errors import EvaluationError
from evaluators.harness import check_protocol, count_units, task_identity
from evaluators.slices import UNIT_DOCUMENTS
from orchestrator.errors import BitatlasError
from orchestrator.inputs import ModelInput
from orchestrator.models.loading import load_tokenizer
from orchestrator.search.config import Search
from orchestrator.search.worker import TaskUnits

if TYPE_CHECKING:
    from numpy.typing import NDArray


def task_units(search: Search, file: str) -> TaskUnits | None:
    """What of a task steers, and then what guards; None where a corpus does.

    Raises:
        BitatlasError: the task cannot be scored, or has too few documents.
    """
    settings, where = search.settings, f"{file}: search.task"
    if settings.task is None:
        return None
    name, num_fewshot = settings.task.name, settings.task.num_fewshot
    needed = settings.windows + settings.guard_windows
    try:
        check_protocol(name, num_fewshot)
        total = count_units(name, num_fewshot=num_fewshot)
    except EvaluationError as error:
        raise BitatlasError(f"{where}: {error}") from error
    if needed > total:
        raise BitatlasError(
            f"{where}: {name} has {total} units of {UNIT_DOCUMENTS} documents, fewer than search.windows + "
            f"guard_windows = {needed}; ask for less"
        )
    chosen = tuple(Random(settings.seed).sample(range(total), needed))
    return TaskUnits(
        name=name, num_fewshot=num_fewshot, units=chosen, total=total, identity=task_identity(name, num_fewshot)
    )


def search_windows(search: Search, model: ModelInput, file: str) -> NDArray[np.int64]:
    """Windows of the search, then those of the guard, int64 [windows + guard_windows, sequence_length].

    Those of several corpora take turns, so that few windows are of all of them too. Where a corpus is the
    calibration's, or none is named, they are what comes after its tokens in the same order of documents: no token is in
    both.

    Raises:
        BitatlasError: a corpus is too small, or its windows longer than the model's context.
    """
    settings, where = search.settings, f"{file}: search"
    length, count = settings.sequence_length, settings.windows + settings.guard_windows
    longest = model.shape.max_positions
    if longest is not None and length > longest:
        raise BitatlasError(
            f"{where}.sequence_length = {length} is longer than the model's context of {longest} tokens"
        )
    calibration = search.sweep.calibration[0] if search.sweep.calibration else None
    corpora = settings.corpus or ((calibration.corpus,) if calibration else ())
    tokenizer, found = load_tokenizer(model.directory, where), []
    for place, corpus in enumerate(corpora):
        needed = len(range(place, count, len(corpora)))
        seed, seen = settings.seed, 0
        if calibration is not None and corpus == calibration.corpus:
            seed = calibration.seed
            seen = math.ceil(calibration.samples * calibration.sequence_length / length)
        try:
            windows = calibration_windows(
                Corpus.parse(corpus), tokenizer, samples=seen + needed, sequence_length=length, seed=seed
            )
        except EvaluationError as error:
            beside = f" ({seen} of them for calibration)" if seen else ""
            raise BitatlasError(f"{where}: {error}{beside}") from error
        found.append(windows[seen:])
    return np.stack([found[window % len(corpora)][window // len(corpora)] for window in range(count)])
