"""Reading a sweep's directory in whatever state it is."""

import subprocess
import sys
from pathlib import Path

import pytest
from sample_sweep import CONFIG, cell_row, demo_results, demo_sweep, write_part, write_sweep

from orchestrator.atlas import load
from orchestrator.errors import BitatlasError
from orchestrator.schema import RESULTS


def test_demo(tmp_path: Path) -> None:
    atlas = load(demo_sweep(tmp_path / "out"))
    assert atlas.name == "demo"
    assert atlas.layers
    assert atlas.history.sessions == 2
    keys = [(row.cell, row.task, row.metric) for row in atlas.measurements]
    assert len(keys) == len(set(keys))


def test_a_sweep_that_has_only_just_begun(tmp_path: Path) -> None:
    atlas = load(write_sweep(tmp_path / "out"))
    assert atlas.measurements == ()
    assert all(cell.pending for cell in atlas.cells)


def test_parts_add_up_and_unfinished_ones_are_left_alone(tmp_path: Path) -> None:
    rows = demo_results()
    directory = write_sweep(tmp_path / "out", results=rows[:10])
    write_part(directory, RESULTS, rows[10:], name="part-1")
    write_part(directory, RESULTS, rows[:2], name="part-2")  # written twice by a resumed sweep
    (directory / "results" / ".part-3.parquet").write_bytes(b"PAR1 half a")
    (directory / "results" / "part-4.parquet.tmp").write_bytes(b"PAR1 half a")
    assert len(load(directory).measurements) == len(rows)


def test_a_column_that_an_older_part_lacks_is_null(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory = write_sweep(tmp_path / "out", results=[])
    row = cell_row("m", "rtn", 4, 16, 64, "") | {"task": "t", "metric": "acc", "value": 0.5, "status": "ok"}
    pq.write_table(pa.Table.from_pylist([row | {"unheard_of": 1}]), directory / "results" / "old.parquet")
    (measurement,) = load(directory).measurements
    assert measurement.stderr is None


@pytest.mark.parametrize("prepare", [False, True])
def test_a_directory_that_is_no_sweep_is_refused(tmp_path: Path, prepare: bool) -> None:
    directory = tmp_path / "nothing"
    if prepare:
        directory.mkdir()
    with pytest.raises(BitatlasError, match=r"is not a sweep: it has no sweep\.yaml"):
        load(directory)


@pytest.mark.parametrize("text", ["a: [", "- just\n- a list\n", ""])
def test_a_broken_sweep_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(BitatlasError, match=r"sweep\.yaml"):
        load(tmp_path)


def test_a_broken_part_is_named(tmp_path: Path) -> None:
    directory = write_sweep(tmp_path / "out", config=CONFIG, results=[])
    (directory / "results" / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(BitatlasError, match=r"bad\.parquet is damaged, not a readable .* sets this part aside"):
        load(directory)


def test_importing_the_atlas_imports_nothing_heavy() -> None:
    heavy = "('pyarrow', 'plotly', 'pandas', 'jinja2', 'rich', 'torch', 'ray', 'numpy', 'yaml')"
    code = f"import sys, orchestrator.atlas; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
