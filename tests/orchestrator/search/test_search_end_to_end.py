"""`bitatlas search` on the small trained openPangu: real quantizers, tables and reports; once on real Ray, killed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import optuna
import psutil
import pytest
import yaml

from cluster.pool import InlinePool
from orchestrator import cli
from orchestrator.errors import BitatlasError
from orchestrator.models.loading import model_shape
from orchestrator.running import Running
from orchestrator.schema import EVENTS, LAYERS, RESULTS
from orchestrator.search import command
from orchestrator.search.records import SENSITIVITY, TRIALS, Records
from orchestrator.store import read_table
from orchestrator.witness import left_witness

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]
TINY = Path(__file__).parents[2] / "assets" / "openpangu-tiny"
BUDGETS = [3.3, 4.0]


def write_search(path, *, search=None, **changes):
    document = {
        "name": "tiny",
        "models": [{"name": "tiny", "source": str(TINY)}],
        "calibration": {"corpus": "lambada", "samples": 8, "sequence_length": 128, "seed": 0},
        "evaluation": {
            "perplexity": [{"corpus": "boolq-passages", "sequence_length": 128, "max_windows": 12, "divergence": True}]
        },
        "workers": {"device": "cpu", "count": 2},
        "search": {
            "bank": {"method": "gptq", "weight_bits": [2, 3, 4], "group_size": 64},
            "budgets": BUDGETS,
            "sequence_length": 64,
            "windows": 6,
            "guard_windows": 3,
            "evaluations": 30,
            "offspring": 6,
            "sensitivity": {"bases": ["fp", "uniform"], "windows": 1},
        }
        | (search or {}),
    }
    document["search"] = {key: value for key, value in document["search"].items() if value is not None}
    path.write_text(yaml.safe_dump(document | changes))
    return path


@pytest.fixture(scope="module")
def inline():
    """The command with one worker in this process, in place of Ray."""

    @contextmanager
    def started(sweep, layout, factory, *_, **__):
        with left_witness(layout.root) as witness:
            yield Running(pool=InlinePool(factory), witness=witness)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "started_pool", started)
        patch.setattr("orchestrator.running._with_metrics", without_metrics)
        yield


@contextmanager
def without_metrics(view, *_):
    yield view


def search(file, out):
    return command.search_command(file, out=out, report=True)


@pytest.fixture(scope="module")
def done(inline, tmp_path_factory):
    place = tmp_path_factory.mktemp("search")
    file, out = write_search(place / "search.yaml"), place / "out"
    assert search(file, out) == 0
    return file, out


def chosen(out):
    return json.loads(Records(out).chosen.read_text())


def values(out, metric):
    rows = read_table(out, RESULTS).to_pylist()
    return {row["cell_id"]: row for row in rows if row["metric"] == metric}


def test_chosen_allocations_are_cells_beside_uniform_ones(done):
    _, out = done
    rows = values(out, "kl_divergence")
    found = chosen(out)
    assert [study["study"] for study in found["studies"]] == ["3.3 bits", "4 bits"]
    for study, budget in zip(found["studies"], BUDGETS, strict=True):
        row = rows[study["cell"]]
        assert row["status"] == "ok"
        assert row["decoder_bits_per_weight"] == pytest.approx(study["bits_per_weight"], abs=1e-12)
        assert row["decoder_bits_per_weight"] <= budget
        assert '"layers"' in row["options"]
    uniform = [row for row in rows.values() if row["method"] == "gptq" and '"layers"' not in row["options"]]
    assert {row["weight_bits"] for row in uniform} <= {2, 3, 4}
    assert uniform
    best = min(row["value"] for row in uniform if row["decoder_bits_per_weight"] <= 3.34)
    assert rows[found["studies"][0]["cell"]]["value"] < best


def test_layers_have_the_bits_that_were_chosen(done):
    _, out = done
    space = json.loads(Records(out).space.read_text())
    for study in chosen(out)["studies"]:
        rows = [row for row in read_table(out, LAYERS).to_pylist() if row["cell_id"] == study["cell"]]
        stored = {row["layer"]: row["stored_bytes"] for row in rows}
        for group, index in zip(space, study["allocation"], strict=True):
            assert sum(stored[name] for name in group["linears"]) == group["choices"][index]["stored_bytes"]
        assert sum(stored.values()) == study["stored_bytes"] <= study["budget_bytes"]


def test_tables_say_what_was_measured(done):
    _, out = done
    records = Records(out)
    sensitivity, trials = records.rows(SENSITIVITY), records.rows(TRIALS)
    groups = json.loads(records.space.read_text())
    fp = [row for row in sensitivity if row["base"] == "fp"]
    assert len(fp) == sum(len(group["choices"]) for group in groups) == 16 * 3
    bases = {row["base"] for row in sensitivity}
    assert {base for base in bases if not base.startswith("about ")} == {"fp", "uniform 2-g64", "uniform 3-g64"}
    assert len(bases) > 3
    assert all(row["loss"] >= 0 for row in fp)
    for study in chosen(out)["studies"]:
        own = [row for row in trials if row["study"] == study["study"]]
        assert max(row["stored_bytes"] for row in own) <= study["budget_bytes"]
        assert len(own) == study["trials"]
        guards = [row["guard_loss"] for row in own if row["guard_loss"] is not None]
        assert min([*guards, *(start["guard_loss"] for start in study["starts"])]) == study["guard_loss"]


def test_the_journal_is_a_study_that_optuna_reads(done):
    _, out = done
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(Records(out).journal)))
    study = optuna.load_study(study_name="3.3 bits", storage=storage)
    rows = [row for row in Records(out).rows(TRIALS) if row["study"] == "3.3 bits" and row["state"] == "complete"]
    assert study.best_value == min(row["loss"] for row in rows)


def test_the_same_command_again_does_nothing_new(done):
    file, out = done
    before = {table: read_table(out, table).num_rows for table in (RESULTS, LAYERS)}
    trials, found = Records(out).rows(TRIALS), chosen(out)
    assert search(file, out) == 0
    assert {table: read_table(out, table).num_rows for table in (RESULTS, LAYERS)} == before
    assert Records(out).rows(TRIALS) == trials
    assert [study["cell"] for study in chosen(out)["studies"]] == [study["cell"] for study in found["studies"]]


def test_more_evaluations_go_on_with_the_trials_that_are_there(done, tmp_path):
    _, out = done
    before = [row for row in Records(out).rows(TRIALS) if row["study"] == "3.3 bits"]
    more = write_search(tmp_path / "search.yaml", search={"evaluations": 40, "budgets": [3.3], "patience": 1000})
    assert search(more, out) == 0
    after = [row for row in Records(out).rows(TRIALS) if row["study"] == "3.3 bits"]
    assert after[: len(before)] == before
    assert len(after) > len(before)
    assert chosen(out)["studies"][0]["guard_loss"] <= min(
        row["guard_loss"] for row in before if row["guard_loss"] is not None
    )


def test_another_sampler_is_another_study_in_the_same_journal(done, tmp_path):
    _, out = done
    other = write_search(tmp_path / "search.yaml", search={"sampler": "tpe", "budgets": [3.3], "evaluations": 8})
    assert search(other, out) == 0
    assert {row["study"] for row in Records(out).rows(TRIALS)} == {"3.3 bits", "4 bits", "3.3 bits, tpe"}
    assert chosen(out)["studies"][0]["cell"] in values(out, "kl_divergence")


@pytest.fixture(scope="module")
def by_task(inline, tmp_path_factory):
    """An AWQ bank, steered by one half of COPA and guarded by the other."""
    place = tmp_path_factory.mktemp("by-task")
    changes = {
        "bank": {"method": "awq", "weight_bits": [3, 4], "group_size": 64},
        "objective": "task",
        "task": {"name": "copa"},
        "budgets": [3.8],
        "sequence_length": None,
        "windows": 1,
        "guard_windows": 1,
        "evaluations": 10,
        "offspring": 4,
        "evaluate_starts": True,
        "sensitivity": {"bases": ["fp"], "windows": 1, "rounds": 0},
    }
    evaluation = {
        "perplexity": [{"corpus": "boolq-passages", "sequence_length": 128, "max_windows": 12, "divergence": True}],
        "tasks": [{"name": "copa"}],
    }
    file = write_search(place / "search.yaml", search=changes, evaluation=evaluation)
    assert search(file, place / "out") == 0
    return place / "out"


def test_a_task_steers_and_guards(by_task):
    """Losses are cross entropies of two choices; the cell's own score is of the same documents, quantized again."""
    found = chosen(by_task)
    assert found["objective"] == "task copa"
    (study,) = found["studies"]
    trials = Records(by_task).rows(TRIALS)
    losses = [row["loss"] for row in trials]
    assert all(0 < loss < 3 for loss in losses)
    assert len(set(losses)) > 1
    assert study["guard_loss"] <= min(start["guard_loss"] for start in study["starts"])
    assert 0 <= values(by_task, "acc")[study["cell"]]["value"] <= 1
    page = (by_task / "atlas.html").read_text()
    assert "cross entropy among the choices of copa" in page


def test_an_awq_bank_ends_in_an_awq_cell(by_task):
    (study,) = chosen(by_task)["studies"]
    (knapsack,) = [start for start in study["starts"] if start["name"] == "knapsack fp"]
    assert len(set(knapsack["allocation"])) == 2
    for one in (study, knapsack):
        row = values(by_task, "kl_divergence")[one["cell"]]
        assert (row["method"], row["status"]) == ("awq", "ok")
        assert row["decoder_bits_per_weight"] == pytest.approx(one["bits_per_weight"], abs=1e-12)
        assert row["decoder_bits_per_weight"] <= 3.8
    assert '"layers"' in row["options"]


def test_the_embedding_is_a_choice_of_its_own(inline, tmp_path, capsys):
    """Under bytes of the whole checkpoint, which the chosen cell's rows then count themselves."""
    shape = model_shape(TINY, "auto", "model")
    assert list(shape.matrices) == ["embedding"]  # tied
    budget = round(0.3 * shape.fp_bytes)
    changes = {
        "bank": {"method": "rtn", "weight_bits": [2, 3, 4], "group_size": 64},
        "embedding": [3, 4, 8, 16],
        "pinned": {"*.1.mlp.down_proj": 16},
        "budgets": [{"checkpoint_bytes": budget}],
        "evaluations": 12,
        "sensitivity": {"bases": ["fp"], "windows": 2},
        "front": {"evaluations": 20, "cells": 1},
    }
    file, out = write_search(tmp_path / "search.yaml", search=changes), tmp_path / "out"
    assert search(file, out) == 0
    study, front = chosen(out)["studies"]
    rows = values(out, "kl_divergence")
    row = rows[study["cell"]]
    assert row["checkpoint_bytes"] <= budget
    options = json.loads(row["options"])
    space = json.loads(Records(out).space.read_text())
    assert [group["role"] for group in space if "role" in group] == ["embedding"]
    (choice,) = (space[-1]["choices"][study["allocation"][-1]],)
    assert options.get("embedding", {"weight_bits": 16})["weight_bits"] == choice["weight_bits"] < 16
    layers = [row for row in read_table(out, LAYERS).to_pylist() if row["cell_id"] == study["cell"]]
    untouched = shape.fp_bytes - sum(group["num_weights"] for group in space) * shape.bits_per_value // 8
    assert row["checkpoint_bytes"] == untouched + study["stored_bytes"]
    outputs, inputs = shape.linears["model.layers.1.mlp.down_proj"]
    assert "model.layers.1.mlp.down_proj" not in {layer["layer"] for layer in layers}
    assert sum(layer["stored_bytes"] for layer in layers) + 2 * outputs * inputs == study["stored_bytes"]
    measured = [row for row in Records(out).rows(SENSITIVITY) if row["group"] == "model.embed_tokens"]
    assert {row["weight_bits"] for row in measured if row["base"] == "fp"} == {3, 4, 8}
    assert any("embedding" in start["name"] for start in study["starts"])
    assert any(one.get("cell") in rows for one in front["front"])
    assert f"Outside of blocks: model.embed_tokens {choice['weight_bits']} bits, g64" in (out / "atlas.md").read_text()
    capsys.readouterr()
    with pytest.raises(BitatlasError, match=r"search\.head: the head of tiny is its embedding \(tied weights\)"):
        search(write_search(tmp_path / "head.yaml", search=changes | {"head": 8}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_another_bank_or_objective_is_refused_in_the_same_directory(done, tmp_path, capsys, monkeypatch):
    _, out = done
    for changes in (
        {"objective": "perplexity"},
        {"bank": {"method": "rtn", "weight_bits": [2, 3, 4], "group_size": 64}},
    ):
        other = write_search(tmp_path / "search.yaml", search=changes)
        monkeypatch.setattr(sys, "argv", ["bitatlas", "search", str(other), "--out", str(out)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert "holds a search of another bank, other tokens or another objective" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"budgets": [2.0]}, "search.budgets[0] of 368640 bytes (2.000 bits per weight) is below the least possible"),
        ({"budgets": [{"checkpoint_bytes": 1000}]}, "(embedding, norms); the least possible is"),
        (
            {"budgets": [{"checkpoint_bytes": 400_000}], "embedding": [4, 8]},
            "of 400000 bytes is too little: ",
        ),
        ({"budgets": [3.3, 3.3]}, "search.budgets names 3.3 bits twice"),
        ({"bank": {"method": "gptq", "weight_bits": 3, "group_size": 64}}, "there is nothing to search"),
        ({"pinned": {"*q_proj": 4}}, "share their input and must share their choice"),
        ({"pinned": {"*nothing*": 4}}, "names no linear"),
        ({"bank": {"method": "gptq", "weight_bits": [3, 4], "group_size": 7}}, "7"),
        ({"windows": 100000}, "search: corpus lambada gives"),
        (
            {"objective": "task", "task": {"name": "copa"}, "sequence_length": None},
            "search.task: copa has 2 units of 64 documents, fewer than search.windows + guard_windows = 9",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(changes, told, tmp_path, capsys, monkeypatch):
    file = write_search(tmp_path / "search.yaml", search=changes)
    monkeypatch.setattr(sys, "argv", ["bitatlas", "search", str(file), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def start(file, out):
    return subprocess.Popen(
        [sys.executable, "-c", "from orchestrator import cli; cli.main()", "search", str(file), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "160", "RAY_ADDRESS": "127.0.0.1:9"},
    )


def is_worker(process):
    """Ray calls an actor's process by its class while it is idle, else by its job's label."""
    title = " ".join(process.cmdline())
    return title.startswith(("ray::WorkerActor", "ray::sensitivity", "ray::3.3 bits"))


def wait_until(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.long
def test_kill_9_of_a_worker_and_of_the_driver(tmp_path):
    """On real Ray: the worker is replaced; the next command goes on with the trials that were there."""
    file = write_search(tmp_path / "search.yaml", search={"budgets": [3.3], "evaluations": 90, "patience": 1000})
    out = tmp_path / "out"
    records = Records(out)
    process = start(file, out)
    try:
        wait_until(lambda: len(records.rows(SENSITIVITY)) > 0, process)
        driver = psutil.Process(process.pid)
        workers = [child for child in driver.children(recursive=True) if is_worker(child)]
        workers[0].send_signal(signal.SIGKILL)
        wait_until(lambda: len(records.rows(TRIALS)) > 8, process)
    finally:
        process.kill()
        process.communicate()
    before = records.rows(TRIALS)
    assert len({row["trial"] for row in before}) == len(before)
    process = start(file, out)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    after = records.rows(TRIALS)
    assert after[: len(before)] == before
    assert len({row["trial"] for row in after}) == len(after)
    study = chosen(out)["studies"][0]
    assert study["window_forwards"] >= 90 * 6
    rows = [(row["base"], row["group"], row["weight_bits"]) for row in records.rows(SENSITIVITY)]
    assert len(rows) == len(set(rows)) >= 16 * 3 + 16 * 2
    assert values(out, "kl_divergence")[study["cell"]]["status"] == "ok"
    ended = read_table(out, EVENTS).to_pylist()[-1]
    assert (ended["event"], ended["status"]) == ("session_ended", "ended")
