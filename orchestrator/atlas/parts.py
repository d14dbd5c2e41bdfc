"""The Parquet parts of one table, as the store's own readers see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.compaction import visible
from orchestrator.parts import opened, steadily

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.schema import Table

__all__ = ["opened", "parts", "steadily"]


def parts(directory: Path, table: Table) -> list[Path]:
    """Finished parts in the order of their names, without those that others supersede.

    Raises:
        DamagedPartError, FileNotFoundError: as `orchestrator.parts.opened`.
    """
    return visible(directory / table.name)
