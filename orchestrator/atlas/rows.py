"""What the atlas knows of a sweep: cells, measurements, layers and history. Plain data, no IO."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    import numpy as np
    import numpy.typing as npt

    from orchestrator.atlas.search_rows import Search

CellKey: TypeAlias = tuple[str, str]
"""(model, cell_id)."""
ItemKey: TypeAlias = tuple[str, str, str, str, str]
"""(model, cell_id, job_id, task, metric of the items)."""

FP = "fp"
QUANTIZE_TASK = "quantize"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model x method x scheme x calibration; `pending` where the sweep asks for it and no row exists yet."""

    model: str
    cell_id: str
    method: str
    weight_bits: int | None
    activation_bits: int = 16
    group_size: int | None = None
    symmetric: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    decoder_bits_per_weight: float | None = None
    checkpoint_bytes: int | None = None
    quantize_seconds: float | None = None
    pending: bool = False

    @property
    def key(self) -> CellKey:
        """What tells this cell from every other of the sweep."""
        return (self.model, self.cell_id)

    @property
    def is_fp(self) -> bool:
        """Whether this is the unquantized model."""
        return self.method == FP


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of the results table, whether it holds a number, a non-finite one or a failure."""

    cell: CellKey
    job_id: str
    task: str
    metric: str
    protocol: str  # canonical JSON; "" where the row has none
    status: str
    value: float | None = None
    stderr: float | None = None
    n: int | None = None
    higher_is_better: bool | None = None
    error_kind: str = ""
    error: str = ""
    evaluate_seconds: float | None = None
    worker: str = ""
    device: str = ""
    execution: str = ""
    seed: int | None = None
    code_version: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def failed(self) -> bool:
        """Whether the job failed, so that there is nothing to show but the reason."""
        return self.status == "failed"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One quantized linear of a cell."""

    cell: CellKey
    name: str
    bits_per_weight: float | None
    weight_error: float | None
    output_error: float | None


@dataclass(frozen=True, eq=False, kw_only=True)
class ItemScores:
    """What a job scored on each document of a task by one metric; N documents, each once."""

    doc_ids_N: npt.NDArray[np.int64]
    values_N: npt.NDArray[np.float64]
    choices_N: npt.NDArray[np.int64]  # how many log-likelihoods it has
    answered_N: npt.NDArray[np.bool_]  # whether none of them is nan


@dataclass(frozen=True, kw_only=True)
class History:
    """What the events table says of the sweep's sessions."""

    sessions: int = 0
    retries: int = 0
    workers_lost: int = 0
    reused: int = 0
    running: tuple[str, ...] = ()  # jobs started in the last session that have no end yet
    open: bool = False  # the last session has not said that it ended
    last_event_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """A sweep as its files tell it. Each (cell, task, metric, protocol) appears once."""

    name: str
    models: tuple[str, ...]
    config: Mapping[str, Any]
    cells: tuple[Cell, ...]
    measurements: tuple[Measurement, ...]
    superseded: int  # failed rows whose work was done by a later attempt
    layers: tuple[Layer, ...]
    history: History
    items: Mapping[ItemKey, ItemScores]
    search: Search | None = None  # of `bitatlas search`, where the sweep is what one ended in


def canonical(value: object) -> str:
    """JSON with sorted keys, so that equal things are equal strings."""
    return json.dumps(value, sort_keys=True, default=str)


def parse_object(text: str | None) -> dict[str, Any]:
    """The JSON object in a column; what is not an object is kept under the key "value"."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if value is None:
        return {}
    return value if isinstance(value, dict) else {"value": value}
