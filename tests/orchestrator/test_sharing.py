"""What workers share within a sweep and what they tell of it, on a real small model in this process."""

import pytest

from cluster.pool import InlinePool
from orchestrator.atlas import load
from orchestrator.facts import FACTS
from orchestrator.history import read_history
from orchestrator.inputs import prepare
from orchestrator.layout import Layout
from orchestrator.plan import make_plan
from orchestrator.schema import EVENTS
from orchestrator.status import read_progress
from orchestrator.store import Store, read_table
from orchestrator.sweep import Driver
from orchestrator.view import QuietView


@pytest.fixture
def run(make_sweep, tiny_checkpoint, tmp_path, monkeypatch):
    """Run a sweep in a directory; its events in order."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node"))

    def start(out):
        sweep = make_sweep(
            models=[{"name": "tiny", "source": str(tiny_checkpoint)}],
            grid=[
                {"method": "rtn", "weight_bits": 4, "group_size": 32},
                {"method": "gptq", "weight_bits": [4, 3], "group_size": 32, "options": {"path": "float"}},
            ],
            calibration={"corpus": "lambada", "samples": 2, "sequence_length": 64},
            evaluation={
                "perplexity": [
                    {"corpus": "boolq-passages", "sequence_length": 64, "max_windows": 2, "divergence": True}
                ]
            },
        )
        inputs = prepare(sweep, "study.yaml")
        layout, plan = Layout(tmp_path / out), make_plan(sweep, inputs.identities)
        with Store(layout) as store:
            pool = InlinePool("orchestrator.worker:Worker")
            driver = Driver(sweep=sweep, plan=plan, inputs=inputs, layout=layout, store=store, pool=pool)
            assert driver.run(QuietView()).failed == 0
        return sorted(read_table(layout.root, EVENTS).to_pylist(), key=lambda event: event["at"])

    return start


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
