"""The sweep's memory: Parquet parts. One driver writes; anyone may read at any time.

Rows are committed in batches. Each table's part of a batch is written beside and renamed; the part in `events/` comes
last and makes the batch count. What a killed driver left without that part is removed by the next one, so a job is
either finished with all its rows, or not at all. Damaged parts are set aside when the store is opened (`damage.py`);
many parts become few while a run goes on and when it is done (`compaction.py`).
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from orchestrator import compaction
from orchestrator.clock import MonotoneClock
from orchestrator.compaction import SUPERSEDES, part_names, visible
from orchestrator.damage import concerned, damaged_parts, move_aside, rebuilt_events
from orchestrator.errors import BitatlasError
from orchestrator.history import History, read_history
from orchestrator.layout import Layout
from orchestrator.parts import (
    Check,
    DamagedPartError,
    job_ids_of,
    metadata_of,
    read_part,
    steadily,
    stream_part,
    write_part,
)
from orchestrator.schema import EVENTS, RESULTS, TABLES, Table

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Mapping[str, list[dict[str, Any]]]

_STAMP = "%Y%m%dT%H%M%S"


class Store:
    """The writing side. Use as a context manager: it holds the directory's lock.

    Attributes:
        session: begins every name of this session's parts; later sessions' sort after earlier ones'.
        history: what the events said when the store was opened.
        warnings: one line for each part that was set aside.
    """

    history: History

    def __init__(self, layout: Layout) -> None:
        """Name the directory; nothing is touched yet."""
        self._layout = layout
        self._lock = FileLock(layout.lock)
        self._batch = 0
        self._clock = MonotoneClock()
        self.session = self._session_at(self.now())
        self.warnings: list[str] = []
        self._small: list[str] = []  # batches that were not put together yet, in order

    def __enter__(self) -> Store:
        """Make the directories, take the lock, and bring the parts in order: what an interrupted batch left is removed,
        what an interrupted compaction left is undone or done, damaged parts are set aside.

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
        try:
            self._bring_in_order()
        except OSError as error:
            self._lock.release()
            raise _disk_error(self._layout.root, error) from error
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self._lock.release()

    def now(self) -> datetime:
        """UTC now, but later than every event in the store and every time given before: events keep their order on a
        machine whose clock is behind, or is set back."""
        return self._clock.now()

    @staticmethod
    def _session_at(moment: datetime) -> str:
        return f"{moment:{_STAMP}}-{secrets.token_hex(3)}"

    def _bring_in_order(self) -> None:
        damaged = damaged_parts(self._layout)
        events = [path for path in damaged if path.parent == self._layout.table(EVENTS.name)]
        for path in events:
            self._set_events_aside(path, [part for part in damaged if part.name == path.name and part != path])
        compaction.finish(self._layout)
        self._remove_uncommitted()
        self.history = read_history(self._layout.root)
        self._small = [
            name for name in part_names(self._layout.table(EVENTS.name)) if not compaction.is_compacted(name)
        ]
        self._follow_earlier_sessions()
        damaged = {path: check for path, check in damaged.items() if path.exists() and path not in events}
        if damaged:
            for path, check in damaged.items():
                self._set_aside(path, check)
            self.history = read_history(self._layout.root)

    def _follow_earlier_sessions(self) -> None:
        """Times and names of this session come after all that are there, whatever the clock says."""
        self._clock.follow(self.history.latest)
        latest = max(part_names(self._layout.table(EVENTS.name)), default="")
        if latest < self.session:
            return
        stamp = re.match(r"\d{8}T\d{6}", latest)
        if stamp is not None:
            after = datetime.strptime(stamp[0], _STAMP).replace(tzinfo=UTC) + timedelta(seconds=1)
            self.session = self._session_at(max(after, self.now()))

    def _set_events_aside(self, path: Path, others: Collection[Path]) -> None:
        """The events of a batch are damaged: what its rows tell takes their place, where all of them are sound.

        Otherwise the batch does not count any more, and its other parts are removed with those of interrupted ones.
        """
        rows = [] if others else list(rebuilt_events(self._layout, path.name, self.now()))
        siblings = (self._layout.table(name) / path.name for name in TABLES if name != EVENTS.name)
        superseded = next((metadata_of(part, SUPERSEDES) for part in siblings if rows and part.exists()), None)
        place = move_aside(self._layout, path)
        text = f"{path} was damaged and is now {place}; "
        text += "what it said is told by its rows" if rows else "the jobs of its batch are computed again"
        self.warnings.append(text)
        if rows:
            rows.append({"sweep": rows[0]["sweep"], "event": "set_aside", "error": text, "at": self.now()})
            rows = [{"session": self.session} | row for row in rows]
            self._write_rows(path, EVENTS, rows, {SUPERSEDES: superseded} if superseded else {})

    def _set_aside(self, path: Path, check: Check) -> None:
        """A part with rows is damaged: an event says so of all jobs that had some there, and they are done again."""
        job_ids = concerned(path, check, self.history.last_ended_in(path.name))
        place = self._layout.set_aside(path.parent.name) / path.name
        jobs = "1 job is" if len(job_ids) == 1 else f"{len(job_ids)} jobs are"
        text = f"{path} was damaged and is now in {place.parent}; {jobs} computed again"
        events = self._layout.table(EVENTS.name) / path.name
        sweep = read_part(events, EVENTS.arrow())["sweep"][0].as_py()
        event = {"sweep": sweep, "session": self.session, "event": "set_aside", "error": text, "at": self.now()}
        self.commit({EVENTS.name: [event | {"job_id": job_id} for job_id in job_ids] or [event]})
        move_aside(self._layout, path)
        self.forget(job_ids)
        self.warnings.append(text)

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
        self._small.append(name)

    def _write(self, table: Table, name: str, rows: list[dict[str, Any]]) -> None:
        self._write_rows(self._layout.table(table.name) / name, table, rows, {})

    def _write_rows(self, path: Path, table: Table, rows: list[dict[str, Any]], metadata: Mapping[str, str]) -> None:
        import pyarrow as pa

        for row in rows:
            unknown = set(row) - set(table.columns)
            if unknown:
                raise AssertionError(f"{table.name} has no column {sorted(unknown)}")
        schema = table.arrow()
        self._write_part(path, [pa.Table.from_pylist(rows, schema=schema)], schema, metadata)

    def _write_part(
        self, path: Path, content: Iterable[pa.Table], schema: pa.Schema, metadata: Mapping[str, str]
    ) -> None:
        scratch = path.with_name(f".{path.name}.tmp")
        try:
            write_part(scratch, content, schema, metadata)
            scratch.replace(path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise _disk_error(path.parent, error) from error

    def _remove_uncommitted(self) -> None:
        committed = set(part_names(self._layout.table(EVENTS.name)))
        for name in TABLES:
            table = self._layout.table(name)
            with os.scandir(table) as entries:
                left = [entry.name for entry in entries if entry.name.endswith((".parquet", ".tmp"))]
            for part in set(left) - committed:
                (table / part).unlink(missing_ok=True)

    def forget(self, job_ids: Iterable[str], tables: Collection[Table] | None = None) -> None:
        """Drop the rows of jobs that are about to be tried again; their events stay.

        Args:
            job_ids: whose rows.
            tables: to look into; None is all that hold rows of jobs.

        Raises:
            BitatlasError: the disk is full or read-only.
        """
        forgotten = set(job_ids)
        if not forgotten:
            return
        holding, failing = self.history.batches_of(forgotten)
        for table in tables or [table for table in TABLES.values() if table is not EVENTS]:
            names = holding | failing if table is RESULTS else holding
            for path in visible(self._layout.table(table.name)):
                # What was there when the store was opened is known by its events; what came since is looked through.
                if path.name in names or path.name.startswith(self.session):
                    self._drop(path, table, forgotten)

    def _drop(self, path: Path, table: Table, job_ids: Collection[str]) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        found = set(job_ids_of(path))
        if found.isdisjoint(job_ids):
            return
        if found <= set(job_ids):
            path.unlink()
            return
        dropped = pa.array(sorted(found.intersection(job_ids)), pa.string())
        rest = (
            piece.filter(pc.invert(pc.is_in(piece["job_id"], dropped))) for piece in stream_part(path, table.arrow())
        )
        superseded = metadata_of(path, SUPERSEDES)
        self._write_part(path, rest, table.arrow(), {SUPERSEDES: superseded} if superseded else {})

    def compact(self) -> str | None:
        """Put many small parts together into few; a warning where that does not work, which loses nothing."""
        return self._try(lambda: compaction.compact(self._layout))

    def tidy(self) -> str | None:
        """Between two batches: put the oldest small ones together where they have become many; a warning as above."""
        if len(self._small) < compaction.MANY_PARTS:
            return None
        oldest, self._small = self._small[: compaction.MANY_PARTS], self._small[compaction.MANY_PARTS :]
        return self._try(lambda: self._put_together(oldest))

    def _put_together(self, names: Collection[str]) -> None:
        for group, name in compaction.put_together(self._layout, set(names), compaction.LARGEST_BYTES):
            self.history.put_together(group, name)

    def _try(self, put_together: Callable[[], None]) -> str | None:
        try:
            put_together()
        except DamagedPartError as error:
            return f"the parts of {self._layout.root} stay as they are: {error}"
        except OSError as error:
            return f"the parts of {self._layout.root} stay as they are: {error.strerror or error}"
        return None


def read_table(directory: Path, table: Table, columns: list[str] | None = None) -> pa.Table:
    """All rows of one table, also while a driver writes; empty where nothing is there yet.

    Args:
        directory: the sweep's output directory.
        table: which.
        columns: to read; None is all.
    Raises:
        DamagedPartError: a part cannot be read.
    """
    import pyarrow as pa

    schema = table.arrow()
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])

    def read() -> pa.Table:
        parts = visible(Layout(directory).table(table.name))
        return pa.concat_tables([schema.empty_table(), *(read_part(part, schema) for part in parts)])

    return steadily(read)


def read_rows(directory: Path, table: Table, column: str, value: str) -> list[dict[str, Any]]:
    """The rows that have a value in a column; parts that have none are not read further.

    Raises:
        DamagedPartError: a part cannot be read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    schema = table.arrow()
    key = pa.schema([schema.field(column)])

    def read() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for part in visible(Layout(directory).table(table.name)):
            if pc.any(pc.equal(read_part(part, key)[column], value)).as_py():
                found += read_part(part, schema).filter(pc.field(column) == value).to_pylist()
        return found

    return steadily(read)


def job_states(directory: Path) -> dict[str, str]:
    """Job id -> `finished` or `failed`, as `History.states` tells."""
    return read_history(directory).states()


def _disk_error(directory: Path, error: OSError) -> BitatlasError:
    return BitatlasError(
        f"cannot write to {directory} ({error.strerror or error}); what is done is kept and readable: "
        "mend the disk and run the same command again"
    )
