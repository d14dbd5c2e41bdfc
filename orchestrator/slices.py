"""Slices of a task on their way: what the store keeps of each until all are done, and what they make together. Pure."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from cluster.pool import WorkerInfo
from evaluators.harness import Item, Metric, TaskResult
from orchestrator.config import TaskConfig
from orchestrator.facts import without_facts
from orchestrator.measured import task_outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from orchestrator.plan import Job

# What is equal for all slices of a cell, because it is of its artifact.
_OF_THE_CELL = ("quantize_seconds", "stored_bytes", "published_bits_per_weight")


def slice_row(
    sweep: str,
    job: Job,
    outcome: dict[str, Any],
    *,
    worker: WorkerInfo,
    started_at: datetime,
    finished_at: datetime,
) -> dict[str, Any]:
    """The row that a finished slice leaves until its task is put together.

    Args:
        outcome: what the worker returned; `slice` holds a `TaskResult`'s fields. JSON keeps every bit of its floats.
    """
    return {
        "sweep": sweep,
        "cell_id": job.cell.id,
        "job_id": job.id,
        "whole_id": job.whole.id,
        "outcome": json.dumps(without_facts(outcome), sort_keys=True),
        "worker": worker.name,
        "device": worker.device,
        "started_at": started_at,
        "finished_at": finished_at,
    }


def merged_outcome(job: Job, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a worker would have returned for the whole task.

    Args:
        job: the whole.
        rows: of all its slices, in their order.
    """
    from evaluators.merging import merge

    if not isinstance(job.evaluation, TaskConfig):
        raise AssertionError("only tasks are cut into slices")
    outcomes = [json.loads(row["outcome"]) for row in rows]
    result = merge([_result(outcome["slice"]) for outcome in outcomes])
    return {
        "reused": False,
        **{name: outcomes[0][name] for name in _OF_THE_CELL},
        **task_outcome(result, limit=job.evaluation.limit, is_fp=job.cell.scheme is None),
        "seconds": sum(outcome["seconds"] for outcome in outcomes),
        "software": merged_software(outcomes),
        "cpu_fallback": merged_fallback(outcomes),
        "peak_memory_bytes": max(outcome["peak_memory_bytes"] for outcome in outcomes),
    }


def merged_software(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """Versions under all slices; where they differ, each once. None where one slice tells none."""
    told = [outcome.get("software") for outcome in outcomes]
    if not all(told):
        return None
    versions = [software or {} for software in told]
    names = dict.fromkeys(name for software in versions for name in software)
    return {
        name: ", ".join(dict.fromkeys(software[name] for software in versions if name in software)) for name in names
    }


def merged_fallback(outcomes: Sequence[Mapping[str, Any]]) -> bool | None:
    """Whether the CPU may have helped an NPU with any slice; None where no NPU took part."""
    told = [outcome["cpu_fallback"] for outcome in outcomes if outcome.get("cpu_fallback") is not None]
    return any(told) if told else None


def _result(fields: dict[str, Any]) -> TaskResult:
    metrics = [Metric(**metric) for metric in fields["metrics"]]
    return TaskResult(**fields | {"metrics": metrics, "items": [Item(**item) for item in fields["items"]]})


def slice_outcome(result: TaskResult) -> dict[str, Any]:
    """A slice's result as plain data."""
    return {"slice": dataclasses.asdict(result)}


def workers_of(rows: Sequence[dict[str, Any]]) -> WorkerInfo:
    """Who scored the slices: the names of all, each once."""
    names, devices = (", ".join(dict.fromkeys(str(row[column]) for row in rows)) for column in ("worker", "device"))
    return WorkerInfo(name=names, device=devices, process_id=0)
