"""A run in numbers, on made-up jobs."""

import time

import pytest

from cluster.failures import Failure
from cluster.metrics import BY_NAME
from cluster.pool import Completion
from orchestrator.metrics_view import MetricsView
from orchestrator.schedule import Schedule
from orchestrator.telemetry import Telemetry, tokens_of
from orchestrator.view import QuietView

WORKERS = ("cpu-0@host", "cpu-1@host")


@pytest.fixture
def plan(make_sweep, plan_of):
    """fp, and RTN at 8 and 4 bits: each measured by a perplexity and a task, the quantized ones quantized first."""
    return plan_of(make_sweep(grid=[{"method": "rtn", "weight_bits": [8, 4], "group_size": 64}]))


@pytest.fixture
def schedule(plan):
    return Schedule(plan.jobs)


@pytest.fixture
def telemetry(plan):
    return Telemetry("study", plan)


def states(snapshot, metric):
    return {state: count for (sweep, state), count in snapshot.gauges[metric].items() if count or sweep != "study"}


def look(telemetry, schedule, workers=WORKERS, remaining=60.0):
    return telemetry.snapshot(schedule, workers, remaining=remaining)


def came_back(seconds=2.0, worker="cpu-0@host", **outcome):
    return Completion(worker=worker, result={"peak_memory_bytes": None, "reused": False} | outcome, seconds=seconds)


def test_at_first_all_is_waiting(telemetry, schedule):
    snapshot = look(telemetry, schedule)
    assert states(snapshot, "bitatlas_jobs") == {"waiting": 8}
    assert states(snapshot, "bitatlas_cells") == {"waiting": 3}
    assert snapshot.gauges["bitatlas_workers"] == {("study",): 2}
    assert snapshot.gauges["bitatlas_remaining_seconds"] == {("study",): 60.0}
    assert snapshot.observed == {}
    assert set(snapshot.gauges["bitatlas_jobs"]) == {
        ("study", state) for state in ("waiting", "running", "finished", "failed")
    }


def test_every_name_and_tag_is_declared(telemetry, schedule, plan):
    telemetry.attempted(plan.jobs[0], came_back(peak_memory_bytes=7, protocol={"tokens": 4}))
    telemetry.attempted(plan.jobs[1], Completion(worker="a", failure=Failure(kind="error", message="m")), retry=True)
    snapshot = look(telemetry, schedule)
    told = {"gauge": snapshot.gauges, "counter": snapshot.counters, "histogram": snapshot.observed}
    seen = {(name, kind) for kind, values in told.items() for name in values}
    assert seen == {(metric.name, metric.kind) for metric in BY_NAME.values()}
    for values in told.values():
        for name, series in values.items():
            tags = [tags for tags, _ in (series.items() if isinstance(series, dict) else series)]
            assert tags
            assert all(len(tag) == len(BY_NAME[name].tags) for tag in tags)


def test_a_cell_s_states(telemetry, schedule):
    fp = schedule.next_for("cpu-0@host")
    assert fp.cell.method == "fp"
    assert states(look(telemetry, schedule), "bitatlas_cells") == {"waiting": 2, "running": 1}
    schedule.finish("cpu-0@host")
    snapshot = look(telemetry, schedule)
    assert states(snapshot, "bitatlas_cells") == {"waiting": 2, "running": 1}, "begun, with a job left"
    assert states(snapshot, "bitatlas_jobs") == {"waiting": 7, "finished": 1}
    assert schedule.next_for("cpu-0@host").cell is fp.cell
    schedule.finish("cpu-0@host")
    assert states(look(telemetry, schedule), "bitatlas_cells") == {"waiting": 2, "finished": 1}
    while schedule.next_for("cpu-0@host"):
        schedule.finish("cpu-0@host")
    snapshot = look(telemetry, schedule)
    assert states(snapshot, "bitatlas_cells") == {"finished": 3}
    assert states(snapshot, "bitatlas_jobs") == {"finished": 8}


def test_a_failed_job_makes_its_cell_fail_whatever_else_ends(telemetry, schedule):
    schedule.next_for("cpu-0@host")
    schedule.fail("cpu-0@host", retry=True)
    assert states(look(telemetry, schedule), "bitatlas_jobs") == {"waiting": 8}
    schedule.next_for("cpu-0@host")
    schedule.fail("cpu-0@host", retry=False)  # one of fp's two
    assert states(look(telemetry, schedule), "bitatlas_cells") == {"waiting": 2, "failed": 1}
    assert schedule.next_for("cpu-0@host").cell.method == "fp"
    assert states(look(telemetry, schedule), "bitatlas_cells") == {"waiting": 2, "failed": 1}
    schedule.finish("cpu-0@host")
    assert schedule.next_for("cpu-0@host").kind == "quantize"
    schedule.fail("cpu-0@host", retry=False)  # with two evaluations that need it
    snapshot = look(telemetry, schedule)
    assert states(snapshot, "bitatlas_jobs") == {"waiting": 3, "finished": 1, "failed": 4}
    assert states(snapshot, "bitatlas_cells") == {"waiting": 1, "failed": 2}


def test_a_job_that_is_done_again_counts_once(telemetry, schedule):
    while schedule.next_for("cpu-0@host").kind != "quantize":
        schedule.finish("cpu-0@host")
    quantizing = schedule.finish("cpu-0@host")
    look(telemetry, schedule)
    assert schedule.next_for("cpu-0@host").needs == quantizing.id
    schedule.fail("cpu-0@host", retry=True)
    schedule.redo(quantizing)
    assert states(look(telemetry, schedule), "bitatlas_jobs") == {"waiting": 6, "finished": 2}
    while schedule.next_for("cpu-0@host"):
        schedule.finish("cpu-0@host")
        assert sum(states(look(telemetry, schedule), "bitatlas_cells").values()) == 3
    assert states(look(telemetry, schedule), "bitatlas_cells") == {"finished": 3}


def test_what_earlier_runs_finished_counts(plan):
    done = [job.id for job in plan.jobs if job.cell.method == "fp"]
    snapshot = look(Telemetry("study", plan), Schedule(plan.jobs, [*done, "no longer of the plan"]))
    assert states(snapshot, "bitatlas_jobs") == {"waiting": 6, "finished": 2}
    assert states(snapshot, "bitatlas_cells") == {"waiting": 2, "finished": 1}


def test_seconds_are_observed_once_and_reuse_is_none(telemetry, schedule, plan):
    perplexity, task = plan.jobs[:2]
    telemetry.attempted(perplexity, came_back(2.0))
    telemetry.attempted(task, came_back(3.0))
    telemetry.attempted(task, came_back(9.0, reused=True))
    telemetry.attempted(task, Completion(worker="a", failure=Failure(kind="error", message="m"), seconds=9.0))
    stages = [("study", "boolq-passages"), ("study", "arc_easy")]
    snapshot = look(telemetry, schedule)
    assert snapshot.observed == {"bitatlas_stage_seconds": list(zip(stages, [2.0, 3.0], strict=True))}
    assert snapshot.counters["bitatlas_worker_seconds"] == {stages[0]: 2.0, stages[1]: 3.0 + 9.0 + 9.0}
    assert look(telemetry, schedule).observed == {}


def test_tokens_add_up_and_their_rate_is_the_latest(telemetry, schedule, plan):
    stage = ("study", "boolq-passages")
    telemetry.attempted(plan.jobs[0], came_back(2.0, protocol={"tokens": 100}))
    telemetry.attempted(plan.jobs[0], came_back(3.0, protocol={"tokens": 400}))
    telemetry.attempted(plan.jobs[1], came_back(3.0, items=[{"doc_id": 0}]))
    snapshot = look(telemetry, schedule)
    assert snapshot.counters["bitatlas_tokens"] == {stage: 500}
    assert snapshot.gauges["bitatlas_tokens_per_second"] == {stage: 100.0}
    assert look(telemetry, schedule).gauges["bitatlas_tokens_per_second"] == {stage: 100.0}
    telemetry.attempted(plan.jobs[0], came_back(1.0, protocol={"tokens": 300}))
    snapshot = look(telemetry, schedule)
    assert snapshot.counters["bitatlas_tokens"] == {stage: 800}
    assert snapshot.gauges["bitatlas_tokens_per_second"] == {stage: 300.0}


def test_retries_by_kind(telemetry, schedule, plan):
    for kind, retry in (("worker_lost", True), ("worker_lost", True), ("out_of_memory", True), ("error", False)):
        lost = Completion(worker="cpu-0@host", failure=Failure(kind=kind, message="m"))
        telemetry.attempted(plan.jobs[0], lost, retry=retry)
    assert look(telemetry, schedule).counters["bitatlas_retries"] == {
        ("study", "worker_lost"): 2,
        ("study", "out_of_memory"): 1,
    }


def test_memory_is_the_latest_job_s_and_gone_with_its_worker(telemetry, schedule, plan):
    def memory(workers):
        gauge = look(telemetry, schedule, workers).gauges["bitatlas_peak_memory_bytes"]
        return {worker: peak for (_, worker), peak in gauge.items()}

    telemetry.attempted(plan.jobs[0], came_back(worker="cpu-0@host", peak_memory_bytes=9))
    telemetry.attempted(plan.jobs[0], came_back(worker="cpu-0@host", peak_memory_bytes=7))
    telemetry.attempted(plan.jobs[0], came_back(worker="cpu-1@host"))  # not known there
    assert memory(WORKERS) == {"cpu-0@host": 7}
    assert memory(["cpu-1@host"]) == {"cpu-0@host": 0}
    assert memory(WORKERS) == {"cpu-0@host": 0}, "back, and nothing known of it"


@pytest.mark.parametrize(
    ("outcome", "tokens"),
    [
        ({"layers": []}, 0),
        ({"protocol": {"tokens": 126}, "items": [{"doc_id": 0}]}, 126),
        ({"protocol": {}, "items": [{"doc_id": 0, "subtask": None, "answer_tokens": None}]}, 0),
        # Two metrics of one document, and another one.
        ({"items": [{"doc_id": d, "subtask": None, "answer_tokens": 5} for d in (0, 0, 1)]}, 10),
        ({"slice": {"items": [{"doc_id": 3, "subtask": "a", "answer_tokens": 4}]}}, 4),
    ],
)
def test_tokens_of_an_outcome(outcome, tokens):
    assert tokens_of(outcome) == tokens


class Recorder(QuietView):
    def __init__(self):
        self.told = []

    def begin(self, *_):
        self.told.append("begin")

    def update(self, *_):
        self.told.append("update")

    def attempted(self, *_, retry=False):
        self.told.append("attempted")

    def warn(self, text):
        self.told.append(text)

    def end(self, _):
        self.told.append("end")


class Sink:
    def __init__(self, error=None):
        self.snapshots, self._error = [], error

    def send(self, snapshot):
        self.snapshots.append(snapshot)
        if self._error:
            raise self._error
        return True


@pytest.mark.parametrize("error", [None, RuntimeError("Ray is gone")])
def test_a_view_that_sends_now_and_then_and_passes_everything_on(plan, schedule, monkeypatch, error):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    inner, sink = Recorder(), Sink(error)
    view = MetricsView(inner, sink, "study")
    view.begin(plan, schedule, dict.fromkeys(WORKERS), lambda: 5.0)
    for moment, sent in ((101.0, 1), (104.9, 1), (105.0, 2), (105.1, 2)):
        now[0] = moment
        view.update(schedule, {})
        assert len(sink.snapshots) == sent
    view.attempted(plan.jobs[0], came_back(1.5))
    view.warn("careful")
    view.end(schedule)
    assert len(sink.snapshots) == 3
    assert sink.snapshots[-1].observed == {"bitatlas_stage_seconds": [(("study", "boolq-passages"), 1.5)]}
    assert sink.snapshots[0].gauges["bitatlas_remaining_seconds"] == {("study",): 5.0}
    assert inner.told == ["begin", *["update"] * 4, "attempted", "careful", "end"]
