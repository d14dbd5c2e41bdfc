"""One part: checksums that find every flipped bit, and columns that older parts lack."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator import parts
from orchestrator.parts import (
    Check,
    DamagedPartError,
    check_part,
    job_ids_of,
    metadata_of,
    opened,
    read_part,
    steadily,
    stream_part,
    write_part,
)

SCHEMA = pa.schema([pa.field("job_id", pa.string()), pa.field("value", pa.float64())])
ROWS = [{"job_id": f"job{index % 7}", "value": float(index)} for index in range(50)]
SOUND = Check(is_sound=True, is_footer_sound=True)


def table(rows=ROWS):
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.fixture
def part(tmp_path):
    path = tmp_path / "part.parquet"
    assert write_part(path, [table()], SCHEMA, {"mine": "yes"}) == 50
    return path


def test_what_was_written_is_read(part):
    assert read_part(part, SCHEMA).to_pylist() == ROWS
    assert [row for piece in stream_part(part, SCHEMA) for row in piece.to_pylist()] == ROWS
    assert (metadata_of(part, "mine"), metadata_of(part, "other")) == ("yes", None)
    assert job_ids_of(part) == [f"job{index}" for index in range(7)]
    assert check_part(part) == SOUND


def test_any_flipped_bit_is_found(part):
    """In the key of the checksums it makes them unknown, and everything else can be read."""
    content = part.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    key = range(content.rfind(b"bitatlas.crc32"), content.rfind(b"bitatlas.crc32") + 14)
    for index in range(len(content)):
        broken = bytearray(content)
        broken[index] ^= 1 << (index % 8)
        part.write_bytes(broken)
        check = check_part(part)
        assert not check.is_sound or index in key
        if index < len(content) - footer:
            assert check == Check(is_sound=False, is_footer_sound=True)


@pytest.mark.parametrize("length", [0, 3, 8, 200, -1])
def test_a_truncated_part_is_found(part, length):
    part.write_bytes(part.read_bytes()[:length])
    assert check_part(part) == Check(is_sound=False, is_footer_sound=False)
    with pytest.raises(
        DamagedPartError, match=r"part\.parquet is damaged, .*run the sweep with the same command again"
    ):
        read_part(part, SCHEMA)


def test_a_damaged_page_is_never_read_as_values(part):
    content = bytearray(part.read_bytes())
    with pq.ParquetFile(part) as file:
        column = file.metadata.row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start + column.total_compressed_size - 3] ^= 16
    part.write_bytes(content)
    with pytest.raises(DamagedPartError, match="CRC checksum"):
        read_part(part, SCHEMA)
    assert job_ids_of(part) == [f"job{index}" for index in range(7)]  # that column is sound


def test_older_parts_have_no_checksums_and_fewer_columns(tmp_path):
    path = tmp_path / "old.parquet"
    pq.write_table(table().select(["job_id"]).append_column("gone", pa.nulls(50, pa.int64())), path)
    assert check_part(path) == SOUND
    assert read_part(path, SCHEMA).to_pylist() == [row | {"value": None} for row in ROWS]
    path.write_bytes(path.read_bytes()[:-20])
    assert not check_part(path).is_sound


def test_small_pieces_are_gathered_into_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_GROUP_ROWS", 20)
    path = tmp_path / "many.parquet"
    assert write_part(path, [table(ROWS[index : index + 5]) for index in range(0, 50, 5)], SCHEMA, {}) == 50
    with pq.ParquetFile(path) as file:
        assert [file.metadata.row_group(index).num_rows for index in range(3)] == [20, 20, 10]
    assert check_part(path) == SOUND
    assert read_part(path, SCHEMA).to_pylist() == ROWS


def test_a_part_that_went_away_is_looked_for_anew(part, monkeypatch):
    monkeypatch.setattr(parts, "_PAUSE_SECONDS", 0)
    looked = []

    def read():
        looked.append(1)
        with opened(part if len(looked) > 2 else part.with_name("gone.parquet")) as file:
            return file.metadata.num_rows

    assert steadily(read) == 50
    with pytest.raises(FileNotFoundError):
        steadily(lambda: read_part(part.with_name("gone.parquet"), SCHEMA))
