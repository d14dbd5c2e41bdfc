"""What workers share within a sweep and between sweeps, and what they tell of it: a real small model, this process."""

import pytest

from cluster.pool import InlinePool
from evaluators import slices
from orchestrator.atlas import load
from orchestrator.facts import FACTS
from orchestrator.history import read_history
from orchestrator.inputs import prepare
from orchestrator.layout import Layout
from orchestrator.plan import make_plan
from orchestrator.schema import EVENTS, ITEMS, LAYERS, RESULTS
from orchestrator.status import read_progress
from orchestrator.store import Store, read_table
from orchestrator.sweep import Driver
from orchestrator.view import QuietView

# What may differ between two runs of the same work.
CIRCUMSTANCES = {"worker", "started_at", "finished_at"}
MEASURED = {"quantize_seconds", "evaluate_seconds", "peak_memory_bytes", "seconds"}
GRID = [
    {"method": "rtn", "weight_bits": 4, "group_size": 32},
    {"method": "gptq", "weight_bits": [4, 3], "group_size": 32, "options": {"path": "float"}},
]
OTHER_GRID = [GRID[0], GRID[1] | {"weight_bits": [4, 2]}]
PERPLEXITY = {"corpus": "boolq-passages", "sequence_length": 64, "max_windows": 2, "divergence": True}


@pytest.fixture
def run(make_sweep, tiny_checkpoint, tmp_path, monkeypatch):
    """Run a sweep in a directory, on a node with a cache of its own name; its events in order."""

    def start(out, *, node="node", cache=None, name="tiny", grid=GRID, evaluation=None):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / node))
        sweep = make_sweep(
            models=[{"name": name, "source": str(tiny_checkpoint)}],
            grid=grid,
            calibration={"corpus": "lambada", "samples": 2, "sequence_length": 64},
            evaluation=evaluation or {"perplexity": [PERPLEXITY]},
        )
        inputs = prepare(sweep, "study.yaml")
        layout, plan = Layout(tmp_path / out), make_plan(sweep, inputs.identities)
        with Store(layout) as store:
            pool = InlinePool("orchestrator.worker:Worker")
            driver = Driver(sweep=sweep, plan=plan, inputs=inputs, layout=layout, store=store, pool=pool, cache=cache)
            assert driver.run(QuietView()).failed == 0
        return sorted(read_table(layout.root, EVENTS).to_pylist(), key=lambda event: event["at"])

    return start


def values(out, *without):
    """Everything that was measured, by table."""
    found = {}
    for table in (RESULTS, ITEMS, LAYERS):
        keep = [column for column in table.columns if column not in CIRCUMSTANCES.union(without)]
        found[table.name] = sorted(
            tuple(map(repr, row.values())) for row in read_table(out, table).select(keep).to_pylist()
        )
    return found


def told(events, kind):
    return [event["job"].removeprefix("tiny ") for event in events if event["event"] == kind]


def test_each_thing_is_computed_once_and_told_of_its_job(run, tmp_path):
    events = run("first")
    assert told(events, "model_loaded") == ["fp: boolq-passages"]
    assert len(told(events, "statistics_computed")) == len(told(events, "statistics_read")) == 1
    assert {*told(events, "statistics_computed"), *told(events, "statistics_read")} == {
        "gptq-w4-g32: quantize",
        "gptq-w3-g32: quantize",
    }
    assert told(events, "reference_computed") == ["fp: boolq-passages"]
    assert len(told(events, "reference_read")) == 3
    assert len(told(events, "artifact_made")) == 3
    for event in events:
        if event["event"] in FACTS:
            assert event["seconds"] > 0
            assert (event["worker"], event["attempt"]) == ("cpu-0@inline", 1)
            assert None not in (event["device"], event["cell_id"], event["job_id"], event["session"])

    events = run("second")
    assert told(events, "statistics_computed") == told(events, "reference_computed") == []
    assert (len(told(events, "statistics_read")), len(told(events, "reference_read"))) == (2, 4)


def test_a_job_ends_after_what_it_tells_and_no_reader_takes_it_for_more(run, tmp_path):
    events = run("out")
    assert sum(event["event"] in FACTS for event in events) == 10
    last = {event["job_id"]: event["event"] for event in events if event["job_id"]}
    assert set(last.values()) == {"finished"}
    assert len(last) == 7

    out = tmp_path / "out"
    assert set(read_history(out).states().values()) == {"finished"}
    assert len(read_history(out).observed()) == 7
    progress = read_progress(out)
    assert (progress.done, progress.running, progress.failed, progress.warnings) == (7, [], [], [])
    history = load(out).history
    assert (history.sessions, history.retries, history.reused, history.running) == (1, 0, 0, ())


def test_a_second_sweep_does_only_what_the_first_did_not(run, tmp_path):
    cache = tmp_path / "cache"
    run("first", node="a", cache=cache)
    events = run("second", node="b", cache=cache, name="other", grid=OTHER_GRID)
    alone = run("alone", node="c", name="other", grid=OTHER_GRID)

    assert told(events, "artifact_made") == ["other gptq-w2-g32: quantize"]
    assert told(events, "finished") == ["other gptq-w2-g32: quantize", "other gptq-w2-g32: boolq-passages"]
    assert len(told(events, "reused")) == 5
    assert told(events, "model_loaded") == ["other gptq-w2-g32: boolq-passages"]
    assert told(events, "statistics_read") == ["other gptq-w2-g32: quantize"]
    assert told(events, "reference_read") == ["other gptq-w2-g32: boolq-passages"]
    assert not told(events, "warning")
    assert len(told(alone, "artifact_made")) == 3
    assert values(tmp_path / "second", *MEASURED) == values(tmp_path / "alone", *MEASURED)
    assert len(list((tmp_path / "second" / "artifacts").iterdir())) == 3
    assert {event["job_id"] for event in read_history(tmp_path / "second").observed()} == {
        event["job_id"] for event in events if event["event"] == "finished"
    }

    events = run("third", node="d", cache=cache)
    assert not told(events, "finished")
    assert not told(events, "model_loaded")
    assert values(tmp_path / "third") == values(tmp_path / "first")  # seconds and bytes are those of then


def test_slices_are_found_too_and_what_is_damaged_is_measured_again(run, tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "UNIT_DOCUMENTS", 2)
    task = {"tasks": [{"name": "arc_easy", "limit": 4, "slices": 2}]}
    cache = tmp_path / "cache"
    run("first", cache=cache, grid=GRID[:1], evaluation=task)
    for file in sorted((cache / "outcomes").iterdir())[:1]:
        file.write_text(file.read_text()[:-20])
    (block, *_) = cache.glob("artifacts/*/block-0000.safetensors")
    block.unlink()
    block.write_bytes(b"rubbish")
    events = run("second", cache=cache, grid=GRID[:1], evaluation=task)
    assert len(told(events, "reused")) == 3
    assert len(told(events, "finished")) == 2
    assert len(told(events, "merged")) == 2
    warnings = [event["error"] for event in events if event["event"] == "warning"]
    assert sum("set aside" in warning for warning in warnings) == 2
    assert values(tmp_path / "first", *MEASURED) == values(tmp_path / "second", *MEASURED)
