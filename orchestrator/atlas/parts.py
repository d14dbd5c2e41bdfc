"""The Parquet parts of one table: which there are, and what is said of one that cannot be read."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from orchestrator.errors import BitatlasError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pyarrow.parquet as pq

    from orchestrator.schema import Table


def parts(directory: Path, table: Table) -> list[Path]:
    """Finished parts in the order of their names."""
    found = sorted((directory / table.name).glob("*.parquet"))
    return [part for part in found if not part.name.startswith((".", "_"))]  # those are still being written


@contextmanager
def opened(part: Path) -> Iterator[pq.ParquetFile]:
    """Open a part for reading.

    Raises:
        BitatlasError: it is no Parquet file, or cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(part) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise BitatlasError(
            f"{part} is not a readable Parquet file ({reason}); move it away and resume the sweep"
        ) from None
