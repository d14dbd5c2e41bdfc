"""Many small parts become few, while anyone reads and whatever moment the driver is killed at.

Consecutive batches are put together, as many as give parts of a moderate size, by these steps:

1. Each table's new part is written beside the old ones as `.NAME.parquet.new`; its metadata names those it supersedes.
2. The one in `events/` gets its name: from here on the new parts count, before they did not.
3. Each table's new part gets its name, and what it supersedes is removed.

So in every table a new part that has its name counts, an old one that is missing is superseded by one that is there,
and a reader that leaves out what is superseded sees every row once. The next driver undoes what was cut off before
step 2 and does the rest of what was cut off after it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.parts import DamagedPartError, check_part, metadata_of, stream_part, write_part
from orchestrator.schema import EVENTS, TABLES, Table

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa

    from orchestrator.layout import Layout

SUPERSEDES = "bitatlas.supersedes"
LARGEST_BYTES = 1 << 28
# So many parts are no burden to anyone, and the files of a small sweep stay as they were written.
FEW_PARTS = 16
# So many are put together while a sweep runs, so that a driver that is killed leaves few to the next one. It takes
# about a second, in which nobody is given a job.
MANY_PARTS = 128
_NAME = re.compile(r"(?P<batch>.+?)(?:-c(?P<times>\d+))?\.parquet")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Parts of one name.

    Args:
        name: of the files.
        size: bytes of the largest of them.
    """

    name: str
    size: int


def is_compacted(name: str) -> bool:
    """Whether a part of this name was put together from others."""
    match = _NAME.fullmatch(name) if "-c" in name else None
    return match is not None and match["times"] is not None


def compacted_name(sources: Sequence[str]) -> str:
    """The name of what is put together from these: new, and where the last of them stood in the order of names."""
    match = _NAME.fullmatch(sources[-1])
    if match is None:
        raise AssertionError(f"{sources[-1]} is no part's name")
    return f"{match['batch']}-c{int(match['times'] or 0) + 1}.parquet"


def groups(batches: Iterable[Batch], largest: int) -> Iterator[list[str]]:
    """What to put together: consecutive batches, not larger than `largest` bytes, at least two. Pure.

    A batch of more than half of that stays as it is, so that a large part is not written again and again.
    """
    group: list[str] = []
    size = 0
    for batch in batches:
        if group and (size + batch.size > largest or batch.size > largest // 2):
            if len(group) > 1:
                yield group
            group, size = [], 0
        if batch.size <= largest // 2:
            group.append(batch.name)
            size += batch.size
    if len(group) > 1:
        yield group


def visible(directory: Path) -> list[Path]:
    """The parts of one table that count, in the order of their names.

    Raises:
        DamagedPartError, FileNotFoundError: of a part that supersedes others.
    """
    names = part_names(directory)
    while True:
        superseded: set[str] = set()
        for name in filter(is_compacted, names):
            superseded |= superseded_by(directory / name)
        # A directory is not listed at one moment: we may have missed a part that got its name meanwhile, and what it
        # supersedes, which was removed after that. A second look that begins now cannot miss it.
        again = part_names(directory) if names else names
        if set(filter(is_compacted, again)) == set(filter(is_compacted, names)):
            return [directory / name for name in names if name not in superseded]
        names = again


def part_names(directory: Path) -> list[str]:
    """All parts that have their name, also such as others supersede, in order."""
    try:
        found = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(name for name in found if name.endswith(".parquet") and not name.startswith((".", "_")))


def superseded_by(part: Path) -> set[str]:
    """The names of the parts that a part was put together from."""
    return set(json.loads(metadata_of(part, SUPERSEDES) or "[]"))


def compact(layout: Layout, largest: int = LARGEST_BYTES) -> None:
    """Put the store's parts together; only the driver that holds the lock may.

    Args:
        largest: bytes that no new part should exceed.
    Raises:
        DamagedPartError: a part cannot be read; what was put together before counts, and nothing is lost.
        OSError: the disk is full or read-only; the same holds.
    """
    if max(len(part_names(layout.table(name))) for name in TABLES) <= FEW_PARTS:
        return
    for _ in put_together(layout, None, largest):
        pass


def put_together(layout: Layout, names: Collection[str] | None, largest: int) -> Iterator[tuple[list[str], str]]:
    """Put batches together; each time, those that were and the name of the new one.

    Args:
        names: of the batches to look at; None is all.
        largest: bytes that no new part should exceed.
    Raises:
        DamagedPartError, OSError: as `compact`.
    """
    batches = [batch for batch in _batches(layout) if names is None or batch.name in names]
    for group in list(groups(batches, largest)):
        yield group, _merge(layout, group)


def _batches(layout: Layout) -> list[Batch]:
    sizes: dict[str, int] = dict.fromkeys(part_names(layout.table(EVENTS.name)), 0)
    for table in TABLES:
        with os.scandir(layout.table(table)) as entries:
            for entry in entries:
                if entry.name in sizes:
                    sizes[entry.name] = max(sizes[entry.name], entry.stat().st_size)
    return [Batch(name=name, size=size) for name, size in sizes.items()]


def _merge(layout: Layout, group: Sequence[str]) -> str:
    """Make one batch of several; its name."""
    name = compacted_name(group)
    try:
        for table in TABLES.values():
            _write(layout.table(table.name), table, name, group)
        _sync(layout.table(table) for table in TABLES)
    except BaseException:
        undo(layout)
        raise
    _switch(layout, name, group)
    return name


def _write(directory: Path, table: Table, name: str, group: Sequence[str]) -> None:
    """Step 1, for one table."""
    sources = [directory / source for source in group if (directory / source).exists()]
    if not sources:
        return
    counted = 0

    def rows() -> Iterator[pa.Table]:
        nonlocal counted
        for source in sources:
            for piece in stream_part(source, table.arrow()):
                counted += piece.num_rows
                yield piece

    scratch = _scratch(directory, name)
    written = write_part(scratch, rows(), table.arrow(), {SUPERSEDES: json.dumps(list(group))})
    # The old ones go: what takes their place is read once more.
    if written != counted or not check_part(scratch).is_sound:
        raise DamagedPartError(scratch, "it does not hold what was written")


def _switch(layout: Layout, name: str, superseded: Iterable[str]) -> None:
    """Steps 2 and 3, or what is left of them."""
    for table in sorted(TABLES, key=lambda table: table != EVENTS.name):  # events first: the step that counts
        directory = layout.table(table)
        if _scratch(directory, name).exists():
            _scratch(directory, name).replace(directory / name)
            _sync([directory])  # the disk knows the new part before it forgets the old ones
        for old in superseded:
            (directory / old).unlink(missing_ok=True)


def finish(layout: Layout) -> None:
    """Bring to its end, or undo, what a killed driver was putting together.

    Raises:
        DamagedPartError: a part in `events/` that supersedes others.
    """
    events = layout.table(EVENTS.name)
    for name in filter(is_compacted, part_names(events)):
        superseded = superseded_by(events / name)
        if any((layout.table(table) / old).exists() for table in TABLES for old in superseded) or any(
            _scratch(layout.table(table), name).exists() for table in TABLES
        ):
            _switch(layout, name, superseded)
    undo(layout)


def undo(layout: Layout) -> None:
    """Remove new parts that do not count."""
    for table in TABLES:
        for path in layout.table(table).glob(".*.new"):
            path.unlink(missing_ok=True)


def _scratch(directory: Path, name: str) -> Path:
    return directory / f".{name}.new"


def _sync(directories: Iterable[Path]) -> None:
    """Have the disk hold the names in these directories."""
    for directory in directories:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
