"""A perplexity evaluation on a worker: what it leaves in rows, alone and beside the divergence from fp."""

import json
import math
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.devices import Claim
from cluster.pool import WorkerInfo
from evaluators import gate
from evaluators.corpora import PADDING
from orchestrator.inputs import prepare
from orchestrator.layout import Layout
from orchestrator.measured import examinable
from orchestrator.models.source import node_cache
from orchestrator.plan import make_plan
from orchestrator.rows import outcome_rows
from orchestrator.schema import ITEMS, RESULTS
from orchestrator.worker import Worker, payload_of

TEXT = {"sequence_length": 64, "tail": "keep"}
FACTS = {"reference": "fp", "top_k": 512, "version": "divergence/1"}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "own.txt"
    file.write_text("The house by the sea was empty for years, and nobody came. " * 20)
    return file


@pytest.fixture
def prepared(make_sweep, tiny_checkpoint, text_file, tmp_path, monkeypatch):
    """Jobs of fp, 8 and 2 bits by label, and their payloads; the node's cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(**entry):
        sweep = make_sweep(
            models=[{"name": "tiny", "source": str(tiny_checkpoint)}],
            grid=[{"method": "rtn", "weight_bits": [8, 2], "group_size": 32}],
            evaluation={"perplexity": [{"corpus": {"path": str(text_file)}, **TEXT, **entry}]},
        )
        inputs = prepare(sweep, "study.yaml")
        jobs = {job.label.removeprefix("tiny "): job for job in make_plan(sweep, inputs.identities).jobs}
        layout = Layout(tmp_path / "out")
        return jobs, {label: payload_of(job, inputs, layout) for label, job in jobs.items()}, inputs

    return make


def new_worker(told=None):
    return Worker(
        device=Claim(torch_device="cpu", name="a processor"),
        threads=1,
        report=[].append if told is None else told.append,
    )


QUANTIZE = ("rtn-w8-g32: quantize", "rtn-w2-g32: quantize")
EVALUATE = ("fp: own", "rtn-w8-g32: own", "rtn-w2-g32: own")


def outcomes_of(payloads, order=EVALUATE, worker=None):
    worker = worker or new_worker()
    for label in QUANTIZE:
        worker.run(payloads[label])
    return {label: worker.run(payloads[label]) for label in order}


def metrics_of(outcome):
    return {metric["metric"]: metric["value"] for metric in outcome["metrics"]}


def test_divergence_stands_beside_the_same_perplexity(prepared):
    alone = outcomes_of(prepared()[1])
    beside = outcomes_of(prepared(divergence=True)[1])
    for label in EVALUATE:
        assert list(metrics_of(alone[label])) == ["perplexity"]
        assert list(metrics_of(beside[label])) == ["perplexity", "kl_divergence", "top1_agreement"]
        assert beside[label]["metrics"][0] == alone[label]["metrics"][0]
        assert beside[label]["items"][: len(alone[label]["items"])] == alone[label]["items"]
        assert beside[label]["protocol"] == alone[label]["protocol"]
    fp, eight, two = (metrics_of(beside[label]) for label in EVALUATE)
    assert (fp["kl_divergence"], fp["top1_agreement"]) == (0, 1)
    assert 0 < eight["kl_divergence"] < two["kl_divergence"]
    assert 1 >= eight["top1_agreement"] >= two["top1_agreement"] > 0  # tied embeddings repeat the last token


def test_the_order_of_evaluations_does_not_matter(prepared):
    """Where a quantized cell comes first, its worker takes the artifact out to record what fp finds likely."""
    plain = outcomes_of(prepared(divergence=True)[1])
    worker = new_worker()
    _, payloads, _ = prepared(divergence=True)
    shutil.rmtree(node_cache() / "references")
    worker.run(payloads["rtn-w2-g32: quantize"])
    model = worker._load(payloads["fp: own"]["model"])
    worker._install(model, Path(payloads["rtn-w2-g32: own"]["artifact"]), "simulated")
    other = outcomes_of(payloads, order=("rtn-w2-g32: own", "fp: own", "rtn-w8-g32: own"), worker=worker)
    for label in EVALUATE:
        assert other[label]["metrics"] == plain[label]["metrics"]
        assert other[label]["items"] == plain[label]["items"]


@pytest.mark.parametrize("first", ["fp: own", "rtn-w8-g32: own"])
def test_fp_runs_once_and_every_cell_once_per_window(prepared, first, monkeypatch):
    monkeypatch.setattr(gate, "bos_warning", lambda *_: None)  # it runs the model for its own purpose
    _, payloads, _ = prepared(divergence=True)
    worker, calls = new_worker(), []
    for label in QUANTIZE:
        worker.run(payloads[label])
    worker._load(payloads["fp: own"]["model"]).model.register_forward_hook(lambda *_: calls.append(1))
    windows = len(payloads["fp: own"]["windows"])
    check = 2  # of the split model's parts, whenever perplexity starts
    worker.run(payloads[first])
    runs = 1 if first.startswith("fp") else 2
    assert len(calls) == runs * (windows + check)
    worker.run(payloads["rtn-w2-g32: own"])
    assert len(calls) == (runs + 1) * (windows + check)


def test_a_damaged_reference_is_recorded_again(prepared):
    told = []
    _, payloads, _ = prepared(divergence=True)
    before = outcomes_of(payloads)
    (file,) = (node_cache() / "references").glob("*/window-00002.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    after = outcomes_of(payloads, order=("rtn-w8-g32: own",), worker=new_worker(told))
    assert after["rtn-w8-g32: own"]["metrics"] == before["rtn-w8-g32: own"]["metrics"]
    assert any("was set aside" in line for line in told)


def test_rows(prepared):
    jobs, payloads, inputs = prepared(divergence=True, bos="per_window")
    began = datetime(2026, 1, 1, tzinfo=UTC)
    worker = WorkerInfo(name="w", device="d", process_id=1)
    for label, outcome in outcomes_of(payloads).items():
        rows = outcome_rows(
            "study",
            jobs[label],
            outcome,
            model=inputs.models["tiny"],
            worker=worker,
            started_at=began,
            finished_at=began,
        )
        said = {row["metric"]: json.loads(row["protocol"]) for row in rows["results"]}
        assert said["perplexity"] == {
            "sequence_length": 64, "windows": 5, "tokens": said["perplexity"]["tokens"], "bos": "per_window",
            "tail": "keep",
        }  # fmt: skip
        assert said["kl_divergence"] == said["top1_agreement"] == said["perplexity"] | FACTS
        assert {row["status"] for row in rows["results"]} == {"ok"}
        assert all(set(row) | {"error_kind", "error"} == set(RESULTS.columns) for row in rows["results"])
        assert all(set(row) == set(ITEMS.columns) for row in rows["items"])
        kls = [row["value"] for row in rows["items"] if row["metric"] == "kl_divergence"]
        assert len(kls) == (0 if label.startswith("fp") else 5)
        assert [row["stderr"] is None for row in rows["results"]] == [False, not kls, not kls]


def test_a_default_recipe_says_what_it_always_said(prepared):
    _, payloads, _ = prepared(tail="drop")
    assert outcomes_of(payloads)["fp: own"]["protocol"] == {"sequence_length": 64, "windows": 4, "tokens": 252}


def test_a_driver_that_knew_no_recipes_is_understood(prepared):
    """A worker that is replaced while a sweep runs may be newer than its driver."""
    _, payloads, _ = prepared(tail="drop")
    old = {key: payloads["fp: own"]["evaluation"][key] for key in ("corpus", "sequence_length", "max_windows")}
    found = new_worker().run(payloads["fp: own"] | {"evaluation": old})
    assert found["metrics"] == outcomes_of(payloads)["fp: own"]["metrics"]


def test_a_broken_model_has_no_divergence_and_says_where_it_broke(prepared):
    _, payloads, _ = prepared(divergence=True)
    worker = new_worker()
    whole = outcomes_of(payloads, worker=worker)
    assert [outcome["forensics"] for outcome in whole.values()] == [None, None, None]
    model = worker._load(payloads["fp: own"]["model"])
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    for label in ("fp: own", "rtn-w8-g32: own"):
        found = worker.run(payloads[label])
        assert all(math.isnan(metric["value"]) for metric in found["metrics"])
        assert found["forensics"]["window"] == 0


@pytest.mark.parametrize(
    ("nlls", "shape", "first"),
    [
        ([1.0, 2.0, 3.0], (2, 4), 0),
        ([1.0, math.nan, 3.0], (2, 4), 0),
        ([1.0, math.inf, math.nan], (2, 4), 0),
        ([1.0, 2.0, math.nan], (1, 3), 2),
    ],
)
def test_windows_that_can_be_examined(nlls, shape, first):
    windows = np.arange(12).reshape(3, 4)
    assert examinable(windows, nlls) == (pytest.approx(windows), nlls, 0)
    windows[2, 3] = PADDING
    looked_at, losses, start = examinable(windows, nlls)
    assert (looked_at.shape, start) == (shape, first)
    assert losses == nlls[start : start + len(looked_at)] or math.isnan(losses[-1])
    assert looked_at.min() >= 0
    assert examinable(windows[2:], [3.0])[0].shape == (1, 3)
