"""Outcomes -> rows. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from cluster.failures import Failure
from cluster.pool import WorkerInfo
from orchestrator import __version__
from orchestrator.inputs import ModelInput
from orchestrator.plan import Cell, Job
from orchestrator.scheme import UNQUANTIZED_BITS, Scheme

# Columns of an item that has neither a group nor a generated text.
_NO_TEXT = {"subtask": None, "answer": None, "thought": None, "answer_tokens": None, "is_cut": None, "is_loop": None}


def cell_columns(sweep: str, job: Job) -> dict[str, Any]:
    """The columns that say which cell a row belongs to."""
    cell, scheme = job.cell, job.cell.scheme
    return {
        "sweep": sweep,
        "cell_id": cell.id,
        "job_id": job.id,
        "model": cell.model,
        "method": cell.method,
        "weight_bits": cell.weight_bits,
        "activation_bits": scheme.activation_bits if scheme else UNQUANTIZED_BITS,
        "group_size": scheme.group_size if scheme else 0,
        "symmetric": scheme.symmetric if scheme else None,
        "options": scheme.row_options if scheme else "{}",
        "calibration": cell.calibration.key if cell.calibration else None,
    }


def size_columns(cell: Cell, model: ModelInput, stored_bytes: int | None) -> dict[str, Any]:
    """Decoder bits per weight and checkpoint bytes, with every stored byte counted.

    Args:
        stored_bytes: of the linears of the cell's artifact; None for the unquantized model.
    """
    from quantizers.vocabulary import vocabulary_bytes

    weights = sum(rows * columns for rows, columns in model.shape.linears.values())
    if cell.scheme is None:
        return {
            "decoder_bits_per_weight": float(model.shape.bits_per_value),
            "checkpoint_bytes": model.shape.fp_bytes,
        }
    if stored_bytes is None:
        return {}
    grids, matrices = cell.scheme.vocabulary(), model.shape.matrices
    stored_bytes += _left_alone(cell.scheme, model)
    touched = weights + sum(math.prod(matrices[role].shape) for role in grids)
    untouched = model.shape.fp_bytes - touched * model.shape.bits_per_value // 8
    return {
        "decoder_bits_per_weight": 8 * stored_bytes / weights,
        "checkpoint_bytes": untouched + stored_bytes + vocabulary_bytes(grids, matrices),
    }


def _left_alone(scheme: Scheme, model: ModelInput) -> int:
    """Bytes of linears that are in no artifact, as they stay what they are."""
    if scheme.layers == "{}":  # asked for every row
        return 0
    method = scheme.build()
    alone = [shape for name, shape in model.shape.linears.items() if method.leaves_alone(name)]
    return sum(map(math.prod, alone)) * model.shape.bits_per_value // 8


def outcome_rows(
    sweep: str,
    job: Job,
    outcome: dict[str, Any],
    *,
    model: ModelInput,
    worker: WorkerInfo,
    started_at: datetime,
    finished_at: datetime,
) -> dict[str, list[dict[str, Any]]]:
    """The rows that a finished job leaves in results, items and layers."""
    cell = cell_columns(sweep, job)
    common = (
        cell
        | _run_columns(job, worker, started_at, finished_at)
        | {
            "task": job.task,
            "peak_memory_bytes": outcome["peak_memory_bytes"],
            "quantize_seconds": outcome["quantize_seconds"],
            "published_bits_per_weight": outcome["published_bits_per_weight"],
            # Of an outcome that an earlier version kept they are not known.
            "software": _software(outcome.get("software")),
            "cpu_fallback": outcome.get("cpu_fallback"),
            "forensics": json.dumps(outcome["forensics"], sort_keys=True) if outcome.get("forensics") else None,
        }
    )
    common |= size_columns(job.cell, model, outcome["stored_bytes"])
    rows: dict[str, list[dict[str, Any]]] = {"results": [], "items": [], "layers": []}
    broken = any(math.isnan(score) for item in outcome.get("items", []) for score in item["log_likelihoods"] or ())
    for metric in outcome.get("metrics", []):
        # The best of scores that are not numbers is no answer, though lm-eval counts one: the first.
        finite = math.isfinite(metric["value"]) and not broken
        rows["results"].append(
            common
            | metric
            | {
                # What is said of the job holds for its metrics; some have more to say.
                "protocol": json.dumps(outcome["protocol"] | metric.get("protocol", {}), sort_keys=True),
                "status": "ok" if finite else "non_finite",
                "evaluate_seconds": outcome["seconds"],
            }
        )
    rows["items"] = [cell | {"task": job.task} | _NO_TEXT | item for item in outcome.get("items", [])]
    rows["layers"] = [cell | layer for layer in outcome.get("layers", [])]
    return rows


def failure_row(
    sweep: str, job: Job, failure: Failure, *, worker: WorkerInfo | None, started_at: datetime, finished_at: datetime
) -> dict[str, Any]:
    """The row in results that a failed job leaves."""
    return (
        cell_columns(sweep, job)
        | _run_columns(job, worker, started_at, finished_at)
        | {
            "software": _software(worker.software) if worker else None,
            "cpu_fallback": worker.cpu_fallback if worker else None,
        }
        | {"task": job.task, "status": "failed", "error_kind": failure.kind, "error": failure.message}
    )


def _software(versions: Mapping[str, str] | None) -> str | None:
    return json.dumps(dict(versions), sort_keys=True) if versions else None


def _run_columns(job: Job, worker: WorkerInfo | None, started_at: datetime, finished_at: datetime) -> dict[str, Any]:
    method = job.cell.scheme.code_version if job.cell.scheme else "fp"
    return {
        "worker": worker.name if worker else None,
        "device": worker.device if worker else None,
        "execution": job.execution,
        "seed": job.cell.calibration.seed if job.cell.calibration else None,
        "code_version": f"bitatlas {__version__}, {method}",
        "started_at": started_at,
        "finished_at": finished_at,
    }
