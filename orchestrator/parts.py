"""One Parquet part: written with checksums, checked, opened, and brought to today's columns.

Two checksums stand in the footer, of the whole file and of the footer alone, taken with zeros in their own place.
Checking them reads the bytes once and parses nothing, which is what makes it affordable for thousands of parts; pages
have their own besides, so that any reader notices a damaged page where it asks for that.
"""

from __future__ import annotations

import os
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, TypeVar

from orchestrator.errors import BitatlasError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import pyarrow as pa
    import pyarrow.parquet as pq

T = TypeVar("T")

_KEY = b"bitatlas.crc32"
_ZEROS = b"00000000-00000000"  # of the file, of the footer
_TAIL = 8  # the footer's length in four bytes, and the magic
_MAGIC = b"PAR1"
_CHUNK = 1 << 23
# Row groups of a part that is streamed: a reader holds a few of them in memory.
_GROUP_ROWS = 1 << 17
_GROUP_BYTES = 1 << 25
_ATTEMPTS, _PAUSE_SECONDS = 40, 0.05


class DamagedPartError(BitatlasError):
    """A part of the store cannot be read; `part` and `why` are for those who know of another remedy."""

    def __init__(self, part: Path, why: object) -> None:
        """Name the part and the remedy."""
        self.part, self.why = part, " ".join(str(why).split())
        super().__init__(
            f"{part} is damaged, not a readable Parquet file ({self.why}); run the sweep with the same command again: "
            "it sets this part aside and computes its jobs again"
        )


@dataclass(frozen=True)
class Check:
    """What the checksums of a part say.

    Attributes:
        is_sound: every byte is as it was written.
        is_footer_sound: so is at least the footer, which says what is where.
    """

    is_sound: bool
    is_footer_sound: bool


def write_part(path: Path, tables: Iterable[pa.Table], schema: pa.Schema, metadata: Mapping[str, str]) -> int:
    """Write a part and have the disk hold it; its number of rows. The caller writes beside and renames.

    Args:
        path: the file, which is overwritten.
        tables: the rows, with the columns of `schema`; small ones are gathered into row groups.
        metadata: to stand in the footer.
    Raises:
        OSError: the disk is full or read-only.
    """
    import pyarrow.parquet as pq

    num_rows = 0
    with path.open("w+b") as stream:
        tally = _Tally(stream)
        with pq.ParquetWriter(tally, schema, compression="zstd", write_page_checksum=True) as writer:
            for group in _row_groups(tables):
                writer.write_table(group)
                num_rows += group.num_rows
            writer.add_key_value_metadata({_KEY.decode(): _ZEROS.decode(), **metadata})
        _enter_checksums(stream, tally.checksum)
        stream.flush()
        os.fsync(stream.fileno())
    return num_rows


class _Tally:
    """A stream that counts the checksum of what goes through it."""

    closed = False

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.checksum = 0

    def write(self, data: bytes) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self._stream.write(data)

    def tell(self) -> int:
        return self._stream.tell()

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """The file stays open: the checksums are still to be entered."""


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    import pyarrow as pa

    gathered: list[pa.Table] = []
    num_rows = num_bytes = 0
    for table in tables:
        gathered.append(table)
        num_rows, num_bytes = num_rows + table.num_rows, num_bytes + table.nbytes
        if num_rows >= _GROUP_ROWS or num_bytes >= _GROUP_BYTES:
            yield pa.concat_tables(gathered)
            gathered, num_rows, num_bytes = [], 0, 0
    if gathered:
        yield pa.concat_tables(gathered)


def _enter_checksums(stream: IO[bytes], of_file: int) -> None:
    size = stream.seek(0, os.SEEK_END)
    footer = _footer(stream, size)
    place = None if footer is None else _place(footer)
    if footer is None or place is None:
        raise AssertionError("what was just written has a footer with a place for checksums")
    stream.seek(size - len(footer) + place)
    stream.write(b"%08x-%08x" % (of_file, zlib.crc32(footer)))


def _footer(stream: IO[bytes], size: int) -> bytes | None:
    """The last bytes of a file, from the footer on; None where there is none."""
    if size < _TAIL:
        return None
    stream.seek(size - _TAIL)
    tail = stream.read(_TAIL)
    length = int.from_bytes(tail[:4], "little") + _TAIL
    if tail[4:] != _MAGIC or length > size:
        return None
    stream.seek(size - length)
    return stream.read(length)


def _place(footer: bytes) -> int | None:
    """Where in the footer the checksums stand: behind their key and the value's type and length."""
    key = footer.rfind(_KEY)
    place = key + len(_KEY) + 2
    return place if key >= 0 and place + len(_ZEROS) <= len(footer) else None


def check_part(path: Path) -> Check:
    """Compare a part with its checksums. Of one that an older version wrote without, what can be read counts.

    Raises:
        OSError: the file is not there or the disk does not give it.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        footer = _footer(stream, size)
        if footer is None:
            return Check(False, False)
        place = _place(footer)
        if place is None:
            return _check_by_reading(path)
        end = place + len(_ZEROS)
        found, blank = footer[place:end], footer[:place] + _ZEROS + footer[end:]
        of_file, left = 0, size - len(footer)
        stream.seek(0)
        while left:
            chunk = stream.read(min(left, _CHUNK))
            if not chunk:
                return Check(False, False)
            of_file, left = zlib.crc32(chunk, of_file), left - len(chunk)
    of_footer, of_file = zlib.crc32(blank), zlib.crc32(blank, of_file)
    return Check(found == b"%08x-%08x" % (of_file, of_footer), found[9:] == b"%08x" % of_footer)


def _check_by_reading(path: Path) -> Check:
    try:
        with opened(path) as file:
            for _ in file.iter_batches(use_threads=False):
                pass
    except DamagedPartError:
        return Check(False, False)
    return Check(True, True)


@contextmanager
def opened(part: Path) -> Iterator[pq.ParquetFile]:
    """Open a part for reading, pages compared with their checksums.

    Raises:
        DamagedPartError: it is no Parquet file, or cannot be read; also what is found while it is open.
        FileNotFoundError: it went away: see `steadily`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pa.OSFile(str(part)) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            yield file
    except (FileNotFoundError, BitatlasError):
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DamagedPartError(part, error) from None


def read_part(part: Path, schema: pa.Schema) -> pa.Table:
    """The columns of `schema` of a part; one that an older part lacks is null.

    Raises:
        DamagedPartError, FileNotFoundError: as `opened`.
    """
    with opened(part) as file:
        return conformed(file.read(columns=schema.names, use_threads=False), schema)  # unknown columns are passed over


def stream_part(part: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """The same in pieces that fit in memory.

    Raises:
        DamagedPartError, FileNotFoundError: as `opened`.
    """
    import pyarrow as pa

    with opened(part) as file:
        for batch in file.iter_batches(columns=schema.names, use_threads=False):
            yield conformed(pa.Table.from_batches([batch]), schema)


def conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with exactly the columns of `schema`; what it lacks is null."""
    import pyarrow as pa

    if table.schema.equals(schema):
        return table.replace_schema_metadata(None)
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def metadata_of(part: Path, key: str) -> str | None:
    """What stands in a part's footer under a name.

    Raises:
        DamagedPartError, FileNotFoundError: as `opened`.
    """
    with opened(part) as file:
        value = (file.metadata.metadata or {}).get(key.encode())
    return None if value is None else value.decode()


def job_ids_of(part: Path) -> Sequence[str]:
    """Whose rows a part holds, each once.

    Raises:
        DamagedPartError, FileNotFoundError: as `opened`.
    """
    import pyarrow as pa

    found: dict[str, None] = {}
    num_rows = 0
    for piece in stream_part(part, pa.schema([pa.field("job_id", pa.string())])):
        found.update(dict.fromkeys(piece["job_id"].drop_null().unique().to_pylist()))
        num_rows += piece.num_rows
    with opened(part) as file:
        if num_rows != file.metadata.num_rows:  # a page's header has no checksum of its own
            raise DamagedPartError(part, "it has fewer rows than it says")
    return list(found)


def steadily(read: Callable[[], T]) -> T:
    """What `read` reads, begun anew where the driver took a part away between our listing and our reading."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return read()
        except FileNotFoundError:
            time.sleep(_PAUSE_SECONDS)
    return read()
