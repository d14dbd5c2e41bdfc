"""A sweep's inputs from configurations alone, to plan by before weights and data are there. Nothing large is read.

What it cannot know it takes from tables: how many tokens a corpus has, which fields a published model's config.json
has. A plan made of it tells cells, jobs, sizes and time; it cannot tell what is done already.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators.corpora import Corpus
from evaluators.recipes import RECIPES
from orchestrator.config import CalibrationConfig, PerplexityConfig, Sweep
from orchestrator.errors import BitatlasError
from orchestrator.execution import check_native
from orchestrator.inputs import Inputs, ModelInput, check_schemes
from orchestrator.models.checkpoint import read_config
from orchestrator.models.loading import configuration, shape_of
from orchestrator.models.published import PUBLISHED
from orchestrator.models.source import is_local
from orchestrator.plan import Identities, content_hash
from orchestrator.work import task_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Windows = NDArray[np.int64]

# Tokens of the text that perplexity is measured on, by vocabularies of 50,000 to 150,000 pieces; rough.
_TOKENS = {
    "wikitext2": 290_000,
    "ptb": 100_000,
    "ptb-new": 110_000,
    "lambada": 400_000,
    "boolq-passages": 370_000,
    "squad-contexts": 140_000,
    "coqa-stories": 170_000,
    "drop-passages": 110_000,
}
_BYTES_PER_TOKEN = 4


def outline(sweep: Sweep, file: str) -> Inputs:
    """What `prepare` finds, as far as configurations tell.

    Args:
        file: the sweep file's name, for errors.
    Raises:
        BitatlasError: a model's configuration is not at hand, or a scheme does not fit a model.
    """
    models: dict[str, ModelInput] = {}
    calibrations: dict[tuple[str, str], Windows] = {}
    windows: dict[tuple[str, str], Windows] = {}
    tokens: dict[tuple[str, str], str] = {}
    evaluations: dict[tuple[str, str], str] = {}
    units: dict[str, int] = {}
    for index, model in enumerate(sweep.models):
        found = _find(model.source, model.dtype, f"{file}: models[{index}].source")
        models[model.name] = found
        check_schemes(sweep, found, model.name, file)
        check_native(sweep, model.name, found.shape, file)
        for calibration in sweep.calibration:
            calibrations[model.name, calibration.key] = _windows(calibration.samples, calibration)
            tokens[model.name, calibration.key] = content_hash(calibration.key)
        for corpus in sweep.evaluation.perplexity:
            windows[model.name, corpus.key] = _windows(_num_windows(corpus), corpus)
            evaluations[model.name, corpus.key] = content_hash(corpus.key)
        for task in sweep.evaluation.tasks:
            evaluations[model.name, task.key] = content_hash(task.key)
            units[task.key] = task_size(task.name).documents
    identities = Identities(
        models={name: found.digest for name, found in models.items()},
        calibrations=tokens,
        evaluations=evaluations,
        units=units,
    )
    return Inputs(models=models, calibrations=calibrations, windows=windows, identities=identities)


def _find(source: str, dtype: str, where: str) -> ModelInput:
    config = _configuration(source, where)
    shape = shape_of(configuration(config, f"{where} = {source!r}"), dtype, f"{where} = {source!r}")
    return ModelInput(
        source=source, dtype=dtype, directory=Path(source), digest=content_hash([source, config]), shape=shape
    )


def _configuration(source: str, where: str) -> dict[str, Any]:
    """A model's config.json: of its directory, of the table, or the Hub's (that file alone)."""
    if is_local(source) and Path(source).is_dir():
        return read_config(Path(source), where)
    name = source.rstrip("/").rpartition("/")[2]
    if name in PUBLISHED:
        return dict(PUBLISHED[name])
    if is_local(source):
        raise BitatlasError(
            f"{where} = {source!r} is not here, and no published model of that name is known; an outline needs its "
            "config.json there"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return read_config(Path(hf_hub_download(source, "config.json")).parent, where)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BitatlasError(
            f"{where} = {source!r}: its config.json could not be had from the Hub "
            f"({str(error).strip().splitlines()[0]}); give a directory that holds it"
        ) from error


def _num_windows(corpus: PerplexityConfig) -> int:
    """How many windows a perplexity has: as many as are asked for, and no more than there are."""
    parsed = Corpus.parse(corpus.corpus)
    if parsed.token_ids is not None:
        import numpy as np

        try:
            return len(np.load(parsed.token_ids, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise BitatlasError(f"corpus {parsed.label} cannot be read ({error})") from error
    if parsed.path is not None:
        path = Path(parsed.path)
        size = path.stat().st_size if path.exists() else 0
        most = max(1, size // _BYTES_PER_TOKEN // corpus.sequence_length)
    else:
        recipe = RECIPES.get(str(parsed.name))
        drawn = None if recipe is None else recipe.max_windows
        most = drawn or max(1, _TOKENS[str(parsed.name)] // corpus.sequence_length)
    return most if corpus.max_windows is None else min(most, corpus.max_windows)


def _windows(count: int, section: PerplexityConfig | CalibrationConfig) -> Windows:
    """So many windows, for their shape alone: they take no memory."""
    import numpy as np

    return np.broadcast_to(np.int64(0), (count, section.sequence_length))
