"""`bundle.json`: what was gathered, and size and sha256 of every file of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import BitatlasError
from orchestrator.models.checkpoint import file_digest

MANIFEST = "bundle.json"
_FORMAT = "bitatlas-bundle/1"
_REMEDY = "copy the bundle again with its links (rsync -a, cp -a or tar), or fetch it again"
# Left by whoever reads or fills a cache; no part of what was gathered.
_PASSING = (".lock", ".incomplete", ".tmp")
_NOTES = ".no_exist"  # empty files that say what a repository lacks


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle holds.

    Args:
        models: Hub id -> commit.
        data: tasks and corpora, as the sweep names them -> the data that was read for them.
        local: a path as the sweep file names it -> where its copy is, relative to the bundle.
        files: path relative to the bundle -> its `size` and `sha256`; of a link, those of what it leads to.
    """

    models: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    local: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, int | str]] = field(default_factory=dict)

    def with_gathered(self, other: Manifest) -> Manifest:
        """Both together, without files; the other one's entries win."""
        return Manifest(models=self.models | other.models, data=self.data | other.data, local=self.local | other.local)

    @property
    def size(self) -> int:
        """Bytes of all files; what several links lead to counts once."""
        return sum({str(entry["sha256"]): int(entry["size"]) for entry in self.files.values()}.values())


def write_manifest(directory: Path, gathered: Manifest, progress: Callable[[int, int], None]) -> Manifest:
    """List and write what a bundle holds, last of all: a directory without it is no bundle yet.

    Args:
        directory: the bundle.
        gathered: what is in it, without files.
        progress: told of files done and their number.
    """
    paths = list(_files(directory))
    digests: dict[Path, str] = {}  # a snapshot's links lead to blobs that are listed too
    files: dict[str, dict[str, int | str]] = {}
    for done, path in enumerate(paths, start=1):
        whole = path.resolve()
        if whole not in digests:
            with whole.open("rb") as stream:
                digests[whole] = hashlib.file_digest(stream, "sha256").hexdigest()
        files[path.relative_to(directory).as_posix()] = {"size": whole.stat().st_size, "sha256": digests[whole]}
        progress(done, len(paths))
    manifest = dataclasses.replace(gathered, files=files)
    scratch = directory / f".{MANIFEST}.tmp"
    scratch.write_text(json.dumps({"format": _FORMAT} | dataclasses.asdict(manifest), indent=1), encoding="utf-8")
    scratch.replace(directory / MANIFEST)
    return manifest


def _files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        passing = path.name.endswith(_PASSING) or _NOTES in path.parts
        if path.is_file() and path.name != MANIFEST and not passing:
            yield path


def read_manifest(directory: Path, where: str) -> Manifest:
    """The manifest of a bundle.

    Args:
        directory: the bundle.
        where: the field to name in errors, such as "sweep.yaml: data".
    Raises:
        BitatlasError: there is none, or it cannot be read.
    """
    subject = f"{where} = '{directory}'"
    try:
        document = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if document.pop("format") != _FORMAT:
            raise ValueError("another format")
        return Manifest(**document)
    except FileNotFoundError as error:
        raise BitatlasError(
            f"{subject} holds no {MANIFEST}: give a directory that `bitatlas fetch` filled, to its end"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BitatlasError(f"{subject}: {MANIFEST} is damaged; {_REMEDY}") from error


def verify(directory: Path, manifest: Manifest, where: str, cache: Path) -> None:
    """Raise unless every file of a bundle is there as it was gathered.

    Args:
        directory: the bundle.
        manifest: what it should hold.
        where: the field to name in errors.
        cache: remembers digests by path, size and modification time, so that a file is read once per machine.
    Raises:
        BitatlasError: names the first file that is missing or another one.
    """
    for name, expected in manifest.files.items():
        path = directory / name
        subject = f"{where} = '{directory}': {name}"
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                raise BitatlasError(f"{subject} has {size} bytes instead of {expected['size']}; {_REMEDY}")
            if file_digest(path, cache) != expected["sha256"]:
                raise BitatlasError(f"{subject} has another content than was gathered; {_REMEDY}")
        except OSError as error:
            raise BitatlasError(f"{subject} is missing ({error.strerror}); {_REMEDY}") from error
