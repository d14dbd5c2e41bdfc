"""Outcomes become rows: the declared columns, honest sizes, and a status for every number."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from cluster.failures import Failure
from cluster.pool import WorkerInfo
from orchestrator.rows import cell_columns, failure_row, outcome_rows, size_columns
from orchestrator.schema import ITEMS, LAYERS, RESULTS
from quantizers.uniform_weight import stored_bytes

BEGAN, ENDED = (datetime(2026, 1, 1, hour, tzinfo=UTC) for hour in (1, 2))
WORKER = WorkerInfo(name="cpu-0@host", device="a processor", process_id=7, software={"torch": "2.13.0"})


@pytest.fixture
def jobs(make_sweep, plan_of):
    return {job.label: job for job in plan_of(make_sweep()).jobs}


def outcome(**changes):
    metric = {"metric": "perplexity", "value": 20.0, "stderr": 0.5, "n": 126, "higher_is_better": False}
    return {
        "seconds": 3.0,
        "peak_memory_bytes": 1 << 20,
        "reused": False,
        "quantize_seconds": 1.5,
        "stored_bytes": 9216,
        "published_bits_per_weight": None,
        "protocol": {"windows": 2, "sequence_length": 64},
        "metrics": [metric],
        "items": [{"doc_id": 0, "log_likelihoods": [-3.0], "target": None, "metric": "nll", "value": 3.0}],
    } | changes


def rows_of(job, model, **changes):
    return outcome_rows(
        "study", job, outcome(**changes), model=model, worker=WORKER, started_at=BEGAN, finished_at=ENDED
    )


def test_scores_that_are_no_numbers_make_a_task_s_row_non_finite(jobs, model_input):
    job = jobs["tiny gptq-w4-g64: boolq-passages"]
    items = [{"doc_id": 0, "log_likelihoods": [math.nan, -1.0], "target": 0, "metric": "acc", "value": 1.0}]
    assert rows_of(job, model_input, items=items)["results"][0]["status"] == "non_finite"
    items[0]["log_likelihoods"] = [-math.inf, -1.0]  # a probability of zero is a score
    assert rows_of(job, model_input, items=items)["results"][0]["status"] == "ok"


def test_an_evaluation_s_rows_have_the_declared_columns(jobs, model_input):
    rows = rows_of(jobs["tiny gptq-w4-g64: boolq-passages"], model_input)
    assert set(rows["results"][0]) | {"error_kind", "error"} == set(RESULTS.columns)
    assert set(rows["items"][0]) == set(ITEMS.columns)
    assert rows["layers"] == []
    result = rows["results"][0]
    assert (result["task"], result["metric"], result["value"], result["n"]) == (
        "boolq-passages",
        "perplexity",
        20.0,
        126,
    )
    assert (result["status"], result["evaluate_seconds"], result["quantize_seconds"]) == ("ok", 3.0, 1.5)
    assert (result["worker"], result["device"]) == ("cpu-0@host", "a processor")
    assert (result["started_at"], result["finished_at"]) == (BEGAN, ENDED)
    assert json.loads(result["protocol"]) == {"sequence_length": 64, "windows": 2}
    assert result["code_version"].startswith("bitatlas ")
    assert "gptq/" in result["code_version"]


def test_a_quantizing_job_leaves_layers_alone(jobs, model_input):
    layer = {
        "layer": "a",
        "out_features": 64,
        "in_features": 64,
        "bits_per_weight": 4.5,
        "stored_bytes": 9216,
        "published_bits_per_weight": None,
        "weight_error": 0.01,
        "output_error": None,
        "damping": None,
        "seconds": 0.1,
    }
    job = jobs["tiny rtn-w4-g64: quantize"]
    rows = rows_of(job, model_input, layers=[layer], metrics=[], items=[])
    assert (rows["results"], rows["items"]) == ([], [])
    assert set(rows["layers"][0]) == set(LAYERS.columns)
    assert rows["layers"][0]["cell_id"] == job.cell.id


def test_a_cell_has_the_same_columns_in_every_table(jobs, model_input):
    job = jobs["tiny gptq-w4-g64: boolq-passages"]
    rows = rows_of(job, model_input)
    cell = cell_columns("study", job)
    for table in ("results", "items"):
        assert cell.items() <= rows[table][0].items()
    assert (cell["method"], cell["weight_bits"], cell["activation_bits"], cell["group_size"]) == ("gptq", 4, 16, 64)
    assert json.loads(cell["calibration"])["samples"] == 2
    assert json.loads(cell["options"])["act_order"] is True


def test_the_unquantized_cell_s_columns(jobs):
    cell = cell_columns("study", jobs["tiny fp: arc_easy"])
    assert (cell["method"], cell["weight_bits"], cell["activation_bits"], cell["group_size"]) == ("fp", 16, 16, 0)
    assert (cell["symmetric"], cell["options"], cell["calibration"]) == (None, "{}", None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_a_result_and_says_so(jobs, model_input, value):
    metric = outcome()["metrics"][0]
    metrics = [metric | {"value": value}, metric | {"metric": "other"}]
    rows = rows_of(jobs["tiny fp: boolq-passages"], model_input, metrics=metrics, stored_bytes=None)
    assert [row["status"] for row in rows["results"]] == ["non_finite", "ok"]
    assert str(rows["results"][0]["value"]) == str(value)


def test_a_failure_is_a_row_without_a_value(jobs):
    job = jobs["tiny gptq-w4-g64: quantize"]
    failure = Failure(kind="error", message="ValueError: no", detail="a long traceback")
    row = failure_row("study", job, failure, worker=WORKER, started_at=BEGAN, finished_at=ENDED)
    assert set(row) <= set(RESULTS.columns)
    assert (row["status"], row["error_kind"], row["error"]) == ("failed", "error", "ValueError: no")
    assert row["task"] == "quantize"
    assert "value" not in row
    lost = failure_row("study", job, failure, worker=None, started_at=BEGAN, finished_at=ENDED)
    assert (lost["worker"], lost["device"]) == (None, None)


def test_the_unquantized_model_s_size(jobs, model_input):
    size = size_columns(jobs["tiny fp: arc_easy"].cell, model_input, None)
    assert size == {"decoder_bits_per_weight": 16.0, "checkpoint_bytes": 2 * 12288 + 1000}


def test_a_quantized_model_s_size_counts_every_byte(jobs, model_input):
    # 64 columns of 4 bits are 32 bytes, one float16 scale, one 4-bit zero padded to a byte: 35 bytes a row, 192 rows.
    by_hand = (64 + 128) * (32 + 2 + 1)
    cell = jobs["tiny gptq-w4-g64: arc_easy"].cell
    stored = sum(stored_bytes(cell.scheme.grid(), *shape) for shape in model_input.shape.linears.values())
    assert stored == by_hand
    size = size_columns(cell, model_input, stored)
    assert size["decoder_bits_per_weight"] == pytest.approx(35 * 8 / 64, abs=0)
    assert size["checkpoint_bytes"] == 1000 + by_hand


def test_no_artifact_no_size(jobs, model_input):
    assert size_columns(jobs["tiny gptq-w4-g64: arc_easy"].cell, model_input, None) == {}


def test_a_row_tells_the_software_by_which_it_was_measured(jobs, model_input):
    job = jobs["tiny gptq-w4-g64: boolq-passages"]
    npu = {"torch": "2.12.0", "torch_npu": "2.12.0", "cann": "9.1.0", "driver": "25.2.0"}
    (row,) = rows_of(job, model_input, software=npu, cpu_fallback=False)["results"]
    assert json.loads(row["software"]) == npu
    assert list(json.loads(row["software"])) == sorted(npu)
    assert row["cpu_fallback"] is False
    (row,) = rows_of(job, model_input)["results"]  # kept by a version that did not tell: not this worker's
    assert (row["software"], row["cpu_fallback"]) == (None, None)


def test_a_failed_job_s_row_tells_its_worker_s_software(jobs):
    job, failure = jobs["tiny gptq-w4-g64: boolq-passages"], Failure(kind="error", message="no")
    times = {"started_at": BEGAN, "finished_at": ENDED}
    row = failure_row("study", job, failure, worker=replace(WORKER, cpu_fallback=True), **times)
    assert (row["software"], row["cpu_fallback"]) == ('{"torch": "2.13.0"}', True)
    row = failure_row("study", job, failure, worker=None, **times)
    assert (row["software"], row["cpu_fallback"]) == (None, None)
