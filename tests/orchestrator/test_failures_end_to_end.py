"""Every kind of failure that a job can have, provoked in one sweep on a real Ray, and the rows that it leaves."""

import os
import signal
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from cluster.ray_pool import RayPool
from cluster.session import ray_session
from evaluators.errors import DataError
from orchestrator.inputs import prepare
from orchestrator.layout import Layout
from orchestrator.plan import make_plan
from orchestrator.schema import EVENTS, LAYERS, RESULTS
from orchestrator.store import Store, read_table
from orchestrator.sweep import Driver
from orchestrator.view import QuietView
from orchestrator.worker import Worker
from quantizers.errors import NumericalError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NOTES = "TROUBLE_NOTES"  # a directory with a line per attempt: label, worker's process, share of memory
CORPUS = "boolq-passages"


class TroubledWorker(Worker):
    """Does what the job's label stands for below, on the first or on every attempt."""

    def run(self, payload):
        label = payload["label"].removeprefix("tiny ")
        notes = Path(os.environ[NOTES]) / label.replace(": ", "-")
        with notes.open("a") as file:
            file.write(f"{os.getpid()} {payload['memory_share']}\n")
        trouble = TROUBLES.get(label)
        if trouble:
            trouble(len(notes.read_text().splitlines()), payload)
        return super().run(payload)


def dies(attempt, payload):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_once(attempt, payload):
    if attempt == 1:
        dies(attempt, payload)


def hangs_once(attempt, payload):
    if attempt == 1:
        time.sleep(600)


def lacks_memory(attempt, payload):
    raise MemoryError("no room for a pack")


def lacks_memory_once(attempt, payload):
    if payload["memory_share"] == 1:
        raise MemoryError("no room for a pack")


def lacks_data(attempt, payload):
    raise DataError("the data is not here")


def is_singular(attempt, payload):
    raise NumericalError("the Hessian is not positive definite")


def breaks(attempt, payload):
    raise RuntimeError("a defect")


def damages_its_artifact(attempt, payload):
    if attempt == 1:
        (Path(payload["artifact"]) / "block-0000.safetensors").write_bytes(b"rubbish")


TROUBLES = {
    f"fp: {CORPUS}": hangs_once,
    "rtn-w8-g32: quantize": dies_once,
    f"rtn-w8-g32: {CORPUS}": damages_its_artifact,
    f"rtn-w7-g32: {CORPUS}": dies,
    f"rtn-w6-g32: {CORPUS}": lacks_memory,
    f"rtn-w5-g32: {CORPUS}": lacks_memory_once,
    f"rtn-w4-g32: {CORPUS}": lacks_data,
    "rtn-w3-g32: quantize": is_singular,
    f"rtn-w2-g32: {CORPUS}": breaks,
}


@pytest.fixture(scope="module")
def swept(make_sweep, tiny_checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("troubles")
    (directory / "notes").mkdir()
    sweep = make_sweep(
        models=[{"name": "tiny", "source": str(tiny_checkpoint)}],
        grid=[{"method": "rtn", "weight_bits": [8, 7, 6, 5, 4, 3, 2], "group_size": 32}],
        evaluation={"perplexity": [{"corpus": CORPUS, "sequence_length": 64, "max_windows": 2}]},
        workers={"device": "simulated-npu", "count": 2},
    )
    inputs = prepare(sweep, "study.yaml")
    layout, plan = Layout(directory / "out"), make_plan(sweep, inputs.identities)
    with (
        ray_session(device="simulated-npu", count=2, threads=1) as session,
        closing(
            RayPool(
                session,
                "tests.orchestrator.test_failures_end_to_end:TroubledWorker",
                {NOTES: str(directory / "notes")},
                stuck_seconds=60,  # a busy machine may take half of that to import torch
            )
        ) as pool,
        Store(layout) as store,
    ):
        driver = Driver(sweep=sweep, plan=plan, inputs=inputs, layout=layout, store=store, pool=pool)
        summary = driver.run(QuietView())
    return directory, summary


@pytest.fixture(scope="module")
def rows(swept):
    found = read_table(swept[0] / "out", RESULTS).to_pylist()
    return {(row["weight_bits"], row["task"]): row for row in found}


def attempts(swept, label):
    return [line.split() for line in (swept[0] / "notes" / label).read_text().splitlines()]


def events(swept, label):
    found = read_table(swept[0] / "out", EVENTS).to_pylist()
    return [(row["event"], row["error_kind"]) for row in found if row["job"] == f"tiny {label}"]


def test_the_sweep_ends_and_says_what_failed(swept):
    _, summary = swept
    assert (summary.left, summary.failed, len(summary.failures)) == (0, 6, 5)  # 3 bits: quantizing and what needs it


def test_no_job_has_two_rows(swept, rows):
    assert read_table(swept[0] / "out", RESULTS).num_rows == len(rows)
    layers = read_table(swept[0] / "out", LAYERS).to_pylist()
    assert set(Counter((row["cell_id"], row["layer"]) for row in layers).values()) == {1}


@pytest.mark.parametrize(
    ("bits", "task", "kind", "message"),
    [
        (7, CORPUS, "quarantined", "brought down 3 workers, the last one so: worker simulated-npu-"),
        (6, CORPUS, "out_of_memory", "no room for a pack (tried 3 times)"),
        (4, CORPUS, "data", "the data is not here (tried 2 times)"),
        (3, "quantize", "numerical", "the Hessian is not positive definite"),
        (2, CORPUS, "error", "RuntimeError: a defect"),
    ],
)
def test_a_job_that_is_given_up_leaves_a_row(rows, bits, task, kind, message):
    row = rows[bits, task]
    assert (row["status"], row["error_kind"], row["value"]) == ("failed", kind, None)
    assert message in row["error"]
    assert row["worker"].startswith("simulated-npu-")


@pytest.mark.parametrize("bits", [16, 8, 5])
def test_a_job_that_recovers_is_like_any_other(rows, bits):
    assert rows[bits, CORPUS]["status"] == "ok"


@pytest.mark.parametrize(
    ("label", "kind"),
    [("rtn-w8-g32: quantize", "worker_lost"), (f"fp: {CORPUS}", "stuck")],
)
def test_a_lost_worker_s_job_is_done_by_another(swept, label, kind):
    told = events(swept, label)
    at = told.index(("worker_lost", kind))
    assert told[at : at + 3] == [("worker_lost", kind), ("retried", kind), ("started", None)]
    first, second = (process for process, _ in attempts(swept, label.replace(": ", "-"))[:2])
    assert first != second


def test_out_of_memory_takes_less_at_a_time_and_goes_elsewhere_in_the_end(swept):
    tried = attempts(swept, f"rtn-w6-g32-{CORPUS}")
    assert [share for _, share in tried] == ["1.0", "0.5", "0.25"]
    assert [share for _, share in attempts(swept, f"rtn-w5-g32-{CORPUS}")] == ["1.0", "0.5"]


def test_a_damaged_artifact_is_set_aside_and_made_again(swept):
    out = swept[0] / "out"
    assert ("redone", None) in events(swept, "rtn-w8-g32: quantize")
    assert events(swept, f"rtn-w8-g32: {CORPUS}").count(("retried", "damaged")) == 1
    (aside,) = (out / "set_aside" / "artifacts").glob("*/*")
    assert (out / "artifacts" / aside.name).is_dir()
    assert (aside / "block-0000.safetensors").read_bytes() == b"rubbish"
