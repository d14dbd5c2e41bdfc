"""Rows of the store -> `Atlas`. Pure: what a running, retried or resumed sweep left behind becomes one story."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from orchestrator.atlas.expected import expected_models, missing_cells
from orchestrator.atlas.rows import (
    QUANTIZE_TASK,
    Atlas,
    Cell,
    CellKey,
    History,
    ItemKey,
    ItemScores,
    Layer,
    Measurement,
    canonical,
    parse_object,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Row = Mapping[str, Any]


def assemble(
    config: Mapping[str, Any],
    results: Sequence[Row],
    layers: Sequence[Row] = (),
    events: Sequence[Row] = (),
    items: Mapping[ItemKey, ItemScores] | None = None,
    *,
    default_name: str = "sweep",
) -> Atlas:
    """Join the rows of a sweep.

    Args:
        config: the sweep file.
        results: rows of the results table in the order they were written.
        layers: rows of the layers table.
        events: rows of the events table.
        items: what was scored per document, where it is known.
        default_name: the sweep's name where neither the sweep file nor a row states one.
    """
    ordered = sorted(results, key=_when)
    cells = _cells(ordered)
    measurements, superseded = _distinct([_measurement(row) for row in ordered])
    models = dict.fromkeys([*expected_models(config), *sorted({cell.model for cell in cells})])
    named = [config.get("name"), *(row.get("sweep") for row in ordered), default_name]
    return Atlas(
        name=next(str(name) for name in named if name),
        models=tuple(models),
        config=config,
        cells=(*cells, *missing_cells(config, cells)),
        measurements=tuple(measurements),
        superseded=superseded,
        layers=tuple(_layers(layers)),
        history=_history(events),
        items=items or {},
    )


def _when(row: Row) -> float:
    moment = row.get("finished_at") or row.get("started_at")
    return moment.timestamp() if moment else -math.inf


def _cells(rows: Iterable[Row]) -> list[Cell]:
    """One cell per (model, cell_id); each cost is the newest one stated."""
    newest: dict[CellKey, dict[str, Any]] = {}
    for row in rows:
        stated = {name: value for name, value in row.items() if value is not None}
        newest.setdefault(_key(row), {}).update(stated)
    return [
        Cell(
            model=model,
            cell_id=cell_id,
            method=str(row.get("method", "unknown")),
            weight_bits=row.get("weight_bits"),
            activation_bits=row.get("activation_bits") or 16,
            group_size=row.get("group_size"),
            symmetric=row.get("symmetric"),
            options=parse_object(row.get("options")),
            calibration=parse_object(row.get("calibration")),
            decoder_bits_per_weight=row.get("decoder_bits_per_weight"),
            checkpoint_bytes=row.get("checkpoint_bytes"),
            quantize_seconds=row.get("quantize_seconds"),
        )
        for (model, cell_id), row in newest.items()
    ]


def _key(row: Row) -> CellKey:
    return (str(row.get("model") or "unknown"), str(row.get("cell_id") or "unknown"))


def _measurement(row: Row) -> Measurement:
    protocol = parse_object(row.get("protocol"))
    value = row.get("value")
    status = str(row.get("status") or "ok")
    if status == "ok" and value is not None and not math.isfinite(value):
        status = "non_finite"
    return Measurement(
        cell=_key(row),
        job_id=str(row.get("job_id") or ""),
        task=str(row.get("task") or ""),
        metric=str(row.get("metric") or ""),
        protocol=canonical(protocol) if protocol else "",
        status=status,
        value=value,
        stderr=row.get("stderr"),
        n=row.get("n"),
        higher_is_better=row.get("higher_is_better"),
        error_kind=str(row.get("error_kind") or ""),
        error=str(row.get("error") or ""),
        evaluate_seconds=row.get("evaluate_seconds"),
        worker=str(row.get("worker") or ""),
        device=str(row.get("device") or ""),
        execution=str(row.get("execution") or ""),
        seed=row.get("seed"),
        code_version=str(row.get("code_version") or ""),
        started_at=row.get("started_at"),
        finished_at=row.get("finished_at"),
    )


def _distinct(rows: Sequence[Measurement]) -> tuple[list[Measurement], int]:
    """Keep the newest row of each thing; a failure counts only while nothing measured has replaced it.

    Args:
        rows: in the order they finished.
    Returns:
        The rows that stand, and how many failures were overtaken by a later success.
    """
    measured = {
        (row.cell, row.task, row.metric, row.protocol): (index, row) for index, row in enumerate(rows) if not row.failed
    }
    done = {(cell, task) for cell, task, _, _ in measured}
    last_of_cell: dict[CellKey, int] = {}
    for index, row in measured.values():
        last_of_cell[row.cell] = max(index, last_of_cell.get(row.cell, -1))

    standing: dict[tuple[CellKey, str, str], Measurement] = {}
    overtaken = 0
    for index, row in enumerate(rows):
        if not row.failed:
            continue
        # A cell that was measured after its quantization failed was quantized in between.
        retried = row.task == QUANTIZE_TASK and last_of_cell.get(row.cell, -1) > index
        if retried or (row.cell, row.task) in done:
            overtaken += 1
        else:
            standing[(row.cell, row.task, row.protocol)] = row
    return [row for _, row in measured.values()] + list(standing.values()), overtaken


def _layers(rows: Iterable[Row]) -> list[Layer]:
    newest = {(_key(row), str(row.get("layer") or "")): row for row in rows}
    return [
        Layer(
            cell=cell,
            name=name,
            bits_per_weight=row.get("bits_per_weight"),
            weight_error=row.get("weight_error"),
            output_error=row.get("output_error"),
        )
        for (cell, name), row in newest.items()
    ]


def _history(rows: Sequence[Row]) -> History:
    rows = sorted(rows, key=lambda row: row["at"].timestamp() if row.get("at") else -math.inf)
    if not rows:
        return History()

    def count(kind: str) -> int:
        return sum(row.get("event") == kind for row in rows)

    session = rows[-1].get("session")
    last = [row for row in rows if row.get("session") == session]
    still_open = all(row.get("event") != "session_ended" for row in last)
    running: dict[str, str] = {}
    for row in last:
        job = str(row.get("job_id") or "")
        if row.get("event") == "started":
            running[job] = str(row.get("job") or job)
        elif row.get("event") in ("finished", "failed", "reused", "retried", "worker_lost"):
            running.pop(job, None)
    return History(
        sessions=len({row.get("session") for row in rows}),
        retries=count("retried"),
        workers_lost=count("worker_lost"),
        reused=count("reused"),
        running=tuple(running.values()) if still_open else (),
        open=still_open,
        last_event_at=rows[-1].get("at"),
    )
