"""What the events say of each job, as columns: read once at the start, part by part. No row becomes a Python object
before it is asked for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from orchestrator.compaction import visible
from orchestrator.layout import Layout
from orchestrator.parts import read_part, steadily
from orchestrator.schema import EVENTS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime
    from pathlib import Path

    import pyarrow as pa

FINISHED = ("finished", "reused", "merged")
_ENDS = (*FINISHED, "failed", "set_aside")  # what decides how a job stands, by the last of them
_COLUMNS = ("event", "job_id", "device", "seconds", "at")


class History:
    """The events of a store, in the order in which they happened."""

    def __init__(self, events: pa.Table, parts: Sequence[str]) -> None:
        """Sort them.

        Args:
            events: columns `_COLUMNS`, and `part`, an index into `parts`.
            parts: the names of the parts.
        """
        self._events, self._parts = events.sort_by("at"), list(parts)

    @property
    def latest(self) -> datetime | None:
        """When the last event happened; None where there is none."""
        import pyarrow.compute as pc

        latest: datetime | None = pc.max(self._events["at"]).as_py()
        return latest

    def states(self) -> dict[str, str]:
        """Job id -> `finished` (itself, or in slices) or `failed`, whichever came last; jobs with neither, and those
        whose rows were set aside since, are left out."""
        ends = self._of(_ENDS)
        last = dict(zip(ends["job_id"].to_pylist(), ends["event"].to_pylist(), strict=True))
        return {
            job_id: "finished" if event in FINISHED else event for job_id, event in last.items() if event != "set_aside"
        }

    def last_ended_in(self, part: str) -> set[str]:
        """The jobs whose last end, in whatever way, stands in a part of this name."""
        ends = self._of(_ENDS)
        last = dict(zip(ends["job_id"].to_pylist(), ends["part"].to_pylist(), strict=True))
        return {job_id for job_id, place in last.items() if self._parts[place] == part and job_id is not None}

    def batches_of(self, job_ids: Collection[str]) -> tuple[set[str], set[str]]:
        """The names of the batches that may hold rows of these jobs: any rows, and rows that say that they failed.

        A task's row of failure stands under its own id, the event under its slice's: every failure counts.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        done = self._of(FINISHED)
        done = done.filter(pc.is_in(done["job_id"], pa.array(list(job_ids), pa.string())))
        return self._names(done), self._names(self._of(["failed"]))

    def put_together(self, parts: Collection[str], name: str) -> None:
        """What stood in these parts stands in one of this name now."""
        gone = set(parts)
        self._parts = [name if part in gone else part for part in self._parts]

    def observed(self) -> list[dict[str, Any]]:
        """`event`, `job_id`, `device` and `seconds` of all that finished, in order: what estimates are fitted to."""
        names = ("job_id", "device", "seconds")
        columns = [self._of(["finished"])[name].to_pylist() for name in names]
        return [
            {"event": "finished", "job_id": job_id, "device": device, "seconds": seconds}
            for job_id, device, seconds in zip(*columns, strict=True)
        ]

    def _of(self, kinds: Collection[str]) -> pa.Table:
        import pyarrow.compute as pc

        return self._events.filter(pc.field("event").isin(list(kinds)))

    def _names(self, events: pa.Table) -> set[str]:
        return {self._parts[index] for index in events["part"].unique().to_pylist()}


def read_history(directory: Path, prefix: str = "") -> History:
    """Read the events of a sweep; none where nothing is there yet.

    Args:
        directory: the sweep's output directory.
        prefix: of the parts' names; a session's own begin with its name.
    Raises:
        DamagedPartError: a part cannot be read.
    """
    return steadily(lambda: _read(directory, prefix))


def _read(directory: Path, prefix: str) -> History:
    import numpy as np
    import pyarrow as pa

    schema = pa.schema([EVENTS.arrow().field(name) for name in _COLUMNS])
    parts = [part for part in visible(Layout(directory).table(EVENTS.name)) if part.name.startswith(prefix)]
    with ThreadPoolExecutor(2) as pool:  # half of the time goes to what does not hold the interpreter's lock
        tables = list(pool.map(lambda part: read_part(part, schema), parts))
    events = pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()
    places = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    return History(events.append_column("part", pa.array(places, pa.int64())), [part.name for part in parts])
