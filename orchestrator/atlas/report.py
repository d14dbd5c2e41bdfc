"""The report of a sweep's directory: written beside its results, or printed."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.atlas.load import load
from orchestrator.atlas.tables import model_maps

if TYPE_CHECKING:
    from rich.console import Console

HTML_FILE = "atlas.html"
MARKDOWN_FILE = "atlas.md"


@dataclass(frozen=True)
class ReportPaths:
    """Where the report was written."""

    html: Path
    markdown: Path


def write_report(directory: Path) -> ReportPaths:
    """Write atlas.html and atlas.md into a sweep's directory; a reader never sees half a file.

    Raises:
        BitatlasError: the directory is no sweep, or one of its files cannot be read.
    """
    from orchestrator.atlas.markdown import render_markdown
    from orchestrator.atlas.page import render_page

    atlas = load(directory)
    maps = model_maps(atlas)
    paths = ReportPaths(html=directory / HTML_FILE, markdown=directory / MARKDOWN_FILE)
    write_atomically(paths.html, render_page(atlas, maps, made_at=datetime.now(UTC)))
    write_atomically(paths.markdown, render_markdown(atlas, maps))
    return paths


def print_report(directory: Path, console: Console) -> None:
    """Print the maps of a sweep's directory.

    Raises:
        BitatlasError: the directory is no sweep, or one of its files cannot be read.
    """
    from orchestrator.atlas.terminal import print_atlas

    atlas = load(directory)
    print_atlas(atlas, model_maps(atlas), console)


def write_atomically(path: Path, text: str) -> None:
    """Write beside and rename, so that the file is the old one or the new one and never half of either."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    beside = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner may read
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
