"""Words and numbers as a reader sees them: names of cells and columns, values, differences, sizes, times."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from orchestrator.atlas.rows import parse_object
from orchestrator.scheme import VOCABULARY_FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from orchestrator.atlas.rows import Cell, CellKey
    from orchestrator.atlas.tables import Column

NOT_RUN = "not run yet"
NON_FINITE = "non-finite"
UNKNOWN = "–"


def plain(text: str) -> str:
    """One line without control characters, so that no error text can move a terminal's cursor."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key in which "g64" comes before "g128"."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def failure_reason(error_kind: str) -> str:
    """ "failed: out of memory" for the kind out_of_memory."""
    reason = plain(error_kind.replace("_", " "))
    return f"failed: {reason}" if reason else "failed"


def variant_labels(cells: Sequence[Cell]) -> dict[CellKey, str]:
    """Name each cell of one model by what tells it from the others, weight bits left out.

    Cells of the same label differ in weight bits alone; where even those are equal, the cell id is added.
    """
    quantized = [cell for cell in cells if not cell.is_fp]
    symmetries = {cell.symmetric for cell in quantized} - {None}
    labels: dict[CellKey, str] = {}
    for method in dict.fromkeys(cell.method for cell in cells):
        family = [cell for cell in cells if cell.method == method]
        options = _varying([cell.options for cell in family], where_absent=False)
        options = [name for name in options if name not in ("layers", *VOCABULARY_FIELDS)]
        # A cell without calibration data is one that needs none; it varies in nothing.
        calibration = _varying([cell.calibration for cell in family if cell.calibration])
        for cell in family:
            parts = [plain(cell.method)]
            if cell.activation_bits != 16:
                parts.append(f"a{cell.activation_bits}")
            if cell.group_size is not None and not cell.is_fp:
                parts.append(f"g{cell.group_size}" if cell.group_size else "per-channel")
            if len(symmetries) > 1 and cell.symmetric is not None and not cell.is_fp:
                parts.append("sym" if cell.symmetric else "asym")
            if cell.options.get("layers"):  # by its size: names of all layers are in the section on the search
                parts.append(f"mixed {bits(cell.decoder_bits_per_weight)} bits")
            parts += [_matrix(role, cell.options[role]) for role in VOCABULARY_FIELDS if cell.options.get(role)]
            parts += [f"{name}={_scalar(cell.options[name])}" for name in options if name in cell.options]
            parts += [f"{name}={_scalar(cell.calibration[name])}" for name in calibration if name in cell.calibration]
            labels[cell.key] = " ".join(parts)
    return _without_twins(cells, labels)


def _matrix(role: str, own: object) -> str:
    """ "embedding 8 bits"; where it is nothing that we wrote, as it is."""
    bits_of = own.get("weight_bits") if isinstance(own, dict) else None
    return f"{role} {counted(bits_of, 'bit')}" if isinstance(bits_of, int) else f"{role}={_scalar(own)}"


def _without_twins(cells: Sequence[Cell], labels: dict[CellKey, str]) -> dict[CellKey, str]:
    twins: dict[tuple[str, int | None], list[Cell]] = {}
    for cell in cells:
        twins.setdefault((labels[cell.key], cell.weight_bits), []).append(cell)
    for same in twins.values():
        if len(same) > 1:
            for cell in same:
                labels[cell.key] += f" #{plain(cell.cell_id)}"
    return labels


def _varying(objects: Sequence[Mapping[str, Any]], *, where_absent: bool = True) -> list[str]:
    """Names whose values differ; `where_absent`: an object that lacks one differs from those that have it."""
    names = dict.fromkeys(name for item in objects for name in item)
    return [
        name
        for name in names
        if len({json.dumps(item.get(name), default=str) for item in objects if where_absent or name in item}) > 1
    ]


def _scalar(value: object) -> str:
    return plain(value) if isinstance(value, str) else plain(json.dumps(value, default=str))


def cell_label(cell: Cell, variant: str) -> str:
    """ "gptq w4 g64", "smoothquant w8a8 per-channel": the variant with its bits after the method."""
    if cell.is_fp:
        return variant
    method = plain(cell.method)
    rest = variant.removeprefix(method).strip()
    bits = "w?" if cell.weight_bits is None else f"w{cell.weight_bits}"
    if cell.activation_bits != 16:
        bits += f"a{cell.activation_bits}"
        rest = rest.removeprefix(f"a{cell.activation_bits}").strip()
    return f"{method} {bits} {rest}".strip()


def pairs(values: Mapping[str, Any]) -> str:
    """ "limit 200, num_fewshot 0": an object of a column for people; nulls say nothing and are left out."""
    return ", ".join(f"{plain(name)} {_scalar(value)}" for name, value in values.items() if value is not None)


def column_labels(columns: Sequence[Column]) -> dict[Column, str]:
    """Name each column by its task; the metric and what differs in protocol where the task alone is ambiguous."""
    labels = {}
    for column in columns:
        same_task = [other for other in columns if other.task == column.task]
        same_metric = [other for other in same_task if other.metric == column.metric]
        parts = [plain(column.task)]
        if len({other.metric for other in same_task}) > 1:
            parts.append(plain(column.metric))
        if len(same_metric) > 1:
            protocols = [parse_object(other.protocol) for other in same_metric]
            own = parse_object(column.protocol)
            names = _varying(protocols)
            without = f"without {plain(', '.join(names))}" if own else "no protocol"
            parts.append(f"({pairs({name: own.get(name) for name in names}) or without})")
        labels[column] = " ".join(parts)
    return labels


def number(value: float) -> str:
    """Enough digits to tell cells apart, few enough to compare at a glance."""
    size = abs(value)
    if size >= 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if size >= 100:
        return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    if size >= 1e-3:
        return f"{value:.4f}"
    if size == 0:
        return "0"
    return f"{value:.1e}"


def quality(value: float, stderr: float | None, *, percent: bool) -> str:
    """A value of a column, with its standard error where one is known."""
    if percent:
        return f"{100 * value:.1f}" + (f" ±{100 * stderr:.1f}" if stderr is not None else "")
    return number(value) + (f" ±{_error(value, stderr)}" if stderr is not None else "")


def _error(value: float, stderr: float) -> str:
    """With the decimals of its value, unless nothing would be left of it."""
    text = number(value)
    rounded = f"{stderr:,.{len(text.partition('.')[2])}f}"
    return number(stderr) if "e" in text or float(rounded.replace(",", "")) == 0 else rounded


def difference(value: float, reference: float, *, percent: bool) -> str:
    """How far a value is from fp: points for percentages, per cent otherwise, a factor once it has doubled."""
    if percent:
        return f"{100 * (value - reference):+.1f}".replace("-", "−")
    if reference == 0:
        return f"{value:+.2g}".replace("-", "−")
    ratio = value / reference
    if ratio >= 2:
        return "×" + (f"{ratio:.1f}" if ratio < 10 else number(round(ratio)).removesuffix(".00").removesuffix(".0"))
    change = 100 * (ratio - 1)
    return f"{change:+.{1 if abs(change) < 100 else 0}f}%".replace("-", "−")


def megabytes(size: int | None) -> str:
    """Decimal megabytes, as disks and downloads count them."""
    if size is None:
        return UNKNOWN
    return f"{size / 1e6:,.1f}" if size < 1e9 else f"{size / 1e6:,.0f}"


def bits(value: float | None) -> str:
    """Bits per weight."""
    return UNKNOWN if value is None else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds is None:
        return UNKNOWN
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def moment(when: datetime | None) -> str:
    """A time to the minute, with its zone."""
    if when is None:
        return UNKNOWN
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".strip()


def counted(number_of: int, noun: str) -> str:
    """ "1 cell", "2 cells"."""
    return f"{number_of} {noun}" + ("" if number_of == 1 else "s")


def tally(values: Iterable[object]) -> str:
    """ "cpu (12), npu (3)": distinct values, most frequent first; empty ones are left out."""
    counts: dict[str, int] = {}
    for value in values:
        if value not in (None, ""):
            counts[plain(str(value))] = counts.get(plain(str(value)), 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], natural(item[0])))
    return ", ".join(f"{value} ({count})" if len(ordered) > 1 else value for value, count in ordered) or UNKNOWN


def bits_header(weight_bits: int | None) -> str:
    """Heading of a column of the map."""
    return "bits open" if weight_bits is None else f"{weight_bits}-bit"
