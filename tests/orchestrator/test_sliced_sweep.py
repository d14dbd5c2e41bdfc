"""Sweeps whose tasks are cut into slices: the same rows as without, whatever happens on the way."""

import json

import pytest
import torch
import yaml

from cluster.pool import InlinePool
from evaluators import slices
from orchestrator import sweep
from orchestrator.commands import plan_command
from orchestrator.inputs import prepare
from orchestrator.layout import Layout
from orchestrator.plan import make_plan
from orchestrator.schema import EVENTS, ITEMS, RESULTS, SLICES
from orchestrator.store import Store, read_table
from orchestrator.sweep import Driver, finished_jobs
from orchestrator.view import QuietView
from orchestrator.worker import Worker

# What may differ between two runs of the same work.
CIRCUMSTANCES = {
    "quantize_seconds", "evaluate_seconds", "peak_memory_bytes", "worker", "device", "started_at", "finished_at",
}  # fmt: skip
FAILING: set[str] = set()  # labels of jobs that fail


class MoodyWorker(Worker):
    """Fails where it is told to, and has a broken model where that is wanted."""

    is_broken = False

    def run(self, payload):
        if payload["label"] in FAILING:
            raise RuntimeError(f"no {payload['label']} today")
        return super().run(payload)

    def _load(self, model):
        loaded = super()._load(model)
        if self.is_broken:
            with torch.no_grad():
                loaded.model.norm.weight.fill_(float("nan"))
        return loaded


class Killed(BaseException):
    """The driver's process ends here."""


class ShortLivedPool(InlinePool):
    """Takes the driver with it before a number of jobs have come back."""

    def __init__(self, factory, jobs):
        super().__init__(factory)
        self._left = jobs

    def wait(self, seconds):
        if not self._left:
            raise Killed
        self._left -= 1
        return super().wait(seconds)


@pytest.fixture(autouse=True)
def small_units_committed_one_by_one(monkeypatch):
    monkeypatch.setattr(slices, "UNIT_DOCUMENTS", 2)
    monkeypatch.setattr(sweep, "_COMMIT_SECONDS", 0.0)
    FAILING.clear()


@pytest.fixture(scope="module")
def prepared_sweep(make_sweep, tiny_checkpoint):
    """A sweep of fp and 4 bits on one task of nine documents (five units), its inputs and its plan."""
    made = {}

    def make(count, rounding="float32"):
        if (count, rounding) not in made:
            sweep = make_sweep(
                models=[{"name": "tiny", "source": str(tiny_checkpoint)}],
                grid=[{"method": "rtn", "weight_bits": 4, "group_size": 32}],
                evaluation={"tasks": [{"name": "arc_easy", "limit": 9, "slices": count, "rounding": rounding}]},
            )
            inputs = prepare(sweep, "study.yaml")
            made[count, rounding] = sweep, inputs, make_plan(sweep, inputs.identities)
        return made[count, rounding]

    return make


@pytest.fixture
def run(prepared_sweep):
    def start(out, count, *, jobs=1000, rounding="float32"):
        sweep, inputs, plan = prepared_sweep(count, rounding)
        layout = Layout(out)
        pool = ShortLivedPool("test_sliced_sweep:MoodyWorker", jobs)
        with Store(layout) as store:
            return Driver(sweep=sweep, plan=plan, inputs=inputs, layout=layout, store=store, pool=pool).run(QuietView())

    return start


def rows(out, table, *without):
    keep = [column for column in table.columns if column not in CIRCUMSTANCES | set(without)]
    return sorted(tuple(map(repr, row.values())) for row in read_table(out, table).select(keep).to_pylist())


def assert_same_rows(out, other):
    for table in (RESULTS, ITEMS):
        assert rows(out, table) == rows(other, table)


def events(out, kind):
    return sorted(row["job"] for row in read_table(out, EVENTS).to_pylist() if row["event"] == kind)


@pytest.fixture(scope="module")
def unsliced(prepared_sweep, tmp_path_factory):
    """The output of the sweep in one piece."""
    out = tmp_path_factory.mktemp("unsliced") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "UNIT_DOCUMENTS", 2)
        sweep, inputs, plan = prepared_sweep(1)
        with Store(Layout(out)) as store:
            pool = InlinePool("orchestrator.worker:Worker")
            driver = Driver(sweep=sweep, plan=plan, inputs=inputs, layout=Layout(out), store=store, pool=pool)
            assert driver.run(QuietView()).failed == 0
    return out


@pytest.mark.parametrize(("asked", "count"), [(1, 1), (3, 3), (7, 5)])
def test_the_rows_do_not_depend_on_the_slices(unsliced, run, tmp_path, asked, count):
    summary = run(tmp_path / "out", asked)
    assert (summary.failed, summary.left, summary.finished) == (0, 0, 1 + 2 * count)
    assert_same_rows(tmp_path / "out", unsliced)
    assert len(rows(unsliced, ITEMS)) == 2 * 9 * 2
    assert read_table(tmp_path / "out", SLICES).num_rows == 0
    whole = ["tiny fp: arc_easy", "tiny rtn-w4-g32: arc_easy"]
    assert events(tmp_path / "out", "merged") == (whole if count > 1 else [])


def test_the_rounding_of_hflm_does_not_depend_on_the_slices(unsliced, run, tmp_path):
    outs = {count: tmp_path / str(count) for count in (1, 3)}
    for count, out in outs.items():
        assert run(out, count, rounding="hflm").failed == 0
    assert_same_rows(*outs.values())
    protocols = {row["protocol"] for row in read_table(outs[1], RESULTS).to_pylist()}
    assert {json.loads(protocol)["scoring"] for protocol in protocols} == {"rows (as HFLM)"}
    assert rows(outs[1], ITEMS) != rows(unsliced, ITEMS)


def test_a_broken_model_is_as_broken_in_slices(run, tmp_path, monkeypatch):
    monkeypatch.setattr(MoodyWorker, "is_broken", True)
    for count in (1, 3):
        run(tmp_path / str(count), count)
    assert_same_rows(tmp_path / "1", tmp_path / "3")
    assert {row["status"] for row in read_table(tmp_path / "3", RESULTS).to_pylist()} == {"non_finite"}
    ends = [row for row in read_table(tmp_path / "3", EVENTS).to_pylist() if row["event"] == "merged"]
    assert [row["status"] for row in ends] == ["non_finite"] * 2


def test_costs_are_those_of_all_slices(run, tmp_path, monkeypatch):
    taken = iter([1.0, 2.0, 4.0] * 2)
    peaks = iter([5, 7, 6] * 2)
    do = MoodyWorker.run

    def measured(self, payload):
        outcome = do(self, payload)
        return (
            outcome
            if payload["kind"] == "quantize"
            else outcome
            | {
                "seconds": next(taken),
                "peak_memory_bytes": next(peaks),
            }
        )

    monkeypatch.setattr(MoodyWorker, "run", measured)
    run(tmp_path / "out", 3)
    for row in read_table(tmp_path / "out", RESULTS).to_pylist():
        assert (row["evaluate_seconds"], row["peak_memory_bytes"]) == (7.0, 7)
        assert row["worker"] == "cpu-0@inline"
        assert row["started_at"] < row["finished_at"]


def test_a_score_at_chance_is_warned_of_once_and_of_the_whole(unsliced, run, tmp_path):
    run(tmp_path / "out", 3)
    told = {row["error"] for row in read_table(unsliced, EVENTS).to_pylist() if row["event"] == "warning"}
    assert len(told) == 1
    assert "of 9" in next(iter(told))
    again = [row for row in read_table(tmp_path / "out", EVENTS).to_pylist() if row["event"] == "warning"]
    assert [(row["job"], row["error"]) for row in again] == [("tiny fp: arc_easy", next(iter(told)))]


@pytest.mark.parametrize("jobs", range(0, 7, 2))
def test_a_killed_driver_is_resumed_slice_by_slice(unsliced, run, tmp_path, prepared_sweep, jobs):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(out, 3, jobs=jobs)
    assert len(finished_jobs(Layout(out), prepared_sweep(3)[2])) == jobs
    assert {row["job_id"] for row in read_table(out, ITEMS).to_pylist()} <= {
        row["job_id"] for row in read_table(out, RESULTS).to_pylist()
    }
    summary = run(out, 3)
    assert (summary.reused, summary.finished, summary.failed) == (jobs, 7 - jobs, 0)
    assert_same_rows(out, unsliced)
    assert read_table(out, SLICES).num_rows == 0


def test_a_batch_that_was_not_completed_does_not_count(unsliced, run, tmp_path, monkeypatch):
    """The driver dies between the task's items and the event that makes them count."""
    out = tmp_path / "out"
    write = Store._write

    def dying(self, table, name, new):
        if table is EVENTS and any(event["event"] == "merged" for event in new):
            raise Killed
        write(self, table, name, new)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_write", dying)
        with pytest.raises(Killed):
            run(out, 3)
    assert read_table(out, ITEMS).num_rows > 0
    summary = run(out, 3)
    assert (summary.reused, summary.finished) == (2, 5)
    assert_same_rows(out, unsliced)


def test_slices_that_outlived_their_task_are_dropped(unsliced, run, tmp_path, monkeypatch):
    """The driver dies between the task's rows and the dropping of its slices'."""
    out = tmp_path / "out"
    forget = Store.forget

    def dying(self, job_ids, tables=None):
        job_ids = list(job_ids)
        if tables == [SLICES] and job_ids:
            raise Killed
        forget(self, job_ids, tables)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "forget", dying)
        with pytest.raises(Killed):
            run(out, 3)
    assert read_table(out, SLICES).num_rows == 2
    run(out, 3)
    assert_same_rows(out, unsliced)
    assert read_table(out, SLICES).num_rows == 0


def test_a_slice_that_fails_makes_its_task_a_failed_row_until_it_is_done(unsliced, run, tmp_path):
    out = tmp_path / "out"
    FAILING.update({"tiny fp: arc_easy 1/3", "tiny fp: arc_easy 2/3"})
    summary = run(out, 3)
    assert (summary.finished, summary.failed) == (5, 2)
    assert summary.failures[0] == "tiny fp: arc_easy 1/3: RuntimeError: no tiny fp: arc_easy 1/3 today"
    (failed,) = [row for row in read_table(out, RESULTS).to_pylist() if row["status"] == "failed"]
    assert failed["job_id"] in {row["job_id"] for row in read_table(unsliced, RESULTS).to_pylist()}
    assert (failed["task"], failed["cell_id"], failed["value"]) == ("arc_easy", "tiny.fp", None)
    assert failed["error"] == "slice 1/3: RuntimeError: no tiny fp: arc_easy 1/3 today"
    assert {row["cell_id"].partition(".")[2][:3] for row in read_table(out, ITEMS).to_pylist()} == {"rtn"}
    assert read_table(out, SLICES).num_rows == 1

    FAILING.clear()
    summary = run(out, 3)
    assert (summary.reused, summary.finished, summary.failed) == (5, 2, 0)
    assert_same_rows(out, unsliced)


def test_a_sweep_is_done_whatever_its_slices_were(unsliced, run, tmp_path, prepared_sweep):
    out = tmp_path / "out"
    run(out, 3)
    for count in (1, 2, 3, 7):
        plan = prepared_sweep(count)[2]
        ids = {job.id for job in plan.jobs}
        assert finished_jobs(Layout(out), plan) == finished_jobs(Layout(unsliced), plan) == ids


def test_other_slices_than_those_begun_start_anew_and_leave_nothing(unsliced, run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(out, 3, jobs=2)
    assert run(out, 2).reused == 0
    assert_same_rows(out, unsliced)
    run(out, 1)
    assert read_table(out, SLICES).num_rows == 0


def test_a_slice_s_row_holds_every_bit(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(out, 3, jobs=1)
    (row,) = read_table(out, SLICES).to_pylist()
    kept = json.loads(row["outcome"])["slice"]["items"]
    assert len(kept) == 2
    assert all(isinstance(score, float) for item in kept for score in item["log_likelihoods"])


def test_the_plan_counts_slices(prepared_sweep, tmp_path, tiny_checkpoint, capsys):
    sweep, _, plan = prepared_sweep(3)
    assert [job.label for job in plan.jobs][:3] == [f"tiny fp: arc_easy {number}/3" for number in (1, 2, 3)]
    file = tmp_path / "study.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "name": "study",
                "models": [{"name": "tiny", "source": str(tiny_checkpoint)}],
                "grid": [{"method": "rtn", "weight_bits": 4, "group_size": 32}],
                "evaluation": {"tasks": [{"name": "arc_easy", "limit": 9, "slices": 3}]},
            }
        )
    )
    assert plan_command(file, out=tmp_path / "out") == 0
    assert "2 cells, 7 jobs, 0 done" in capsys.readouterr().out
    assert sweep.evaluation.tasks[0].slices == 3
