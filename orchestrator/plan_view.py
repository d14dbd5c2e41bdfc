"""`bitatlas plan`: cells, jobs, sizes, time, memory and disk of a sweep, and nothing is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from orchestrator.footprint import Footprint
from orchestrator.rows import size_columns

if TYPE_CHECKING:
    from orchestrator.inputs import Inputs
    from orchestrator.plan import Cell, Plan

# Longer tables say less than their sums by method.
_MOST_ROWS = 60


def plan_table(name: str, plan: Plan, inputs: Inputs, done: Collection[str] | None) -> Table:
    """A row per cell, or per model and method where there are many cells.

    Args:
        done: ids of finished jobs; None where that cannot be told.
    """
    told = "" if done is None else f", {len(done)} done"
    table = Table(title=f"{name}: {len(plan.cells)} cells, {len(plan.jobs)} jobs{told}")
    table.add_column("cell" if len(plan.cells) <= _MOST_ROWS else "model and method")
    counts: Counter[str] = Counter(job.cell.id for job in plan.jobs)
    finished: Counter[str] = Counter(job.cell.id for job in plan.jobs if done is not None and job.id in done)
    sizes = {cell.id: sizes_of(cell, inputs) for cell in plan.cells}
    for heading in ("jobs", *(["done"] if done is not None else []), "bits/weight", "checkpoint MB"):
        table.add_column(heading, justify="right")
    groups: dict[str, list[Cell]] = {}
    for cell in plan.cells:
        label = cell.id if len(plan.cells) <= _MOST_ROWS else f"{cell.model} {cell.method}"
        groups.setdefault(label, []).append(cell)
    for label, cells in groups.items():
        ids = [cell.id for cell in cells]
        row = [str(sum(counts[name] for name in ids))]
        if done is not None:
            row.append(str(sum(finished[name] for name in ids)))
        bits = [sizes[name]["decoder_bits_per_weight"] for name in ids]
        megabytes = [sizes[name]["checkpoint_bytes"] / 1e6 for name in ids]
        many = "" if len(cells) == 1 else f" ({len(cells)} cells)"
        table.add_row(label + many, *row, _span(bits, ".3f"), _span(megabytes, ".1f"))
    return table


def sizes_of(cell: Cell, inputs: Inputs) -> Mapping[str, Any]:
    """Bits per weight and checkpoint bytes of a cell, from shapes."""
    model, stored = inputs.models[cell.model], None
    if cell.scheme:
        from quantizers.method import total_stored_bytes

        stored = total_stored_bytes(cell.scheme.build(), model.shape.linears)
    return size_columns(cell, model, stored)


def _span(values: Sequence[float], form: str) -> str:
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least} to {most}"


def room_lines(footprint: Footprint, output: str) -> list[str]:
    """What a worker and the output directory need."""
    device = footprint.device_bytes
    where = (
        f"{footprint.host_bytes / 1e9:.1f} GB of its node's"
        if device is None
        else f"{device / 1e9:.1f} GB of its device and {footprint.host_bytes / 1e9:.1f} GB of its node's"
    )
    return [
        f"memory: a worker needs up to {where} (most: {footprint.largest_job})",
        f"disk: {footprint.artifact_bytes / 1e9:.1f} GB of artifacts in {output}"
        + (f", {footprint.cache_bytes / 1e9:.1f} GB of shared statistics" if footprint.cache_bytes else ""),
    ]
