"""Writing a cluster's deployment files: whole or not at all, and never over what a person changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cluster.description import parse_description
from cluster.rendering import render
from orchestrator.config import read_yaml
from orchestrator.errors import BitatlasError

MARKER = "rendered.json"
_BY = "bitatlas cluster render"


def render_cluster(file: Path, to: Path) -> tuple[str, ...]:
    """Render a description into a directory.

    Args:
        file: the description.
        to: absent, empty, or an earlier rendering that nobody changed; then it holds the new files and no old one.
    Returns:
        The files written, relative to `to`; the first is where to begin.
    Raises:
        BitatlasError, ClusterError: a bad description, or a directory that holds something else. Nothing is written.
    """
    files = render(parse_description(read_yaml(file, "a cluster description"), str(file)))
    try:
        _check(to)
    except OSError as error:
        raise BitatlasError(f"--to {to} cannot be read ({error.strerror or error})") from error
    _write(files, to.resolve() if to.is_symlink() else to)
    return tuple(files)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check(to: Path) -> None:
    """Refuse a directory with anything in it that a rendering did not write."""
    if not to.exists():
        return
    if not to.is_dir():
        raise BitatlasError(f"--to {to} is a file; give a directory")
    found = {path.relative_to(to).as_posix() for path in to.rglob("*") if not path.is_dir() or path.is_symlink()}
    if not found:
        return
    try:
        marker = json.loads((to / MARKER).read_text(encoding="utf-8"))
        written = dict(marker["files"]) if marker["by"] == _BY else None
    except (OSError, ValueError, TypeError, KeyError):
        written = None
    if written is None:
        raise BitatlasError(f"--to {to} holds something else than a rendering; give a new or empty directory")
    for name in sorted(found - {MARKER}):
        if name not in written:
            raise BitatlasError(
                f"--to {to} holds {name}, which no rendering wrote; move it away, or choose another --to"
            )
        if _digest((to / name).read_bytes()) != written[name]:
            raise BitatlasError(
                f"{to / name} was changed since it was rendered; put the change into the description and remove the "
                "file, or choose another --to"
            )


def _write(files: Mapping[str, str], to: Path) -> None:
    """Write beside and rename; an earlier rendering steps aside, and comes back where that fails."""
    marker = {"by": _BY, "files": {name: _digest(text.encode()) for name, text in files.items()}}
    scratch = None
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
        new, old = scratch / "new", scratch / "old"
        for name, text in {**files, MARKER: json.dumps(marker, indent=1) + "\n"}.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        if to.exists():
            to.rename(old)
        try:
            new.rename(to)
        except OSError:
            if old.exists():
                old.rename(to)
            raise
    except OSError as error:
        raise BitatlasError(f"cannot write {to} ({error.strerror or error})") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
