"""The store: a batch counts whole or not at all, one driver at a time, and anyone can read."""

import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchestrator import clock
from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout
from orchestrator.schema import EVENTS, ITEMS, LAYERS, RESULTS, SLICES, TABLES
from orchestrator.store import Store, job_states, read_rows, read_table

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def layout(tmp_path):
    return Layout(tmp_path / "out")


def event(kind, job=None, second=0):
    return {"sweep": "s", "event": kind, "job_id": job, "at": BEGAN + timedelta(seconds=second)}


def batch(job, kind="finished", value=1.5, second=0):
    return {
        "results": [{"sweep": "s", "job_id": job, "metric": "perplexity", "value": value, "started_at": BEGAN}],
        "items": [{"job_id": job, "doc_id": 0, "log_likelihoods": [-1.0, -2.5]}],
        "layers": [{"job_id": job, "layer": "a", "output_error": None}],
        "slices": [{"job_id": job, "whole_id": "all of it", "outcome": "{}"}],
        "events": [event(kind, job, second)],
    }


def parts(layout, table):
    return sorted(path.name for path in layout.table(table.name).iterdir())


def test_what_was_committed_is_read(layout):
    with Store(layout) as store:
        store.commit(batch("one"))
        store.commit(batch("two", value=float("nan")))
        store.commit({"events": [event("session_ended")]})
    results = read_table(layout.root, RESULTS).to_pylist()
    assert [row["job_id"] for row in results] == ["one", "two"]
    assert results[0]["value"] == 1.5
    assert results[1]["value"] != results[1]["value"]
    assert results[0]["started_at"] == BEGAN
    assert results[0]["stderr"] is None
    assert read_table(layout.root, ITEMS)["log_likelihoods"].to_pylist() == [[-1.0, -2.5]] * 2
    assert read_table(layout.root, LAYERS)["output_error"].to_pylist() == [None, None]
    assert read_table(layout.root, EVENTS).num_rows == 3


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_a_store_that_is_not_there_reads_as_empty(layout, table):
    assert read_table(layout.root, table).num_rows == 0
    assert read_table(layout.root, table).schema.equals(table.arrow())


def test_every_part_has_the_declared_columns(layout):
    with Store(layout) as store:
        store.commit(batch("one"))
    for table in TABLES.values():
        (path,) = layout.table(table.name).glob("*.parquet")
        assert pq.read_schema(path).equals(table.arrow())


def test_a_batch_without_its_event_is_removed_by_the_next_driver(layout):
    with Store(layout) as store:
        store.commit(batch("one"))
    for table in (RESULTS, ITEMS, SLICES):  # a driver was killed between two tables of its batch
        whole = next(layout.table(table.name).glob("*.parquet"))
        whole.with_name("20260101T000000-dead-000000.parquet").write_bytes(whole.read_bytes())
    layout.table(LAYERS.name).joinpath(".half.parquet.tmp").write_bytes(b"PAR1")
    layout.table(EVENTS.name).joinpath(".half.parquet.tmp").write_bytes(b"PAR1")
    with Store(layout):
        for table in TABLES.values():
            assert len(parts(layout, table)) == 1
    assert read_table(layout.root, RESULTS)["job_id"].to_pylist() == ["one"]


def test_two_sessions_never_write_the_same_part(layout):
    for job in ("one", "two", "three"):
        with Store(layout) as store:
            store.commit(batch(job))
    assert len(parts(layout, EVENTS)) == 3
    assert sorted(read_table(layout.root, RESULTS)["job_id"].to_pylist()) == ["one", "three", "two"]


def test_a_second_driver_is_refused(layout):
    with Store(layout) as store:
        with (
            pytest.raises(BitatlasError, match=r"out is being written by another bitatlas run; wait for it, or choose"),
            Store(layout),
        ):
            pass
        store.commit(batch("one"))  # the first one is not disturbed
    with Store(layout) as store:
        store.commit(batch("two"))


def test_a_driver_in_another_process_is_refused_too(layout):
    code = (
        "import sys; from pathlib import Path; from orchestrator.layout import Layout; "
        "from orchestrator.store import Store\nwith Store(Layout(Path(sys.argv[1]))): pass"
    )
    with Store(layout):
        ran = subprocess.run([sys.executable, "-c", code, layout.root], capture_output=True, text=True, check=False)
    assert "is being written by another bitatlas run" in ran.stderr


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(BitatlasError, match="cannot write to"), Store(Layout(tmp_path / "out")):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_an_unknown_column_is_our_own_mistake(layout):
    with Store(layout) as store:
        rows = batch("one")
        rows["results"][0]["perplexitty"] = 1.0
        with pytest.raises(AssertionError, match=r"results has no column \['perplexitty'\]"):
            store.commit(rows)


def test_a_batch_without_an_event_is_our_own_mistake(layout):
    with Store(layout) as store, pytest.raises(AssertionError, match="would never count"):
        store.commit({"results": batch("one")["results"], "events": []})


def test_forget_drops_rows_and_keeps_events(layout):
    with Store(layout) as store:
        store.commit(batch("one"))
        both = batch("two")
        for name, rows in batch("three").items():
            both[name] += rows
        store.commit(both)
        store.forget([])
        assert read_table(layout.root, RESULTS).num_rows == 3
        store.forget(["one", "three", "unknown"])
        for table in (RESULTS, ITEMS, LAYERS, SLICES):
            assert read_table(layout.root, table)["job_id"].to_pylist() == ["two"]
        assert read_table(layout.root, EVENTS).num_rows == 3
        store.commit(batch("one", value=2.0))
    assert read_table(layout.root, RESULTS)["value"].to_pylist() == [1.5, 2.0]


def test_some_columns_are_read(layout):
    assert read_table(layout.root, SLICES, ["job_id"]).column_names == ["job_id"]
    with Store(layout) as store:
        store.commit(batch("one"))
    assert read_table(layout.root, SLICES, ["job_id", "whole_id"]).to_pylist() == [
        {"job_id": "one", "whole_id": "all of it"}
    ]


def test_forget_in_one_table_leaves_the_others(layout):
    with Store(layout) as store:
        store.commit(batch("one"))
        store.forget(["one"], [SLICES])
    assert read_table(layout.root, SLICES).num_rows == 0
    assert all(read_table(layout.root, table).num_rows == 1 for table in (RESULTS, ITEMS, LAYERS, EVENTS))


def test_the_last_end_of_a_job_counts(layout):
    with Store(layout) as store:
        store.commit({"events": [event("session_started"), event("started", "a", 1), event("started", "e", 1)]})
        store.commit({"events": [event("failed", "a", 2), event("finished", "b", 3), event("reused", "c", 4)]})
        store.commit({"events": [event("finished", "a", 9), event("failed", "b", 8), event("retried", "d", 9)]})
        store.commit({"events": [event("failed", "f", 2), event("merged", "f", 3)]})
    assert job_states(layout.root) == {"a": "finished", "b": "failed", "c": "finished", "f": "finished"}


def test_a_clock_that_is_behind_leaves_the_order_as_it_is(layout, monkeypatch):
    """A job fails, the sweep is taken to a machine whose clock is an hour behind, and the job is done there."""
    sessions = []
    for hours, kind in ((2, "failed"), (1, "finished"), (1, "failed"), (0, "finished")):
        monkeypatch.setattr(clock, "utc_now", lambda hours=hours: BEGAN + timedelta(hours=hours))
        with Store(layout) as store:
            sessions.append(store.session)
            store.commit({"events": [event("started", "a") | {"at": store.now()}]})
            store.commit({"events": [event(kind, "a") | {"at": store.now()}]})
    assert job_states(layout.root) == {"a": "finished"}
    assert sessions == sorted(set(sessions))
    times = read_table(layout.root, EVENTS)["at"].to_pylist()  # in the order of the parts' names
    assert times == sorted(set(times))
    assert times[-1] < BEGAN + timedelta(hours=2, seconds=5)


def test_rows_that_have_a_value(layout):
    with Store(layout) as store:
        for job in ("one", "two"):
            store.commit(batch(job))
    assert [row["outcome"] for row in read_rows(layout.root, SLICES, "job_id", "two")] == ["{}"]
    assert read_rows(layout.root, SLICES, "job_id", "three") == []
    assert len(read_rows(layout.root, SLICES, "whole_id", "all of it")) == 2


def test_a_failure_is_forgotten_under_its_task_s_id_too(layout):
    """A slice's event of failure stands beside its task's row."""
    with Store(layout) as store:
        rows = {
            "results": [{"job_id": "task", "status": "failed"}, {"job_id": "other"}],
            "events": [event("failed", "slice")],
        }
        store.commit(rows | {"events": [*rows["events"], event("finished", "other")]})
    with Store(layout) as store:
        store.forget(["task"])
    assert read_table(layout.root, RESULTS)["job_id"].to_pylist() == ["other"]


def test_reading_while_a_driver_writes_and_forgets(layout):
    """Each read sees whole batches: as many items as layers, none twice."""
    stop, seen, problems = threading.Event(), [], []

    def read():
        while not stop.is_set():
            try:
                jobs = read_table(layout.root, RESULTS)["job_id"].to_pylist()
                assert len(jobs) == len(set(jobs))
                seen.append(len(jobs))
            except Exception as error:
                problems.append(error)

    with Store(layout) as store:
        store.commit(batch("first"))
        reader = threading.Thread(target=read)
        reader.start()
        for number in range(40):
            store.commit(batch(f"job{number}"))
            if number % 4 == 3:
                store.forget([f"job{number}", f"job{number - 2}"])
        stop.set()
        reader.join()
    assert not problems
    assert seen
    assert read_table(layout.root, RESULTS).num_rows == 21


def test_pandas_duckdb_and_polars_read_the_files_as_they_are(layout):
    import duckdb
    import pandas as pd
    import polars as pl

    with Store(layout) as store:
        store.commit(batch("one"))
        store.commit(batch("two", value=2.5))
    pattern = str(layout.table("results") / "*.parquet")
    frame = pd.read_parquet(layout.table("results"))
    assert sorted(frame["value"]) == [1.5, 2.5]
    assert list(frame.columns) == list(RESULTS.columns)
    assert duckdb.sql(f"select sum(value), count(*) from '{pattern}'").fetchall() == [(4.0, 2)]
    items = str(layout.table("items") / "*.parquet")
    assert duckdb.sql(f"select log_likelihoods[2] from '{items}'").fetchall() == [(-2.5,)] * 2
    assert pl.read_parquet(pattern)["value"].sum() == 4.0
    assert pl.scan_parquet(pattern).select("started_at").collect()["started_at"][0] == BEGAN


FULL_DISK = """
import resource, sys
from datetime import UTC, datetime
from pathlib import Path
from orchestrator import clock
from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout
from orchestrator.store import Store

event = {"event": "finished", "job_id": "one", "at": datetime.now(UTC)}
with Store(Layout(Path(sys.argv[1]))) as store:
    store.commit({"results": [{"job_id": "one", "value": 1.0}], "events": [event]})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    import secrets
    rows = [{"job_id": "two", "error": secrets.token_hex(40)} for _ in range(2000)]
    try:
        store.commit({"results": rows, "events": [event | {"job_id": "two"}]})
    except BitatlasError as error:
        print(error)
    store.commit({"events": [event | {"job_id": "three"}]})
"""


def test_a_disk_that_refuses_is_said_and_loses_nothing(layout):
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, layout.root], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert ran.returncode == 0, ran.stderr
    assert "results (File too large); what is done is kept and readable: mend the disk and run" in ran.stdout
    assert read_table(layout.root, RESULTS)["job_id"].to_pylist() == ["one"]
    assert set(job_states(layout.root)) == {"one", "three"}
    assert not list(layout.root.glob("**/*.tmp"))
