"""`plan`, `fetch` and `doctor` of a search file, and a search that reads what was fetched."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from orchestrator import cli
from orchestrator.bundle.manifest import read_manifest
from orchestrator.doctor.needs import needs_of
from orchestrator.errors import BitatlasError
from orchestrator.reads import NOTHING_ELSE, read_either
from orchestrator.search.config import read_search
from orchestrator.search.plan_view import plan_search, window_forwards
from orchestrator.search.prepare import prepared
from tests.orchestrator.search.test_probe import TINY
from tests.orchestrator.search.test_search_end_to_end import write_search

OWN = [{"path": "own.txt"}, {"path": "more.jsonl", "field": "text"}]


@pytest.fixture
def own_text(tmp_path, monkeypatch):
    """Two corpora in files, named relative to where the command is run."""
    monkeypatch.chdir(tmp_path)
    words = [f"The {word} stood on the table, and nobody knew why." for word in ("cup", "lamp", "book", "key")]
    (tmp_path / "own.txt").write_text("\n\n".join(words * 60))
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in words * 60))
    return OWN


def bitatlas(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["bitatlas", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_a_plan_tells_bank_budgets_and_time_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    file = write_search(tmp_path / "search.yaml", search={"front": {"evaluations": 10}})
    assert bitatlas(monkeypatch, "plan", file, "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "tiny: the bank: 3 cells, 3 jobs, 0 done" in told
    assert "16 groups (16 free), 10^7 allocations, 2.290 to 4.331 bits/weight" in told
    lines = [line for line in told.splitlines() if " bits " in line and "│" in line]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert [(name, bits, uniform) for name, _, bits, uniform in rows] == [
        ("3.3 bits", "3.300", "uniform 2-g64 (2.290)"),
        ("4 bits", "4.000", "uniform 3-g64 (3.326)"),
    ]
    weights = 8 * int(rows[1][1].replace(",", "")) / 4
    assert int(rows[0][1].replace(",", "")) == int(3.3 * weights / 8)
    assert re.search(
        r"estimated time: at most .* on 2 cpu workers \(the bank .*, the cells .*, sensitivities .*, budgets", told
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["search.yaml"]


def test_what_a_plan_counts(tmp_path):
    found = prepared(read_search(write_search(tmp_path / "search.yaml")), "s")
    # 48 choices on one window each, in the float model and on each budget's uniform allocation, half of the blocks run.
    assert window_forwards(found) == {"sensitivities": 48 * 3 / 2, "budgets": 2 * 30 * 6}


def test_an_outline_is_refused(tmp_path):
    with pytest.raises(BitatlasError, match=r"--outline is of sweeps; a search needs the model and the texts of"):
        plan_search(write_search(tmp_path / "search.yaml"), out=None, outline=True)


def test_a_sweep_file_makes_nothing_else_be_read(tmp_path):
    file = write_search(tmp_path / "search.yaml")
    sweep = {key: value for key, value in yaml.safe_load(file.read_text()).items() if key != "search"}
    file.write_text(yaml.safe_dump(sweep | {"grid": [{"method": "rtn", "weight_bits": 4}]}))
    assert read_either(file)[1] == NOTHING_ELSE


WINDOWS = """
import sys
from pathlib import Path
from rich.console import Console
from orchestrator.search.config import read_search
from orchestrator.search.prepare import prepared, search_with_data
search, _ = search_with_data(read_search(Path(sys.argv[1])), sys.argv[1], Console(quiet=True))
print([corpus["path"] for corpus in search.settings.corpus])
print(prepared(search, "s").windows.tolist())
"""


def in_a_process(*arguments):
    """A bundle is entered before anything that reads the Hub's variables is imported: a process of its own."""
    program = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    return program.returncode, program.stdout, program.stderr


def test_its_texts_are_fetched_and_then_read_from_the_bundle(tmp_path, monkeypatch, own_text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_search(tmp_path / "search.yaml", search={"corpus": own_text})
    fetch = ("-c", "from orchestrator.cli import main; main()", "fetch", file, "--to", tmp_path / "bundle")
    assert in_a_process(*fetch)[0] == 0
    assert {"own.txt", "more.jsonl", str(TINY)} == set(read_manifest(tmp_path / "bundle", "x").local)
    expected = prepared(read_search(file), "s").windows.tolist()
    for corpus in own_text:
        (tmp_path / corpus["path"]).unlink()

    with_bundle = yaml.safe_load(file.read_text()) | {"data": "bundle"}
    file.write_text(yaml.safe_dump(with_bundle))
    code, told, error = in_a_process("-c", WINDOWS, file)
    assert code == 0, error
    paths, windows = map(json.loads, told.replace("'", '"').splitlines())
    assert all(path.startswith(str(tmp_path / "bundle")) for path in paths)
    assert windows == expected

    with_bundle["search"]["corpus"] = [{"path": "other.txt"}]
    file.write_text(yaml.safe_dump(with_bundle))
    code, _, error = in_a_process("-c", WINDOWS, file)
    assert "search.corpus[0].path = 'other.txt' is not in the bundle" in error


def test_what_a_doctor_looks_for(tmp_path, own_text):
    task = {"objective": "task", "task": {"name": "copa"}, "sequence_length": None}
    by_task = write_search(tmp_path / "task.yaml", search=task | {"windows": 1, "guard_windows": 1})
    needs = [need.what for need in needs_of(*in_order(by_task))]
    assert "task copa" in needs
    file = write_search(tmp_path / "search.yaml", search={"corpus": own_text})
    assert {"corpus own", "corpus more"} <= {need.what for need in needs_of(*in_order(file))}
    (tmp_path / "own.txt").unlink()
    (missing,) = [need for need in needs_of(*in_order(file)) if need.trouble]
    assert missing.trouble.startswith(f"{file}: search.corpus[0]: own.txt is no file")


def in_order(file):
    sweep, reads = read_either(file)
    return sweep, str(file), reads
