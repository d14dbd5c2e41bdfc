"""The sweep's memory: Parquet parts. One driver writes; anyone may read at any time.

Rows are committed in batches. Each table's part of a batch is written beside and renamed; the part in `events/` comes
last and makes the batch count. What a killed driver left without that part is removed by the next one, so a job is
either finished with all its rows, or not at all.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout
from orchestrator.schema import EVENTS, TABLES, Table

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Mapping[str, list[dict[str, Any]]]


class Store:
    """The writing side. Use as a context manager: it holds the directory's lock."""

    def __init__(self, layout: Layout) -> None:
        """Name the directory; nothing is touched yet."""
        self._layout = layout
        self._lock = FileLock(layout.lock)
        self._batch = 0
        self.session = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"

    def __enter__(self) -> Store:
        """Make the directories, take the lock, and remove what an interrupted batch left.

        Raises:
            BitatlasError: another driver is at work here, or the disk refuses.
        """
        try:
            self._layout.root.mkdir(parents=True, exist_ok=True)
            for name in TABLES:
                self._layout.table(name).mkdir(exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise BitatlasError(
                f"{self._layout.root} is being written by another bitatlas run; wait for it, or choose another --out"
            ) from error
        except OSError as error:
            raise _disk_error(self._layout.root, error) from error
        self._remove_uncommitted()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self._lock.release()

    def commit(self, rows: Rows) -> None:
        """Write one batch; all of it counts once this returns, none of it before.

        Args:
            rows: table name -> rows. At least one event, which is what makes the batch count.
        Raises:
            BitatlasError: the disk is full or read-only; the store stays readable.
        """
        if not rows.get(EVENTS.name):
            raise AssertionError("a batch without an event would never count")
        name = f"{self.session}-{self._batch:06d}.parquet"
        self._batch += 1
        for table in sorted(TABLES.values(), key=lambda table: table is EVENTS):  # events last
            if rows.get(table.name):
                self._write(table, name, rows[table.name])

    def _write(self, table: Table, name: str, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        for row in rows:
            unknown = set(row) - set(table.columns)
            if unknown:
                raise AssertionError(f"{table.name} has no column {sorted(unknown)}")
        self._write_table(self._layout.table(table.name) / name, pa.Table.from_pylist(rows, schema=table.arrow()))

    def _write_table(self, path: Path, content: pa.Table) -> None:
        import pyarrow.parquet as pq

        scratch = path.with_name(f".{path.name}.tmp")
        try:
            with scratch.open("wb") as stream:
                pq.write_table(content, stream, compression="zstd")
                stream.flush()
                os.fsync(stream.fileno())
            scratch.replace(path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise _disk_error(path.parent, error) from error

    def _remove_uncommitted(self) -> None:
        committed = {path.name for path in self._layout.table(EVENTS.name).glob("*.parquet")}
        for name in TABLES:
            table = self._layout.table(name)
            for path in (*table.glob("*.parquet"), *table.glob(".*.tmp")):
                if path.name not in committed:
                    path.unlink(missing_ok=True)

    def forget(self, job_ids: Iterable[str], tables: Collection[Table] | None = None) -> None:
        """Drop the rows of jobs that are about to be tried again; their events stay.

        Args:
            job_ids: whose rows.
            tables: to look into; None is all that hold rows of jobs.

        Raises:
            BitatlasError: the disk is full or read-only.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        forgotten = pa.array(sorted(set(job_ids)), pa.string())
        if not len(forgotten):
            return
        for table in tables or [table for table in TABLES.values() if table is not EVENTS]:
            for path in sorted(self._layout.table(table.name).glob("*.parquet")):
                ids = pq.read_table(path, columns=["job_id"])["job_id"]
                keep = pc.invert(pc.is_in(ids, forgotten))
                if pc.all(keep).as_py():
                    continue
                rest = pq.read_table(path).filter(keep)
                if rest.num_rows:
                    self._write_table(path, rest)
                else:
                    path.unlink()


def read_table(directory: Path, table: Table, columns: list[str] | None = None) -> pa.Table:
    """All rows of one table, also while a driver writes; empty where nothing is there yet.

    Args:
        directory: the sweep's output directory.
        table: which.
        columns: to read; None is all.
    """
    import pyarrow.dataset as ds

    parts = sorted(str(path) for path in Layout(directory).table(table.name).glob("*.parquet"))
    for _ in range(3):
        try:
            return ds.dataset(parts, schema=table.arrow(), format="parquet").to_table(columns)
        except FileNotFoundError:  # the driver dropped a part between our listing and our reading
            time.sleep(0.05)
            parts = sorted(str(path) for path in Layout(directory).table(table.name).glob("*.parquet"))
    return ds.dataset(parts, schema=table.arrow(), format="parquet").to_table(columns)


def job_states(directory: Path) -> dict[str, str]:
    """Job id -> `finished` (itself, or in slices) or `failed`, whichever came last; jobs with neither are left out."""
    import pyarrow.compute as pc

    events = read_table(directory, EVENTS)
    ended = events.filter(pc.field("event").isin(["finished", "reused", "merged", "failed"])).sort_by("at")
    return {
        job_id: "failed" if event == "failed" else "finished"
        for job_id, event in zip(ended["job_id"].to_pylist(), ended["event"].to_pylist(), strict=True)
    }


def events_of(directory: Path) -> list[dict[str, Any]]:
    """All events in the order in which they happened."""
    return sorted(read_table(directory, EVENTS).to_pylist(), key=lambda event: event["at"])


def _disk_error(directory: Path, error: OSError) -> BitatlasError:
    return BitatlasError(
        f"cannot write to {directory} ({error.strerror or error}); what is done is kept and readable: "
        "mend the disk and run the same command again"
    )
