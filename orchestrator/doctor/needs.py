"""Whether what a sweep reads is there: models by their headers, data by its place. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evaluators import packaged
from evaluators.corpora import CORPORA, Corpus
from evaluators.errors import EvaluationError
from evaluators.tasks import check_installed, is_packaged, subtasks_of
from orchestrator.config import ModelConfig, Sweep
from orchestrator.doctor.world import Need
from orchestrator.errors import BitatlasError
from orchestrator.models.checkpoint import check_checkpoint
from orchestrator.models.gguf_package import packaged_file
from orchestrator.models.source import CHECKPOINT_PATTERNS, PACKAGE, is_local, resolve_model
from orchestrator.reads import NOTHING_ELSE, Reads


def needs_of(sweep: Sweep, file: str, reads: Reads = NOTHING_ELSE) -> tuple[Need, ...]:
    """All that it reads, each once.

    Args:
        file: the sweep file's name, for what is wrong.
        reads: what the file makes it read besides.
    """
    if sweep.data is not None:
        return (_bundle(sweep, file, reads),)
    models = (_model(model, f"{file}: models[{index}].source") for index, model in enumerate(sweep.models))
    return (*models, *_corpora(sweep, file, reads), *_tasks(sweep, file, reads))


def _bundle(sweep: Sweep, file: str, reads: Reads) -> Need:
    """By its list and sizes; `run` verifies every byte."""
    from orchestrator.bundle.manifest import read_manifest
    from orchestrator.bundle.use import Copies, with_copies

    directory = Path(sweep.data or "")
    try:
        manifest = read_manifest(directory, f"{file}: data")
        with_copies(sweep, file, manifest, directory)
        for text in reads.texts:
            Copies(manifest, directory).corpus(text.corpus, f"{file}: {text.where}")
        for name, entry in manifest.files.items():
            path = directory / name
            if not path.exists() or path.stat().st_size != entry["size"]:
                raise BitatlasError(f"{file}: data: {path} is missing or has another size; copy the bundle again")
    except BitatlasError as error:
        return Need(what="bundle", found="not usable", trouble=str(error))
    return Need(what="bundle", found=f"{directory}: {len(manifest.files)} files, {manifest.size / 1e6:.0f} MB")


def _model(model: ModelConfig, where: str) -> Need:
    what = f"model {model.name}"
    try:
        if model.source.startswith(PACKAGE):
            return Need(what=what, found=str(packaged_file(model.source.removeprefix(PACKAGE), where)))
        if is_local(model.source):
            return Need(what=what, found=str(resolve_model(model.source, where)))
        kept = _kept(model.source)
        if kept is None:
            return Need(what=what, found=f"{model.source} is not in the local cache", is_far=True)
        check_checkpoint(kept, where)
    except BitatlasError as error:
        return Need(what=what, found="not usable", trouble=str(error))
    return Need(what=what, found=str(kept))


def _kept(source: str) -> Path | None:
    """The local copy of a Hub model; asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=CHECKPOINT_PATTERNS, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _corpora(sweep: Sweep, file: str, reads: Reads) -> Iterator[Need]:
    named = {f"{file}: calibration": item.corpus for item in sweep.calibration} | {
        f"{file}: evaluation.perplexity[{index}]": item.corpus for index, item in enumerate(sweep.evaluation.perplexity)
    }
    named |= {f"{file}: {text.where}": text.corpus for text in reads.texts}
    seen: set[Corpus] = set()
    for where, value in named.items():
        corpus = Corpus.parse(value)
        if corpus not in seen:
            seen.add(corpus)
            yield _corpus(corpus, where)


def _corpus(corpus: Corpus, where: str) -> Need:
    what = f"corpus {corpus.label}"
    if corpus.name is None:
        path = Path(corpus.path or corpus.token_ids or "")
        if path.is_file():
            return Need(what=what, found=str(path))
        return Need(what=what, found="missing", trouble=f"{where}: {path} is no file; give the path of one")
    if corpus.name in CORPORA:
        return _packaged(what, where)
    return Need(what=what, found="a published recipe, from the Hub or the local cache of data sets", is_far=True)


def _tasks(sweep: Sweep, file: str, reads: Reads) -> Iterator[Need]:
    named = {f"{file}: evaluation.tasks[{index}]": task.name for index, task in enumerate(sweep.evaluation.tasks)}
    for where, name in (named | {f"{file}: {task.where}": task.name for task in reads.tasks}).items():
        what = f"task {name}"
        try:
            for subtask in subtasks_of(name)[:1]:  # a group's tasks need the same
                check_installed(subtask)
        except EvaluationError as error:
            yield Need(what=what, found="lacks what it is made of", trouble=f"{where}: {error}")
            continue
        if is_packaged(name):
            yield _packaged(what, where)
        else:
            yield Need(what=what, found="from the Hub or the local cache of data sets", is_far=True)


def _packaged(what: str, where: str) -> Need:
    try:
        return Need(what=what, found=packaged.version())
    except EvaluationError as error:
        return Need(what=what, found="missing", trouble=f"{where}: {error}")
