"""Reads the items table: per job, task and metric what each document scored, as arrays.

There may be millions of rows, so no row becomes a Python object: the columns that are needed are read batch by batch
and kept at 25 bytes a row.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from orchestrator.atlas.rows import ItemKey, ItemScores
from orchestrator.compaction import visible
from orchestrator.parts import opened
from orchestrator.schema import ITEMS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt
    import pyarrow as pa
    import pyarrow.parquet as pq

_KEY = ("model", "cell_id", "job_id", "task", "metric")
_READ = (*_KEY, "doc_id", "value", "log_likelihoods")
_ARRAYS = ("doc_id", "value", "choices", "answered")
_BATCH_ROWS = 65_536


def load_items(directory: Path) -> dict[ItemKey, ItemScores]:
    """Read the items of a sweep, whatever is there of them.

    Args:
        directory: the sweep's output directory.
    Raises:
        BitatlasError: one of the parts cannot be read.
    """
    pieces: dict[ItemKey, list[tuple[npt.NDArray[Any], ...]]] = defaultdict(list)
    for part in visible(directory / ITEMS.name):
        with opened(part) as file:
            for table in _batches(file):
                for key, arrays in _groups(table):
                    pieces[key].append(arrays)
    return {key: _joined(found) for key, found in pieces.items()}


def _batches(file: pq.ParquetFile) -> Iterator[pa.Table]:
    """The needed columns of a part, a number of rows at a time; a column that an older part lacks is null."""
    import pyarrow as pa

    types = ITEMS.arrow()
    known = [name for name in _READ if name in file.schema_arrow.names]
    for batch in file.iter_batches(_BATCH_ROWS, columns=known, use_threads=False):
        columns = {
            name: batch.column(name).cast(types.field(name).type)
            if name in known
            else pa.nulls(batch.num_rows, types.field(name).type)
            for name in _READ
        }
        yield pa.table(columns)


def _groups(table: pa.Table) -> Iterator[tuple[ItemKey, tuple[npt.NDArray[Any], ...]]]:
    """The rows of a batch by job, task and metric."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = table["log_likelihoods"].combine_chunks()
    unusable = pc.fill_null(pc.is_nan(pc.list_flatten(lists)), True).to_numpy(zero_copy_only=False)
    rows_of_unusable = pc.list_parent_indices(lists).to_numpy()[unusable]
    answered = np.bincount(rows_of_unusable, minlength=table.num_rows) == 0
    columns = {
        "doc_id": pc.fill_null(table["doc_id"], -1),
        "value": pc.fill_null(table["value"], float("nan")),
        "choices": pc.cast(pc.fill_null(pc.list_value_length(lists), 0), pa.int64()),
        "answered": pa.array(answered),
    }
    keys = {name: pc.fill_null(table[name], "") for name in _KEY}
    grouped = (
        pa.table(keys | columns)
        .group_by(list(_KEY), use_threads=False)  # threads would shuffle the rows
        .aggregate([(name, "list") for name in _ARRAYS])
    )
    key_columns = [grouped[name].to_pylist() for name in _KEY]
    for index, (model, cell_id, job_id, task, metric) in enumerate(zip(*key_columns, strict=True)):
        arrays = tuple(grouped[f"{name}_list"][index].values.to_numpy(zero_copy_only=False) for name in _ARRAYS)
        yield (model, cell_id, job_id, task, metric), arrays


def _joined(pieces: list[tuple[npt.NDArray[Any], ...]]) -> ItemScores:
    """One array per column; of a document that a resumed sweep wrote twice the last row stands."""
    import numpy as np

    doc_ids, values, choices, answered = (np.concatenate(column) for column in zip(*pieces, strict=True))
    _, from_the_end = np.unique(doc_ids[::-1], return_index=True)
    last = len(doc_ids) - 1 - from_the_end
    return ItemScores(
        doc_ids_N=doc_ids[last], values_N=values[last], choices_N=choices[last], answered_N=answered[last]
    )
