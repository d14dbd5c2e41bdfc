"""The tokens of a search: windows that it is steered by and windows of its guard, apart from those of calibration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evaluators.corpora import Corpus, calibration_windows
from evaluators.errors import EvaluationError
from orchestrator.errors import BitatlasError
from orchestrator.inputs import ModelInput
from orchestrator.models.loading import load_tokenizer
from orchestrator.search.config import Search

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def search_windows(search: Search, model: ModelInput, file: str) -> NDArray[np.int64]:
    """Windows of the search, then those of the guard, int64 [windows + guard_windows, sequence_length].

    Where the corpus is the calibration's, or none is named, they are what comes after its tokens in the same order of
    documents: no token is in both.

    Raises:
        BitatlasError: the corpus is too small, or its windows longer than the model's context.
    """
    settings, where = search.settings, f"{file}: search"
    length, count = settings.sequence_length, settings.windows + settings.guard_windows
    longest = model.shape.max_positions
    if longest is not None and length > longest:
        raise BitatlasError(
            f"{where}.sequence_length = {length} is longer than the model's context of {longest} tokens"
        )
    calibration = search.sweep.calibration[0] if search.sweep.calibration else None
    corpus, seed, seen = settings.corpus, settings.seed, 0
    if calibration is not None and corpus in (None, calibration.corpus):
        corpus, seed = calibration.corpus, calibration.seed
        seen = math.ceil(calibration.samples * calibration.sequence_length / length)
    if corpus is None:
        raise AssertionError("the file was checked for a corpus")
    try:
        windows = calibration_windows(
            Corpus.parse(corpus),
            load_tokenizer(model.directory, where),
            samples=seen + count,
            sequence_length=length,
            seed=seed,
        )
    except EvaluationError as error:
        beside = f" ({seen} of them for calibration)" if seen else ""
        raise BitatlasError(f"{where}: {error}{beside}") from error
    return windows[seen:]
