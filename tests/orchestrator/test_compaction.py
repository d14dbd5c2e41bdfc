"""Many parts become few: nothing lost and nothing twice, whatever moment a driver is killed or a reader looks at."""

import shutil
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchestrator import compaction, parts
from orchestrator.compaction import Batch, compact, compacted_name, groups, is_compacted, visible
from orchestrator.layout import Layout
from orchestrator.parts import check_part
from orchestrator.schema import EVENTS, ITEMS, RESULTS, TABLES
from orchestrator.store import Store, job_states, read_table

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
COUNT = 6


@pytest.fixture(autouse=True)
def a_few_is_less(monkeypatch):
    monkeypatch.setattr(compaction, "FEW_PARTS", 3)


class Killed(BaseException):
    """The driver's process ends here."""


def batch(number):
    job = f"job{number:03}"
    return {
        "results": [{"job_id": job, "value": float(number)}],
        "items": [{"job_id": job, "doc_id": index, "log_likelihoods": [-1.0, number]} for index in range(3)],
        "slices": [{"job_id": job, "outcome": "{}"}] if number == 2 else [],
        "events": [{"event": "finished", "job_id": job, "at": BEGAN + timedelta(seconds=number)}],
    }


def fill(layout, count=COUNT):
    with Store(layout) as store:
        for number in range(count):
            store.commit(batch(number))


@pytest.fixture
def layout(tmp_path):
    layout = Layout(tmp_path / "out")
    fill(layout)
    return layout


def content(layout):
    return {name: sorted(map(repr, read_table(layout.root, table).to_pylist())) for name, table in TABLES.items()} | {
        "states": job_states(layout.root)
    }


def files(layout):
    return {name: sorted(path.name for path in layout.table(name).iterdir()) for name in TABLES}


def test_names():
    assert compacted_name(["a-000001.parquet", "b-000002.parquet"]) == "b-000002-c1.parquet"
    assert compacted_name(["b-000002-c9.parquet"]) == "b-000002-c10.parquet"
    assert is_compacted("b-000002-c1.parquet")
    assert not is_compacted("20261128T053000-c0ffee-000002.parquet")
    order = ["b-000001.parquet", compacted_name(["b-000002.parquet"]), "b-000003.parquet"]
    assert sorted(order) == order


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1] * 7, ["abcdefg"]),
        ([4] * 7, ["ab", "cd", "ef"]),
        ([6, 1, 1, 6, 1, 6], ["bc"]),
        ([100], []),
        ([3, 3, 3, 3], ["abc"]),
    ],
)
def test_groups(sizes, expected):
    batches = [Batch(name=name, size=size) for name, size in zip("abcdefgh", sizes, strict=False)]
    assert ["".join(group) for group in groups(batches, 10)] == expected


def test_few_parts_hold_the_same(layout):
    before = content(layout)
    compact(layout)
    assert content(layout) == before
    (name,) = files(layout)["events"]
    assert files(layout) == {table: [name] if table != "layers" else [] for table in TABLES}
    assert all(check_part(path).is_sound for path in layout.root.rglob("*.parquet"))
    values = pq.read_table(layout.table("results") / name)["value"].to_pylist()
    assert values == sorted(values)  # in the order in which they were committed


def test_again_after_more_was_done(layout):
    compact(layout)
    with Store(layout) as store:
        for number in range(COUNT, 2 * COUNT):
            store.commit(batch(number))
    before = content(layout)
    compact(layout)
    assert content(layout) == before
    assert len(files(layout)["events"]) == 1
    assert len(job_states(layout.root)) == 2 * COUNT


def test_parts_stay_of_moderate_size(layout):
    largest = 3 * max(path.stat().st_size for path in layout.root.glob("*/*.parquet"))
    before = content(layout)
    compact(layout, largest)
    assert content(layout) == before
    assert COUNT / 3 <= len(files(layout)["events"]) < COUNT
    assert files(layout)["events"] == files(layout)["results"] == files(layout)["items"]


def test_a_small_sweep_is_left_as_it_is(tmp_path):
    layout = Layout(tmp_path / "small")
    fill(layout, 3)
    before = files(layout)
    compact(layout)
    assert files(layout) == before


def operations(monkeypatch, allowed):
    """Let so many file operations happen, then end the process before the next one; how many there were."""
    done = [0]

    def counted(do):
        def one(*arguments, **options):
            if done[0] == allowed:
                raise Killed
            done[0] += 1
            return do(*arguments, **options)

        return one

    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(compaction, "write_part", counted(parts.write_part))
    return done


def test_killed_between_any_two_steps(tmp_path, monkeypatch):
    layout = Layout(tmp_path / "count")
    fill(layout)
    shutil.copytree(layout.root, tmp_path / "whole")
    expected = content(layout)
    with monkeypatch.context() as patch:
        done = operations(patch, None)
        compact(layout)
    assert done[0] > 4 * 2 + 4 * COUNT  # four tables: written, named, and what they supersede removed
    is_done = []
    for allowed in range(done[0]):
        layout = Layout(tmp_path / f"{allowed}")
        shutil.copytree(tmp_path / "whole", layout.root)
        with monkeypatch.context() as patch:
            operations(patch, allowed)
            with pytest.raises(Killed):
                compact(layout)
        assert content(layout) == expected, allowed
        with Store(layout) as store:
            assert store.warnings == []
            assert content(layout) == expected, allowed
        left = [path for path in layout.root.rglob("*") if path.suffix in {".new", ".tmp"}]
        assert left == []
        is_done.append(len(files(layout)["events"]) == 1)
        assert is_done[-1] == (len(files(layout)["results"]) == 1)
    assert is_done == sorted(is_done)  # undone up to one step, done from there on
    assert 0 < sum(is_done) < len(is_done)


def test_killed_while_the_next_driver_brings_it_to_its_end(tmp_path, monkeypatch):
    whole = Layout(tmp_path / "whole")
    fill(whole)
    expected = content(whole)
    with monkeypatch.context() as patch:
        operations(patch, 8)  # the new parts count, the old ones are there
        with pytest.raises(Killed):
            compact(whole)
    for allowed in range(COUNT):
        layout = Layout(tmp_path / f"{allowed}")
        shutil.copytree(whole.root, layout.root)
        with monkeypatch.context() as patch:
            operations(patch, 3 * allowed)
            with pytest.raises(Killed):
                reopen(layout)
        assert content(layout) == expected
        reopen(layout)
        assert content(layout) == expected
        assert len(files(layout)["items"]) == 1


def reopen(layout):
    with Store(layout):
        pass


def test_a_reader_that_looks_all_the_time(layout, monkeypatch):
    """Results and items, each complete at every look."""
    monkeypatch.setattr(compaction, "FEW_PARTS", 1)
    problems, looks, stop = [], [], threading.Event()

    def read(table, rows):
        while not stop.is_set():
            jobs = read_table(layout.root, table, ["job_id"])["job_id"].to_pylist()
            looks.append(table.name)
            if (len(jobs), len(set(jobs))) != (rows, COUNT):
                problems.append((table.name, len(jobs), len(set(jobs))))

    readers = [threading.Thread(target=read, args=given) for given in ((RESULTS, COUNT), (ITEMS, 3 * COUNT))]
    for reader in readers:
        reader.start()
    size = max(path.stat().st_size for path in layout.root.glob("*/*.parquet"))
    for times in (2, 1000):  # parts of parts
        compact(layout, times * size)
    stop.set()
    for reader in readers:
        reader.join()
    assert problems == []
    assert len(looks) > 4
    assert len(files(layout)["events"]) == 1


def test_a_listing_that_misses_the_new_part_is_taken_again(layout, monkeypatch):
    """The new part got its name behind the reader's back, and an old one was removed before it came to that."""
    directory = layout.table(EVENTS.name)
    before = sorted(path.name for path in directory.iterdir())
    compact(layout)
    listings = iter([before[:3], *[[path.name for path in directory.iterdir()]] * 3])
    monkeypatch.setattr(compaction.os, "listdir", lambda _: next(listings))
    assert [path.name for path in visible(directory)] == [before[-1].replace(".parquet", "-c1.parquet")]


def test_a_full_disk_leaves_everything_as_it_was(layout, monkeypatch):
    before = files(layout), content(layout)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compaction, "write_part", full)
    with Store(layout) as store:
        assert store.compact() == f"the parts of {layout.root} stay as they are: No space left on device"
    assert (files(layout), content(layout)) == before


def test_a_damaged_part_stops_it_and_is_told(layout):
    part = sorted(layout.table("items").iterdir())[4]
    before = job_states(layout.root)
    with Store(layout) as store:
        part.write_bytes(part.read_bytes()[:-9])
        assert f"stay as they are: {part} is damaged" in store.compact()
    assert len(files(layout)["events"]) == COUNT
    assert job_states(layout.root) == before


def test_batches_are_put_together_while_a_sweep_runs(layout, monkeypatch):
    """Those of an earlier session, which was killed, first; and what is forgotten is found where it stands now."""
    monkeypatch.setattr(compaction, "MANY_PARTS", 4)
    expected = content(layout)
    with Store(layout) as store:
        assert store.tidy() is None
        put_together, *left = files(layout)["events"]
        assert is_compacted(put_together)
        assert len(left) == COUNT - 4
        assert content(layout) == expected
        assert store.tidy() is None  # two are few
        assert files(layout)["events"] == [put_together, *left]
        for number in range(COUNT, COUNT + 3):
            store.commit(batch(number))
            assert store.tidy() is None
        assert sum(map(is_compacted, files(layout)["events"])) == 2
        store.forget(["job001", "job005", "job006"])
        kept = [f"job{number:03}" for number in range(COUNT + 3) if number not in {1, 5, 6}]
        assert sorted(read_table(layout.root, RESULTS)["job_id"].to_pylist()) == kept
        assert sorted(set(read_table(layout.root, ITEMS)["job_id"].to_pylist())) == kept
    before = content(layout)
    reopen(layout)
    assert content(layout) == before


def test_batches_put_together_while_a_sweep_runs_stay_of_moderate_size(layout, monkeypatch):
    monkeypatch.setattr(compaction, "MANY_PARTS", COUNT)
    largest = 3 * max(path.stat().st_size for path in layout.root.glob("*/*.parquet"))
    monkeypatch.setattr(compaction, "LARGEST_BYTES", largest)
    expected = content(layout)
    with Store(layout) as store:
        assert store.tidy() is None
        assert content(layout) == expected
        assert sum(map(is_compacted, files(layout)["events"])) >= 2
        store.forget([f"job{number:03}" for number in range(COUNT)])  # wherever it stands now
    assert read_table(layout.root, RESULTS).num_rows == 0


def test_a_damaged_part_is_told_once_while_a_sweep_runs(layout, monkeypatch):
    monkeypatch.setattr(compaction, "MANY_PARTS", COUNT + 1)
    part = sorted(layout.table("items").iterdir())[4]
    with Store(layout) as store:
        part.write_bytes(part.read_bytes()[:-9])
        store.commit(batch(COUNT))
        assert f"stay as they are: {part} is damaged" in store.tidy()
        store.commit(batch(COUNT + 1))
        assert store.tidy() is None
    assert len(files(layout)["events"]) == COUNT + 2
