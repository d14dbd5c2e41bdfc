"""Damaged parts: set aside, told of, and their jobs done again, with no row twice and none missing."""

import io
from datetime import UTC, datetime, timedelta

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from orchestrator import compaction
from orchestrator import store as store_module
from orchestrator.compaction import compact
from orchestrator.config import resolved
from orchestrator.damage import concerned, damaged_parts, move_aside
from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout
from orchestrator.parts import Check
from orchestrator.schema import EVENTS, ITEMS, LAYERS, RESULTS, SLICES, TABLES
from orchestrator.status import print_status
from orchestrator.store import Store, job_states, read_table

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
JOBS = ("quantized", "measured", "other")


def end(job, second):
    return {"sweep": "s", "event": "finished", "job_id": job, "at": BEGAN + timedelta(seconds=second)}


def rows(*jobs):
    """Of a quantizing job layers, of another results and items."""
    measured = [job for job in jobs if job != "quantized"]
    return {
        "results": [{"sweep": "s", "job_id": job, "value": 1.0, "finished_at": BEGAN} for job in measured],
        "items": [{"job_id": job, "doc_id": index, "value": index / 7} for job in measured for index in range(40)],
        "layers": [{"sweep": "s", "job_id": "quantized", "layer": "a"}] if "quantized" in jobs else [],
        "events": [end(job, second) for second, job in enumerate(jobs)],
    }


@pytest.fixture
def layout(tmp_path, make_sweep):
    """Two batches: a quantizing job and a measured one, and another."""
    layout = Layout(tmp_path / "out")
    with Store(layout) as store:
        store.commit(rows("quantized", "measured"))
        store.commit(rows("other"))
    layout.sweep.write_text(resolved(make_sweep()))
    return layout


def first(layout, table):
    return min(layout.table(table.name).glob("*.parquet"))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 32
    path.write_bytes(content)


def in_the_values(path):
    """Flip a bit of the last column, job ids left alone."""
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(0).column(file.metadata.num_columns - 1)
    flip(path, column.data_page_offset + 30)


def jobs_of(layout, table):
    return sorted(set(read_table(layout.root, table)["job_id"].to_pylist()))


def events(layout, kind):
    return [row for row in read_table(layout.root, EVENTS).to_pylist() if row["event"] == kind]


def do_again(layout, *jobs):
    """What a driver does with jobs that are not done."""
    with Store(layout) as store:
        assert store.warnings == []
        store.forget(jobs)
        batch = rows(*jobs)
        store.commit(batch | {"events": [row | {"at": store.now()} for row in batch["events"]]})


def assert_everything_is_there_once(layout):
    with Store(layout) as store:
        assert store.warnings == []
    assert job_states(layout.root) == dict.fromkeys(JOBS, "finished")
    assert sorted(read_table(layout.root, RESULTS)["job_id"].to_pylist()) == ["measured", "other"]
    assert read_table(layout.root, ITEMS).num_rows == 80
    assert read_table(layout.root, LAYERS)["job_id"].to_pylist() == ["quantized"]


def test_a_sound_store_has_no_damage(layout):
    assert damaged_parts(layout) == {}


def test_jobs_with_damaged_rows_are_done_again(layout):
    part = first(layout, ITEMS)
    content = part.read_bytes()
    in_the_values(part)
    assert damaged_parts(layout) == {part: Check(is_sound=False, is_footer_sound=True)}
    broken = part.read_bytes()
    with Store(layout) as store:
        (warning,) = store.warnings
    assert warning == f"{part} was damaged and is now in {layout.set_aside('items')}; 1 job is computed again"
    assert (layout.set_aside("items") / part.name).read_bytes() == broken != content
    assert job_states(layout.root) == {"quantized": "finished", "other": "finished"}
    assert jobs_of(layout, RESULTS) == jobs_of(layout, ITEMS) == ["other"]
    assert jobs_of(layout, LAYERS) == ["quantized"]
    (event,) = events(layout, "set_aside")
    assert (event["job_id"], event["error"], event["sweep"]) == ("measured", warning, "s")
    assert event["session"] == store.session
    do_again(layout, "measured")
    assert_everything_is_there_once(layout)


@pytest.mark.parametrize("length", [0, 6, -30])
@pytest.mark.parametrize("table", [RESULTS, ITEMS, LAYERS], ids=lambda table: table.name)
def test_a_part_that_says_nothing_any_more_concerns_all_jobs_of_its_batch(layout, table, length):
    part = first(layout, table)
    part.write_bytes(part.read_bytes()[:length])
    with Store(layout) as store:
        assert "; 2 jobs are computed again" in store.warnings[0]
    assert job_states(layout.root) == {"other": "finished"}
    assert {job for table in (RESULTS, ITEMS, LAYERS) for job in jobs_of(layout, table)} == {"other"}
    do_again(layout, "quantized", "measured")
    assert_everything_is_there_once(layout)


@pytest.mark.parametrize("place", [10, -20, -3])
def test_damaged_events_are_told_anew_by_their_batch_s_rows(layout, place):
    part = first(layout, EVENTS)
    flip(part, place)
    with Store(layout) as store:
        (warning,) = store.warnings
    assert f"{part} was damaged and is now {layout.set_aside('events') / part.name}; what it said is told" in warning
    assert events(layout, "set_aside")[0]["error"] == warning
    assert_everything_is_there_once(layout)


def test_a_failure_stays_one_when_its_events_are_damaged(layout):
    with Store(layout) as store:
        failure = {"job_id": "bad", "status": "failed", "error": "why", "finished_at": BEGAN}
        store.commit({"results": [failure], "events": [end("bad", 3) | {"event": "failed"}]})
    part = max(layout.table("events").glob("*.parquet"))
    flip(part, 10)
    with Store(layout):
        pass
    assert job_states(layout.root)["bad"] == "failed"
    assert events(layout, "failed")[0]["error"] == "why"


def test_a_batch_whose_rows_are_damaged_too_does_not_count(layout):
    for table in (EVENTS, ITEMS):
        flip(first(layout, table), 10)
    with Store(layout) as store:
        assert "the jobs of its batch are computed again" in store.warnings[0]
    assert job_states(layout.root) == {"other": "finished"}
    assert {job for table in (RESULTS, ITEMS, LAYERS) for job in jobs_of(layout, table)} == {"other"}
    do_again(layout, "quantized", "measured")
    assert_everything_is_there_once(layout)


@pytest.mark.parametrize("table", [RESULTS, ITEMS, LAYERS, EVENTS], ids=lambda table: table.name)
def test_a_compacted_part_is_no_worse(layout, table, monkeypatch):
    monkeypatch.setattr(compaction, "FEW_PARTS", 1)
    compact(layout)
    in_the_values(first(layout, table))
    with Store(layout) as store:
        assert len(store.warnings) == 1
    missing = {job for job in JOBS if job_states(layout.root).get(job) != "finished"}
    assert missing == {
        "results": {"measured", "other"}, "items": {"measured", "other"}, "layers": {"quantized"}, "events": set(),
    }[table.name]  # fmt: skip
    if missing:
        do_again(layout, *sorted(missing, key=JOBS.index))
    assert_everything_is_there_once(layout)


@pytest.mark.parametrize("steps", range(4))
def test_a_driver_that_is_killed_while_it_sets_aside(layout, steps, monkeypatch):
    class Killed(BaseException):
        pass

    part = first(layout, ITEMS)
    in_the_values(part)
    done = []

    def counted(owner, name):
        do = getattr(owner, name)

        def one(*arguments):
            if len(done) == steps:
                raise Killed
            done.append(name)
            return do(*arguments)

        return one

    with monkeypatch.context() as patch:
        for name in ("commit", "_drop"):
            patch.setattr(Store, name, counted(Store, name))
        patch.setattr(store_module, "move_aside", counted(store_module, "move_aside"))
        with pytest.raises(Killed), Store(layout):
            raise Killed
    with Store(layout):
        pass
    assert job_states(layout.root) == {"quantized": "finished", "other": "finished"}
    do_again(layout, "measured")
    assert_everything_is_there_once(layout)


def test_damaged_slices_are_scored_again(layout):
    with Store(layout) as store:
        store.commit({"slices": [{"job_id": "slice", "whole_id": "all"}], "events": [end("slice", 9)]})
    flip(first(layout, SLICES), 8)
    with Store(layout):
        pass
    assert "slice" not in job_states(layout.root)
    assert read_table(layout.root, SLICES).num_rows == 0


def test_readers_name_the_file_and_the_remedy(layout):
    part = first(layout, EVENTS)
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(BitatlasError) as caught:
        print_status(layout.root, Console(file=io.StringIO()))
    assert str(caught.value).startswith(f"{part} is damaged")
    assert str(caught.value).endswith(
        "run the sweep with the same command again: it sets this part aside and computes its jobs again"
    )
    with Store(layout):
        pass
    assert print_status(layout.root, Console(file=io.StringIO())) == 0


def test_older_parts_without_checksums_count(layout):
    for table in TABLES.values():
        for path in layout.table(table.name).glob("*.parquet"):
            pq.write_table(pq.read_table(path), path)
    assert_everything_is_there_once(layout)


def test_nothing_is_overwritten_where_parts_are_set_aside(layout):
    part = first(layout, ITEMS)
    content = part.read_bytes()
    assert move_aside(layout, part).name == part.name
    part.write_bytes(b"another")
    assert move_aside(layout, part).name == f"{part.name}.2"
    assert (layout.set_aside("items") / part.name).read_bytes() == content


def test_ids_that_are_damaged_themselves_are_not_believed(layout):
    part = first(layout, ITEMS)
    with pq.ParquetFile(part) as file:
        column = file.metadata.row_group(0).column(file.schema_arrow.names.index("job_id"))
    flip(part, (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1)
    (check,) = damaged_parts(layout).values()
    assert concerned(part, check, {"b", "a"}) == ["a", "b"]
