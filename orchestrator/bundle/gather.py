"""Filling a bundle: the models, data sets and local files of a sweep that do not come with installed packages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from evaluators.corpora import Corpus
from evaluators.errors import EvaluationError
from evaluators.recipes import RECIPES
from orchestrator.bundle.environment import caches_in, enter
from orchestrator.bundle.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from orchestrator.config import Sweep
from orchestrator.errors import BitatlasError
from orchestrator.models.source import CHECKPOINT_PATTERNS, PACKAGE, is_local, resolve_model
from orchestrator.reads import NOTHING_ELSE, Reads

FILES = "files"
_OURS = {"hub", "datasets", FILES, MANIFEST, f".{MANIFEST}.tmp"}


@dataclass(frozen=True, kw_only=True)
class Need:
    """One thing to gather.

    Args:
        label: how to call it: `model org/name`.
        get: gathers it and says what it is.
    """

    label: str
    get: Callable[[], Manifest]


def fetch(sweep: Sweep, file: str, directory: Path, console: Console, reads: Reads = NOTHING_ELSE) -> Manifest:
    """Gather everything a sweep needs; what an earlier call gathered is kept, and an interrupted one is gone on with.

    Args:
        sweep: the sweep.
        file: its file's name, for errors.
        directory: the bundle; other sweeps' may be in it already.
        console: is told what is being fetched.
        reads: what the file makes it read besides.
    Raises:
        BitatlasError: the directory holds something else, or something cannot be had: one sentence with the field.
    """
    directory = directory.absolute()
    _check_directory(directory)
    enter(caches_in(directory))
    gathered = Manifest()
    if (directory / MANIFEST).exists():
        gathered = gathered.with_gathered(read_manifest(directory, "--to"))
    wanted = list({need.label: need for need in _needs(sweep, file, directory, reads)}.values())
    directory.mkdir(parents=True, exist_ok=True)
    for number, need in enumerate(wanted, start=1):
        console.print(f"{number}/{len(wanted)} {need.label}", highlight=False, soft_wrap=True)
        gathered = gathered.with_gathered(need.get())
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("checksums", total=None)
        return write_manifest(directory, gathered, lambda done, total: bar.update(task, completed=done, total=total))


def _check_directory(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or {path.name for path in directory.iterdir()} - _OURS):
        raise BitatlasError(f"--to {directory} exists and holds something else than a bundle; choose another --to")


def _needs(sweep: Sweep, file: str, directory: Path, reads: Reads = NOTHING_ELSE) -> Iterator[Need]:
    """What is missing is noticed soonest with local files first, and models, the largest, last."""
    hub_models = []
    for index, model in enumerate(sweep.models):
        where = f"{file}: models[{index}].source"
        if model.source.startswith(PACKAGE):
            continue
        if is_local(model.source):
            yield _local(model.source, where, directory)
        else:
            hub_models.append(_model(model.source, where))
    places = [
        *((f"evaluation.perplexity[{n}]", item.corpus, False) for n, item in enumerate(sweep.evaluation.perplexity)),
        *((f"calibration[{n}]", item.corpus, True) for n, item in enumerate(sweep.calibration)),
        *((text.where, text.corpus, True) for text in reads.texts),
    ]
    for field, value, is_calibration in places:
        corpus, where = Corpus.parse(value), f"{file}: {field}"
        if (path := corpus.path or corpus.token_ids) is not None:
            yield _local(path, where, directory)
        elif corpus.name in RECIPES:
            yield _recipe(corpus.name, where, is_calibration=is_calibration)
    for number, task in enumerate(sweep.evaluation.tasks):
        yield _task(task.name, task.num_fewshot, f"{file}: evaluation.tasks[{number}]")
    for steering in reads.tasks:
        yield _task(steering.name, steering.num_fewshot, f"{file}: {steering.where}")
    yield from hub_models


def _model(source: str, where: str) -> Need:
    def get() -> Manifest:
        return Manifest(
            models={source: resolve_model(source, where).name}
        )  # a snapshot's folder is named by the commit

    return Need(label=f"model {source}", get=get)


def _recipe(name: str, where: str, *, is_calibration: bool) -> Need:
    text = RECIPES[name].calibration if is_calibration else RECIPES[name].evaluation

    def get() -> Manifest:
        from evaluators.hub import identity_of

        return Manifest(data={text.label: _told(where, lambda: identity_of(text, text.load()))})

    return Need(label=f"data set {text.label}", get=get)


def _task(name: str, num_fewshot: int | None, where: str) -> Need:
    def get() -> Manifest:
        from evaluators.harness import fetch_data

        found = "; ".join(_told(where, lambda: fetch_data(name, num_fewshot)))
        return Manifest(data={name: found} if found else {})

    return Need(label=f"task {name}" + (f" with {num_fewshot} examples" if num_fewshot else ""), get=get)


def _told(where: str, get: Callable[[], Any]) -> Any:
    try:
        return get()
    except EvaluationError as error:
        raise BitatlasError(f"{where}: {error}") from error


def _local(source: str, where: str, directory: Path) -> Need:
    """A copy of a file, or of a checkpoint's weights and texts, under the name it has."""
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (RuntimeError, OSError):  # nobody's home; a name too long
        exists = False
    if not exists:
        raise BitatlasError(f"{where} = {source!r} does not exist; give a path, or the Hub id of a model")

    def get() -> Manifest:
        kept = _copy_of(source, path, directory)
        if path.is_dir():
            resolve_model(source, where)  # refuses what is no checkpoint
            for pattern in CHECKPOINT_PATTERNS:
                for part in sorted(path.glob(pattern)):
                    _copy(part, kept / part.name)
        else:
            _copy(path, kept)
        return Manifest(local={source: kept.relative_to(directory).as_posix()})

    return Need(label=f"copy of {source}", get=get)


def _copy_of(source: str, path: Path, directory: Path) -> Path:
    """Its place in the bundle: a folder of its own per path, so that files of one name do not meet."""
    import hashlib

    folder = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    return directory / FILES / folder / path.resolve().name


def _copy(path: Path, to: Path) -> None:
    status = path.stat()
    if to.exists() and (to.stat().st_size, to.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns):
        return  # by an earlier call
    to.parent.mkdir(parents=True, exist_ok=True)
    scratch = to.with_name(f".{to.name}.tmp")
    try:
        shutil.copy2(path, scratch)
        scratch.replace(to)
    except OSError as error:
        raise BitatlasError(
            f"{path} cannot be copied to {to} ({error.strerror}); mend the disk and fetch again"
        ) from error
