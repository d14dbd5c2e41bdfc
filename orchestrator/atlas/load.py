"""Reads a sweep's directory: the sweep file and the Parquet parts.

Only this file, `load_items` and `load_search` read files.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator.atlas.assemble import assemble
from orchestrator.atlas.load_items import load_items
from orchestrator.atlas.load_search import load_search
from orchestrator.compaction import visible
from orchestrator.errors import BitatlasError
from orchestrator.parts import opened, steadily
from orchestrator.schema import EVENTS, LAYERS, RESULTS, Table

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.atlas.rows import Atlas

SWEEP_FILE = "sweep.yaml"


def load(directory: Path) -> Atlas:
    """Read a sweep that has ended, is running, or has only just begun.

    Args:
        directory: the sweep's output directory, the one that holds sweep.yaml.
    Raises:
        BitatlasError: the directory is no sweep, or one of its files cannot be read.
    """
    config = _read_sweep_file(directory)
    results, layers, events = (steadily(partial(_read_table, directory, table)) for table in (RESULTS, LAYERS, EVENTS))
    items = steadily(partial(load_items, directory))
    atlas = assemble(config, results, layers, events, items, default_name=directory.resolve().name)
    return replace(atlas, search=load_search(directory))


def _read_sweep_file(directory: Path) -> dict[str, Any]:
    import yaml

    path = directory / SWEEP_FILE
    if not path.is_file():
        raise BitatlasError(
            f"{directory} is not a sweep: it has no {SWEEP_FILE}; "
            "give the directory that `bitatlas run` wrote, such as outputs/demo"
        )
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise BitatlasError(f"{path} is not readable YAML ({reason}); restore it or run the sweep again") from None
    if not isinstance(config, dict):
        raise BitatlasError(f"{path} must hold a mapping such as `name: demo`; restore it or run the sweep again")
    return config


def _read_table(directory: Path, table: Table) -> list[dict[str, Any]]:
    """Rows of all parts in the order of their names; a column that an older part lacks is null."""
    rows: list[dict[str, Any]] = []
    for part in visible(directory / table.name):
        with opened(part) as file:
            known = [name for name in table.columns if name in file.schema_arrow.names]
            rows.extend(file.read(columns=known).to_pylist())
    return rows
