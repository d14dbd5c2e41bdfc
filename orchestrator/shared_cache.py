"""What sweeps share in a directory (`bitatlas run --cache DIR`): artifacts, and outcomes of evaluations, by content.

```
DIR/artifacts/KEY/           as a sweep's output has them, and the sha256 of the manifest
DIR/outcomes/JOB.DEVICE.json what an evaluation gave on a kind of device, with its own sha256
DIR/statistics/, references/ as a node's cache has them (`shared_statistics.py`, `fp_reference.py`)
DIR/set_aside/               what was damaged
```

Several sweeps may use it at once: everything is written beside its place and renamed, and who comes second leaves what
is there. What cannot be read as it was written is set aside and told, and the work is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.artifacts import MANIFEST, Artifact, find_artifact, set_aside, sha256_of
from orchestrator.errors import BitatlasError, DamagedFileError
from orchestrator.facts import without_facts

_MANIFEST_DIGEST = f"{MANIFEST}.sha256"
_FORMAT = "bitatlas-outcome/1"  # raised where an outcome of before would be read wrongly; such ones count for nothing


def usable_cache(directory: Path, out: Path) -> Path:
    """The directory that `--cache` names, made where it is not there, as an absolute path.

    Args:
        out: the sweep's output directory.
    Raises:
        BitatlasError: it cannot be written, or lies in the sweep's output.
    """
    if directory.resolve().is_relative_to(out.resolve()):
        raise BitatlasError(
            f"--cache {directory} lies in the sweep's output {out}, which is one sweep's own; give a directory outside"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        why = "it is a file" if directory.is_file() else error.strerror or error
        raise BitatlasError(
            f"--cache {directory} cannot be written ({why}); give a directory that can, or leave --cache out"
        ) from error
    return directory.resolve()


class SharedCache:
    """One process's hold on such a directory."""

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        """Nothing is read or written yet.

        Args:
            warn: takes what was damaged, and what could not be written: the sweep goes on without it.
        """
        self.statistics, self.references = root / "statistics", root / "references"
        self._artifacts, self._outcomes, self._aside = root / "artifacts", root / "outcomes", root / "set_aside"
        self._warn = warn

    def take_artifact(self, directory: Path, **facts: Any) -> Artifact | None:
        """The artifact of this name, linked (else copied) to `directory`; None where there is none, or a damaged one.

        Args:
            directory: where a sweep wants it; its name is the key.
            facts: what the manifest is to say instead: another sweep may call the cell and the model otherwise.
        Raises:
            BitatlasError: another version of Bitatlas wrote it.
        """
        cached = self._artifacts / directory.name
        if not cached.exists():
            return None
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            artifact = _checked(cached)
            for file, digest in artifact.manifest["files"].items():
                _link(cached / file, scratch / file)
                if sha256_of(scratch / file) != digest:  # of what was taken: a copy may go wrong too
                    raise DamagedFileError(f"{cached / file} was changed after it was written")
            (scratch / MANIFEST).write_text(json.dumps(artifact.manifest | facts, indent=1), encoding="utf-8")
            scratch.chmod(0o755)
            with contextlib.suppress(OSError):  # another worker was first: the same key, the same content
                scratch.rename(directory)
        except (DamagedFileError, FileNotFoundError) as error:
            if cached.exists():  # else another sweep has set it aside just now
                set_aside(cached)
                self._warn(f"{error}; set aside in {self._aside}, and quantized again")
            return None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return find_artifact(directory)

    def put_artifact(self, artifact: Artifact) -> None:
        """Keep an artifact for other sweeps, unless one of its name is there."""
        cached = self._artifacts / artifact.directory.name
        if cached.exists():
            return
        try:
            self._artifacts.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{cached.name}.", dir=self._artifacts))
            try:
                for file in (MANIFEST, *artifact.manifest["files"]):
                    _link(artifact.directory / file, scratch / file)
                (scratch / _MANIFEST_DIGEST).write_text(sha256_of(scratch / MANIFEST), encoding="ascii")
                scratch.chmod(0o755)
                scratch.rename(cached)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            if not cached.exists():  # else another worker was first
                self._warn(f"{cached} cannot be written ({error.strerror or error}); other sweeps will quantize again")

    def outcome(self, job_id: str, device: str) -> dict[str, Any] | None:
        """What an evaluation gave; None where it is not known.

        Args:
            device: the kind of device; another one rounds otherwise.
        """
        file = self._file(job_id, device)
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["format"] != _FORMAT:
                return None
            outcome: dict[str, Any] = kept["outcome"]
            if kept["sha256"] != hashlib.sha256(_canonical(outcome).encode()).hexdigest():
                raise ValueError("it is not what was written")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            aside = self._aside / "outcomes"
            aside.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another sweep was first
                file.rename(Path(tempfile.mkdtemp(prefix=f"{job_id}.", dir=aside)) / file.name)
            self._warn(f"{file} is damaged ({error}); set aside in {self._aside}, and measured again")
            return None
        return outcome

    def put_outcome(self, job_id: str, device: str, outcome: Mapping[str, Any]) -> None:
        """Keep what an evaluation gave, unless it is there."""
        file = self._file(job_id, device)
        text = _canonical(without_facts(outcome))
        digest = hashlib.sha256(text.encode()).hexdigest()
        try:
            self._outcomes.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(prefix=f".{job_id}.", dir=self._outcomes)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as stream:
                    stream.write(f'{{"format": "{_FORMAT}", "sha256": "{digest}", "outcome": {text}}}\n')
                    stream.flush()
                    os.fsync(stream.fileno())
                Path(scratch).chmod(0o644)
                Path(scratch).replace(file)  # over one that is there: the same id, the same values
            finally:
                Path(scratch).unlink(missing_ok=True)
        except OSError as error:
            self._warn(f"{file} cannot be written ({error.strerror or error}); other sweeps will measure it again")

    def _file(self, job_id: str, device: str) -> Path:
        return self._outcomes / f"{job_id}.{device}.json"


def _checked(directory: Path) -> Artifact:
    """An artifact whose manifest is as it was written."""
    told = (directory / _MANIFEST_DIGEST).read_text(encoding="ascii", errors="replace")
    if told != sha256_of(directory / MANIFEST):
        raise DamagedFileError(f"{directory / MANIFEST} was changed after it was written")
    artifact = find_artifact(directory)
    if artifact is None:
        raise DamagedFileError(f"{directory / MANIFEST} is gone")
    return artifact


def _link(source: Path, to: Path) -> None:
    """The same file under another name; a copy where there is another disk, or one without hard links."""
    try:
        to.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, to)


def _canonical(outcome: Mapping[str, Any]) -> str:
    """JSON that keeps every bit of its floats, those that are not finite too."""
    return json.dumps(outcome, sort_keys=True)
