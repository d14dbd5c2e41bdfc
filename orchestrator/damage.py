"""Damaged parts are set aside, never deleted, and their jobs count as not finished any more.

First an event says so of every job concerned, then the part is moved, then what the jobs left in other tables is
dropped: a driver that is killed in between leaves a store in which these jobs are done again, and no row twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.compaction import part_names
from orchestrator.errors import BitatlasError
from orchestrator.parts import Check, check_part, job_ids_of, stream_part
from orchestrator.schema import LAYERS, RESULTS, SLICES, TABLES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from datetime import datetime
    from pathlib import Path

    from orchestrator.layout import Layout


def damaged_parts(layout: Layout) -> dict[Path, Check]:
    """Parts whose bytes are not those that were written, of all tables."""
    found: dict[Path, Check] = {}
    for table in TABLES:
        for name in part_names(layout.table(table)):
            check = check_part(layout.table(table) / name)
            if not check.is_sound:
                found[layout.table(table) / name] = check
    return found


def concerned(part: Path, check: Check, candidates: Collection[str]) -> list[str]:
    """The jobs that lost rows with a damaged part: those that it names where its job ids can still be trusted, else
    all that may have left rows there.

    Args:
        candidates: the jobs whose last end is in the part's batch.
    """
    if check.is_footer_sound:
        try:
            return sorted(set(job_ids_of(part)))
        except BitatlasError:
            pass  # the damage is in the ids
    return sorted(candidates)


def move_aside(layout: Layout, part: Path) -> Path:
    """Move a part out of its table; where it is now.

    Raises:
        OSError: the disk refuses.
    """
    directory = layout.set_aside(part.parent.name)
    directory.mkdir(parents=True, exist_ok=True)
    place, number = directory / part.name, 1
    while place.exists():
        number += 1
        place = directory / f"{part.name}.{number}"
    part.replace(place)
    return place


def rebuilt_events(layout: Layout, name: str, at: datetime) -> Iterator[dict[str, Any]]:
    """Events that say of each job with rows in a batch that it ended: a batch has all rows of a job, or none.

    Args:
        name: of the batch's parts, all of which are sound but for the one in `events/`.
        at: when, where the rows do not tell.
    """
    import pyarrow as pa

    seen: set[str] = set()
    for table in (RESULTS, LAYERS, SLICES):
        path = layout.table(table.name) / name
        if not path.exists():
            continue
        wanted = ("sweep", "job_id", "cell_id", "status", "error_kind", "error", "worker", "device", "finished_at")
        columns = [column for column in wanted if column in table.columns]
        schema = pa.schema([table.arrow().field(column) for column in columns])
        for piece in stream_part(path, schema):
            for row in piece.to_pylist():
                if row["job_id"] in seen:
                    continue
                seen.add(row["job_id"])
                failed = row.get("status") == "failed"
                finished_at = row.pop("finished_at", None)
                yield row | {"event": "failed" if failed else "finished", "at": finished_at or at}
