"""Running from a bundle: verified, then nothing else is read, here or in workers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.bundle.environment import enter, offline_in
from orchestrator.bundle.manifest import Manifest, read_manifest, verify
from orchestrator.config import Sweep
from orchestrator.errors import BitatlasError
from orchestrator.models.source import PACKAGE, node_cache

Variables = Mapping[str, str]


def use_bundle(sweep: Sweep, file: str) -> tuple[Sweep, Variables]:
    """Enter a sweep's bundle, if it has one, before anything that reads the Hub's variables is imported.

    Args:
        sweep: as it was read.
        file: its file's name, for errors.
    Returns:
        The sweep with local paths replaced by those of their copies, and the variables that workers need.
    Raises:
        BitatlasError: a file of the bundle is missing or damaged, or the sweep names what is not in it.
    """
    if sweep.data is None:
        return sweep, {}
    directory, where = Path(sweep.data), f"{file}: data"
    manifest = read_manifest(directory, where)
    verify(directory, manifest, where, node_cache())
    variables = offline_in(directory)
    enter(variables)
    return with_copies(sweep, file, manifest, directory), variables


def with_copies(sweep: Sweep, file: str, manifest: Manifest, directory: Path) -> Sweep:
    """The sweep with every local path replaced by that of its copy.

    Raises:
        BitatlasError: a model or file that the bundle does not hold.
    """
    copies = Copies(manifest, directory)
    models = [
        model
        if model.source.startswith(PACKAGE) or model.source in manifest.models
        else model.model_copy(update={"source": copies.path(model.source, f"{file}: models[{index}].source")})
        for index, model in enumerate(sweep.models)
    ]
    perplexity = [
        item.model_copy(update={"corpus": copies.corpus(item.corpus, f"{file}: evaluation.perplexity[{index}].corpus")})
        for index, item in enumerate(sweep.evaluation.perplexity)
    ]
    calibration = [
        item.model_copy(update={"corpus": copies.corpus(item.corpus, f"{file}: calibration[{index}].corpus")})
        for index, item in enumerate(sweep.calibration)
    ]
    evaluation = sweep.evaluation.model_copy(update={"perplexity": tuple(perplexity)})
    return sweep.model_copy(
        update={"models": tuple(models), "evaluation": evaluation, "calibration": tuple(calibration)}
    )


class Copies:
    """Where a bundle keeps what a file names by path."""

    def __init__(self, manifest: Manifest, directory: Path) -> None:
        """Look at nothing yet."""
        self._manifest, self._directory = manifest, directory

    def path(self, source: str, where: str) -> str:
        """Of a file or a directory.

        Args:
            where: the field, for errors.
        Raises:
            BitatlasError: the bundle does not hold it.
        """
        if source in self._manifest.local:
            return str(self._directory / self._manifest.local[source])
        if Path(source).is_relative_to(self._directory):  # a resolved sweep file, read again
            return source
        raise BitatlasError(
            f"{where} = {source!r} is not in the bundle {self._directory}; fetch this sweep into it with "
            "`bitatlas fetch`"
        )

    def corpus(self, value: str | dict[str, str], where: str) -> Any:
        """A corpus as a file names it, with the paths of copies."""
        if isinstance(value, str):
            return value
        return {key: item if key == "field" else self.path(item, f"{where}.{key}") for key, item in value.items()}
