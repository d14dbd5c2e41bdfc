"""The driver on made-up jobs: its estimates, told, corrected and kept; and when rows are committed."""

import json

import numpy as np
import pytest

from cluster.pool import Completion, WorkerInfo
from orchestrator import compaction, cost_store
from orchestrator import sweep as sweep_module
from orchestrator.cost_store import read_observations
from orchestrator.inputs import Inputs
from orchestrator.layout import Layout
from orchestrator.plan import make_plan
from orchestrator.schema import EVENTS
from orchestrator.store import Store, read_table
from orchestrator.sweep import Driver
from orchestrator.view import QuietView

OUTCOME = {
    "reused": False,
    "layers": [],
    "metrics": [],
    "items": [],
    "protocol": {},
    "seconds": 2.0,
    "peak_memory_bytes": None,
    "quantize_seconds": None,
    "stored_bytes": None,
    "published_bits_per_weight": None,
}


class MadeUpPool:
    """Two workers whose jobs take 2 seconds, by their own account; quantizing finds its artifact there already."""

    seconds = 2.0
    dies_after = None  # completions

    def __init__(self):
        names = ("cuda-0@a", "cuda-1@a")
        self.workers = {name: WorkerInfo(name=name, device="card", process_id=0) for name in names}
        self._running = {}

    def submit(self, worker, payload):
        self._running[worker] = OUTCOME | {"reused": payload["kind"] == "quantize"}

    def wait(self, _):
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                raise RuntimeError("the pool broke")
        done, self._running = self._running, {}
        return [Completion(worker=worker, result=result, seconds=self.seconds) for worker, result in done.items()]

    def changes(self):
        return []

    def activity(self):
        return {}


class Watching(QuietView):
    def __init__(self):
        self.left, self.warnings = [], []

    def begin(self, plan, schedule, workers, left=None):
        self._left = left
        self.left.append(left())

    def update(self, schedule, activity):
        self.left.append(self._left())

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture
def run(tmp_path, make_sweep, make_identities, model_input, monkeypatch):
    monkeypatch.setattr(cost_store, "LEAST_KEPT_WORK", 0)  # the model is tiny
    sweep = make_sweep(grid=[{"method": "rtn", "weight_bits": [8, 4], "group_size": 64}], calibration=None)
    (corpus,) = sweep.evaluation.perplexity
    identities = make_identities(sweep)
    windows = {("tiny", corpus.key): np.zeros((2, 64), np.int64)}
    inputs = Inputs(models={"tiny": model_input}, windows=windows, identities=identities)

    def start(out, kept):
        layout, view, plan = Layout(tmp_path / out), Watching(), make_plan(sweep, identities)
        with Store(layout) as store:
            driver = Driver(
                sweep=sweep, plan=plan, inputs=inputs, layout=layout, store=store, pool=MadeUpPool(), kept=kept
            )
            summary = driver.run(view)
        assert (summary.finished, summary.failed, summary.left) == (8, 0, 0)
        return layout, view

    return start


def test_kept_for_the_next_sweep(run, tmp_path):
    kept = tmp_path / "cache" / "rates.json"
    _, view = run("first", kept)
    assert view.warnings == []
    assert view.left[0] < 1  # by the nominal rate this model takes no time
    assert view.left[-1] == 0
    seen = read_observations(kept)[0].seen
    assert list(seen) == ["card"]
    assert {kind: len(jobs) for kind, jobs in seen["card"].items()} == {"perplexity": 3, "task arc_easy": 3}

    layout, view = run("second", kept)
    assert view.left[0] == pytest.approx(6, rel=0.5)  # six evaluations of 2 s on two workers
    (started,) = [row for row in read_table(layout.root, EVENTS).to_pylist() if row["event"] == "session_started"]
    assert started["seconds"] == pytest.approx(view.left[0], rel=0.01)


def test_damage_is_told_and_mended(run, tmp_path):
    kept = tmp_path / "rates.json"
    kept.write_text("{")
    _, view = run("out", kept)
    assert [warning for warning in view.warnings if "is damaged and not used" in warning] == view.warnings
    assert len(view.warnings) == 1
    assert set(json.loads(kept.read_text())["devices"]["card"]) == {"perplexity", "task arc_easy"}


def test_nothing_is_kept_where_no_place_is_named(run, tmp_path):
    run("out", None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def parts(layout):
    return len(list(layout.table(EVENTS.name).glob("*.parquet")))


def events(layout, kind):
    return [row["job"] for row in read_table(layout.root, EVENTS).to_pylist() if row["event"] == kind]


def test_short_jobs_are_committed_together(run, monkeypatch):
    monkeypatch.setattr(sweep_module, "_COMMIT_SECONDS", 60.0)
    monkeypatch.setattr(sweep_module, "_COMMIT_WORK_SECONDS", 1e9)
    layout, _ = run("together", None)
    assert parts(layout) == 3  # started, all jobs, ended
    assert len(events(layout, "finished")) + len(events(layout, "reused")) == 8


def test_much_work_is_committed_at_once(run, monkeypatch):
    monkeypatch.setattr(sweep_module, "_COMMIT_SECONDS", 60.0)
    monkeypatch.setattr(MadeUpPool, "seconds", 3600.0)
    layout, _ = run("alone", None)
    assert parts(layout) - 2 >= 4  # two workers: whenever they came back


def test_parts_of_a_run_that_ended_are_put_together(run, monkeypatch):
    monkeypatch.setattr(sweep_module, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(compaction, "FEW_PARTS", 2)
    layout, view = run("out", None)
    assert parts(layout) == 1
    assert view.warnings == []
    assert len(events(layout, "finished")) + len(events(layout, "reused")) == 8


def test_a_damaged_part_is_told_and_its_jobs_are_done_again(run, monkeypatch):
    monkeypatch.setattr(sweep_module, "_COMMIT_SECONDS", 60.0)
    monkeypatch.setattr(sweep_module, "_COMMIT_WORK_SECONDS", 1e9)
    layout, _ = run("out", None)
    _, part, _ = sorted(layout.table(EVENTS.name).glob("*.parquet"))  # started, all jobs, ended
    part.write_bytes(part.read_bytes()[:50])  # these jobs leave no rows to tell of them
    _, view = run("out", None)
    (warning,) = view.warnings
    assert f"{part} was damaged and is now" in warning
    assert (layout.set_aside("events") / part.name).exists()


def test_a_driver_that_breaks_keeps_what_came_back(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_module, "_COMMIT_SECONDS", 60.0)
    monkeypatch.setattr(sweep_module, "_COMMIT_WORK_SECONDS", 1e9)
    monkeypatch.setattr(MadeUpPool, "dies_after", 2)
    with pytest.raises(RuntimeError, match="the pool broke"):
        run("broken", None)
    layout = Layout(tmp_path / "broken")
    assert len(events(layout, "finished")) + len(events(layout, "reused")) == 4  # of two workers, twice
