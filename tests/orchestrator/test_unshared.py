"""Workers that do not see the output directory: artifacts stay on their node, and its workers alone evaluate them."""

import numpy as np
import pytest

from cluster.failures import Failure
from cluster.pool import Change, Completion, InlinePool, WorkerInfo
from orchestrator import recovery
from orchestrator.inputs import Inputs, prepare
from orchestrator.layout import Layout
from orchestrator.plan import make_plan
from orchestrator.schema import EVENTS, RESULTS
from orchestrator.store import Store, read_table
from orchestrator.sweep import Driver
from orchestrator.view import QuietView

OUTCOME = {
    "reused": False,
    "layers": [],
    "metrics": [{"metric": "perplexity", "value": 1.0, "stderr": None, "n": 1, "higher_is_better": False}],
    "items": [],
    "protocol": {},
    "seconds": 0.01,
    "peak_memory_bytes": None,
    "quantize_seconds": None,
    "stored_bytes": None,
    "published_bits_per_weight": None,
}


class TwoNodes:
    """Two nodes that see no output directory, with a worker each, whose artifacts are where they were made. One node's
    worker is lost when it has quantized so many cells."""

    def __init__(self, kind=None, after=1, returns=False):
        self.workers = {
            name: WorkerInfo(name=name, device="card", process_id=0, sees_output=False)
            for name in ("npu-0@n1", "npu-0@n2")
        }
        self.artifacts = {name: set() for name in self.workers}
        self._kind, self._after, self._returns = kind, after, returns
        self._running, self._changes, self._absent = {}, [], None

    def submit(self, worker, payload):
        self._running[worker] = payload

    def wait(self, _):
        done = []
        for worker, payload in list(self._running.items()):
            lost = worker == "npu-0@n2" and len(self.artifacts[worker]) >= self._after
            if self._kind and lost and payload["kind"] == "evaluate":
                failure = Failure(kind=self._kind, message="it is gone")
                self._absent = self.workers.pop(worker)
                self._changes.append(Change(worker=self._absent, reason=failure))
                self._kind = None
                done.append(Completion(worker=worker, failure=failure))
                continue
            if payload["kind"] == "quantize":
                self.artifacts[worker].add(payload["artifact"])
            elif payload["artifact"] is not None:
                assert payload["artifact"] in self.artifacts[worker]
            assert payload["sees_output"] is False
            result = OUTCOME | ({"metrics": []} if payload["kind"] == "quantize" else {})
            done.append(Completion(worker=worker, result=result, seconds=0.01))
        self._running = {}
        if self._absent and self._returns and not self._changes and not done:  # the other has nothing left to do
            self.workers[self._absent.name] = self._absent
            self._changes.append(Change(worker=self._absent))
            self._absent = None
        return done

    def changes(self):
        changes, self._changes = self._changes, []
        return changes

    def activity(self):
        return {}

    def close(self):
        pass


class Listening(QuietView):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture
def sweep_on(tmp_path, make_sweep, make_identities, model_input):
    grid = [{"method": "rtn", "weight_bits": [8, 6, 4, 3], "group_size": 64}]
    sweep = make_sweep(grid=grid, calibration=None)
    (corpus,) = sweep.evaluation.perplexity
    windows = {("tiny", corpus.key): np.zeros((2, 64), np.int64)}
    inputs = Inputs(models={"tiny": model_input}, windows=windows, identities=make_identities(sweep))
    plan = make_plan(sweep, inputs.identities)

    def start(pool):
        layout, view = Layout(tmp_path / "out"), Listening()
        with Store(layout) as store:
            summary = Driver(sweep=sweep, plan=plan, inputs=inputs, layout=layout, store=store, pool=pool).run(view)
        assert (summary.failed, summary.left) == (0, 0)
        rows = [row["job_id"] for row in read_table(layout.root, RESULTS).to_pylist()]
        assert len(rows) == len(set(rows)) == 10  # fp and four cells, twice evaluated
        return read_table(layout.root, EVENTS).to_pylist(), view.warnings

    return start


def of_kind(events, kind):
    return [event for event in events if event["event"] == kind]


def test_one_line_says_so_and_every_cell_is_evaluated_where_it_was_made(sweep_on):
    pool = TwoNodes()
    events, warnings = sweep_on(pool)
    (line,) = warnings
    assert "out is not seen by n1, n2: what is quantized there stays" in line
    assert not of_kind(events, "redone")
    assert all(pool.artifacts.values())


def test_what_a_lost_node_had_is_quantized_again_elsewhere(sweep_on):
    events, _ = sweep_on(TwoNodes("node_lost"))
    redone = of_kind(events, "redone")
    assert redone
    assert {event["error"] for event in redone} == {"its artifact lies on n2, without workers"}
    ends = {event["job_id"]: event["worker"] for event in of_kind(events, "finished")}
    assert {ends[event["job_id"]] for event in redone} == {"npu-0@n1"}


def test_a_worker_that_comes_back_finds_what_it_made(sweep_on):
    events, _ = sweep_on(TwoNodes("worker_lost", returns=True))
    assert of_kind(events, "worker_lost")
    assert not of_kind(events, "redone")


def test_one_that_does_not_come_back_is_not_waited_for_long(sweep_on, monkeypatch):
    monkeypatch.setattr(recovery, "_AWAIT_SECONDS", 0.2)
    events, _ = sweep_on(TwoNodes("worker_lost"))
    assert of_kind(events, "redone")


def test_a_real_worker_keeps_its_artifacts_in_its_node_s_cache(make_sweep, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node"))
    sweep = make_sweep(
        models=[{"name": "tiny", "source": str(tiny_checkpoint)}],
        grid=[{"method": "rtn", "weight_bits": 4, "group_size": 32}],
        calibration=None,
        evaluation={"perplexity": [{"corpus": "boolq-passages", "sequence_length": 64, "max_windows": 2}]},
    )
    inputs = prepare(sweep, "study.yaml")
    plan = make_plan(sweep, inputs.identities)

    def run(out):
        pool = InlinePool("orchestrator.worker:Worker")
        (name,) = pool.workers
        pool._info = WorkerInfo(name=name, device="cpu", process_id=0, sees_output=False)
        layout = Layout(tmp_path / out)
        with Store(layout) as store:
            driver = Driver(sweep=sweep, plan=plan, inputs=inputs, layout=layout, store=store, pool=pool)
            assert driver.run(QuietView()).failed == 0
        assert not layout.artifacts.exists()
        return read_table(layout.root, EVENTS)["event"].to_pylist()

    assert run("first").count("artifact_made") == 1
    (artifact,) = (tmp_path / "node" / "bitatlas" / "artifacts").iterdir()
    assert (artifact / "artifact.json").exists()
    events = run("second")  # as a resumed sweep whose job lands there again
    assert (events.count("artifact_made"), events.count("reused")) == (0, 1)
