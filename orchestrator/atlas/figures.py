"""The page's figures as plain plotly specifications: data and layout, no theme. Pure, and plotly is not imported.

Every string is escaped, because plotly reads a few HTML tags in its texts. A point without a number is drawn on a
strip along the upper edge with its own symbol, so that it is neither dropped nor taken for a value.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from orchestrator.atlas import labels
from orchestrator.atlas.advice import pareto_front
from orchestrator.atlas.tables import Entry, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from orchestrator.atlas.rows import Atlas, Cell
    from orchestrator.atlas.tables import Column, ModelMap

Figure: TypeAlias = dict[str, Any]

# Told apart by people with any colour vision (after Okabe and Ito), on white and on near-black.
PALETTE = ("#2a86c9", "#dd6b20", "#0f9d78", "#c86fa8", "#d9a400", "#7a6fd0", "#5bb4e5", "#8a8f98")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "hexagon", "star")
OFF_SCALE = 3.0  # a perplexity beyond this multiple of fp is drawn on the strip: collapsed is collapsed
_STRIP_SYMBOLS = {"off scale": "triangle-up-open", State.NON_FINITE: "x-thin-open", State.FAILED: "cross-thin-open"}
_NEUTRAL = "#8a8f98"
_STRIP_AXIS = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}


@dataclass(frozen=True)
class _Axis:
    """What a cell is placed by."""

    name: str
    title: str
    position: Callable[[Cell], float | None]


CURVE_AXES = (
    _Axis("weight bits", "weight bits", lambda cell: cell.weight_bits),
    _Axis("bits per weight", "decoder bits per weight (scales and zeros counted)", lambda c: c.decoder_bits_per_weight),
)
_SIZE_AXIS = _Axis(
    "size", "checkpoint, MB", lambda cell: None if cell.checkpoint_bytes is None else cell.checkpoint_bytes / 1e6
)


def method_colours(atlas: Atlas) -> dict[str, str]:
    """One colour per method, the same in every figure and for every model."""
    methods = dict.fromkeys(cell.method for cell in atlas.cells if not cell.is_fp)
    return {method: PALETTE[rank % len(PALETTE)] for rank, method in enumerate(sorted(methods))}


def curves(model_map: ModelMap, column: Column, axis: _Axis, colours: dict[str, str]) -> Figure:
    """Score over bits, one line per variant, fp as a dashed line across."""
    ceiling = _ceiling(model_map, column)
    traces: list[Figure] = []
    nth: dict[str, int] = defaultdict(int)
    for variant in model_map.variants:
        style = nth[variant.method]
        nth[variant.method] += 1
        points = [
            (x, entry, cell)
            for cell in variant.cells.values()
            if (x := axis.position(cell)) is not None
            and (entry := model_map.entry(cell, column)).state is State.OK
            and entry.value is not None
        ]
        if not points:
            continue
        points.sort(key=lambda point: point[0])
        colour = colours[variant.method]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": html.escape(variant.label),
                "x": [x for x, _, _ in points],
                "y": [_shown(model_map, column, entry) for _, entry, _ in points],
                "text": [_hover(model_map, column, cell, entry) for _, entry, cell in points],
                "hovertemplate": "%{text}<extra></extra>",
                "line": {"color": colour, "dash": DASHES[style % len(DASHES)], "width": 2},
                "marker": {"color": colour, "symbol": SYMBOLS[style % len(SYMBOLS)], "size": 8},
            }
        )
    quantized = [cell for cell in model_map.cells if not cell.is_fp]
    traces += _strip(model_map, column, quantized, axis, colours, ceiling)
    layout = _layout(model_map, column, axis, ceiling)
    if axis is CURVE_AXES[0]:
        ticks = sorted(bits for bits in model_map.weight_bits if bits is not None)
        layout["xaxis"] |= {"tickmode": "array", "tickvals": ticks, "type": "log"} if ticks else {}
    fp = model_map.fp_entry(column)
    if fp is not None and fp.value is not None:
        _add_fp_line(layout, _shown(model_map, column, fp), fp.text)
    return {"data": traces, "layout": layout}


def trade_off(model_map: ModelMap, column: Column, colours: dict[str, str]) -> Figure:
    """Score against checkpoint size, with the Pareto front as steps."""
    ceiling = _ceiling(model_map, column)
    points = [
        (x, _shown(model_map, column, entry), cell, entry)
        for cell in model_map.cells
        if (x := _SIZE_AXIS.position(cell)) is not None
        and (entry := model_map.entry(cell, column)).state is State.OK
        and entry.value is not None
    ]
    front = pareto_front([(x, y) for x, y, _, _ in points], higher_is_better=column.higher_is_better)
    layout = _layout(model_map, column, _SIZE_AXIS, ceiling)
    named = _with_room(front, layout["yaxis"])
    traces: list[Figure] = []
    if front:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "Pareto front",
                "x": [x for x, _ in front],
                "y": [y for _, y in front],
                "hoverinfo": "skip",
                "line": {"color": _NEUTRAL, "width": 1.5, "shape": "hv", "dash": "dot"},
            }
        )
    for method in dict.fromkeys(cell.method for _, _, cell, _ in points):
        own = [point for point in points if point[2].method == method]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": html.escape(labels.plain(method)),
                "x": [x for x, _, _, _ in own],
                "y": [y for _, y, _, _ in own],
                "text": [_point_name(cell) if (x, y) in named else "" for x, y, cell, _ in own],
                "textposition": "bottom center" if column.higher_is_better else "top center",
                "textfont": {"size": 11},
                "hovertext": [_hover(model_map, column, cell, entry) for _, _, cell, entry in own],
                "hovertemplate": "%{hovertext}<extra></extra>",
                "marker": {
                    "color": colours.get(method, _NEUTRAL),
                    "size": [11 if (x, y) in front else 8 for x, y, _, _ in own],
                    "symbol": "star" if method == "fp" else "circle",
                    "opacity": [1.0 if (x, y) in front else 0.65 for x, y, _, _ in own],
                },
            }
        )
    traces += _strip(model_map, column, model_map.cells, _SIZE_AXIS, colours, ceiling)
    return {"data": traces, "layout": layout}


def unplaced(model_map: ModelMap, column: Column) -> str:
    """Which cells the figures cannot place, because they have no number, or no size and so no place."""
    waiting, sizeless = [], []
    for cell in model_map.cells:
        state = model_map.entry(cell, column).state
        if state is State.PENDING:
            waiting.append(model_map.cell_labels[cell.key])
        elif cell.checkpoint_bytes is None:
            sizeless.append(f"{model_map.cell_labels[cell.key]} ({model_map.entry(cell, column).text})")
    parts = [f"Not run yet: {', '.join(waiting)}."] if waiting else []
    parts += [f"Without a size, so not in the size figure: {', '.join(sizeless)}."] if sizeless else []
    return " ".join(parts)


def _point_name(cell: Cell) -> str:
    bits = "" if cell.weight_bits is None or cell.is_fp else f" w{cell.weight_bits}"
    return html.escape(labels.plain(cell.method)) + bits


def _shown(model_map: ModelMap, column: Column, entry: Entry) -> float:
    value = math.nan if entry.value is None else entry.value
    return 100 * value if column in model_map.percent else value


def _ceiling(model_map: ModelMap, column: Column) -> float | None:
    """The largest value on the axis, or None where everything fits."""
    values = [entry.value for (_, other), entry in model_map.entries.items() if other == column and entry.value]
    if column.higher_is_better or not values or min(values) <= 0:
        return None
    fp = model_map.fp_entry(column)
    base = fp.value if fp is not None and fp.value else min(values)
    return OFF_SCALE * base if max(values) > OFF_SCALE * base else None


def _strip(
    model_map: ModelMap,
    column: Column,
    cells: Iterable[Cell],
    axis: _Axis,
    colours: dict[str, str],
    ceiling: float | None,
) -> list[Figure]:
    """Markers along the upper edge for what has no place on the axis; those at the same bits are stacked."""
    marks: dict[object, list[tuple[float, float, Cell, Entry]]] = defaultdict(list)
    height: dict[float, int] = defaultdict(int)
    for cell in cells:
        entry, x = model_map.entry(cell, column), axis.position(cell)
        off_scale = ceiling is not None and entry.value is not None and entry.value > ceiling
        if x is None or not (off_scale or entry.state in _STRIP_SYMBOLS):
            continue
        y = 0.975 - 0.045 * height[x]
        height[x] += 1
        marks["off scale" if off_scale else entry.state].append((x, y, cell, entry))
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": kind.value.replace("_", "-") if isinstance(kind, State) else str(kind),
            "x": [x for x, _, _, _ in points],
            "y": [y for _, y, _, _ in points],
            "yaxis": "y2",
            "text": [_hover(model_map, column, cell, entry) for _, _, cell, entry in points],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {
                "symbol": _STRIP_SYMBOLS[kind],
                "size": 9,
                "color": [colours.get(cell.method, _NEUTRAL) for _, _, cell, _ in points],
                "line": {"width": 2, "color": [colours.get(cell.method, _NEUTRAL) for _, _, cell, _ in points]},
            },
        }
        for kind, points in marks.items()
    ]


def _hover(model_map: ModelMap, column: Column, cell: Cell, entry: Entry) -> str:
    return "<br>".join(html.escape(line) for line in describe(model_map, column, cell, entry))


def describe(model_map: ModelMap, column: Column, cell: Cell, entry: Entry) -> list[str]:
    """What there is to say of one square of the map, a line each."""
    lines = [model_map.cell_labels[cell.key]]
    if entry.value is None:
        lines.append(f"{model_map.title(column)}: {entry.text}")
    else:
        value = labels.quality(entry.value, entry.stderr, percent=column in model_map.percent)
        points = " points" if column in model_map.percent else ""
        compared = f", {entry.difference}{points} against fp" if entry.difference else ""
        lines.append(f"{model_map.title(column)}: {value}{compared}")
    if entry.error:
        lines.append(entry.error if len(entry.error) <= 160 else entry.error[:157] + "…")
    if entry.n:
        lines.append(f"{entry.n:,} {column.unit}s scored")
    if cell.checkpoint_bytes is not None:
        lines.append(
            f"{labels.megabytes(cell.checkpoint_bytes)} MB, {labels.bits(cell.decoder_bits_per_weight)} bits per weight"
        )
    if cell.quantize_seconds is not None:
        lines.append(f"quantized in {labels.duration(cell.quantize_seconds)}")
    if cell.options:
        lines.append(labels.pairs(cell.options))
    return lines


def _layout(model_map: ModelMap, column: Column, axis: _Axis, ceiling: float | None) -> Figure:
    values = [_shown(model_map, column, entry) for (_, other), entry in model_map.entries.items() if other == column]
    values = [value for value in values if math.isfinite(value)]
    logarithmic = not column.higher_is_better and bool(values) and min(values) > 0
    title = html.escape(model_map.title(column)) + (", %" if column in model_map.percent else "")
    y_axis: Figure = {"title": {"text": title}, "type": "log" if logarithmic else "linear"}
    if logarithmic:
        y_axis |= log_ticks(min(values), ceiling or max(values))
        low = math.log10(min(values))
        high = math.log10(ceiling or max(values))
        # Room for the strip above; to see beyond the ceiling, double-click.
        y_axis["range"] = [low - 0.06 * (high - low) - 0.004, high + 0.14 * (high - low) + 0.01]
    elif values:
        low, high = min(values), max(values)
        room = (high - low) or abs(high) or 1.0
        y_axis["range"] = [low - 0.08 * room, high + 0.16 * room]
    return {
        "xaxis": {"title": {"text": axis.title}},
        "yaxis": y_axis,
        "yaxis2": dict(_STRIP_AXIS),
        "margin": {"l": 64, "r": 16, "t": 28},
        "hovermode": "closest",
    }


def _with_room(front: Sequence[tuple[float, float]], y_axis: Figure) -> set[tuple[float, float]]:
    """The points of the front that can carry a name without writing over another's."""

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point
        low, high = y_axis["range"]
        height = math.log10(y) if y_axis["type"] == "log" else y
        return (x - front[0][0]) / ((front[-1][0] - front[0][0]) or 1.0), (height - low) / (high - low)

    named: dict[tuple[float, float], tuple[float, float]] = {}
    for point in front:
        x, y = place(point)
        if all(abs(x - left) > 0.2 or abs(y - low) > 0.07 for left, low in named.values()):
            named[point] = (x, y)
    return set(named)


def log_ticks(low: float, high: float) -> Figure:
    """Round numbers at a readable distance: plotly's own choice leaves one decade almost bare."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [1] if high / low > 1e3 else [1, 2, 5] if high / low > 8 else [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9]
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    ticks = [tick for tick in ticks if low * 0.9 <= tick <= high * 1.05]
    if len(ticks) < 3:
        return {}
    return {"tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:,.6g}" for tick in ticks]}


def _add_fp_line(layout: Figure, value: float, text: str) -> None:
    line = {"color": _NEUTRAL, "width": 1.5, "dash": "dash"}
    layout["shapes"] = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": line}]
    is_log = layout["yaxis"]["type"] == "log"
    layout["annotations"] = [
        {
            "text": f"fp {html.escape(text)}",
            "xref": "paper",
            "x": 0.01,
            "xanchor": "left",
            "y": math.log10(value) if is_log else value,
            "yanchor": "top" if is_log else "bottom",
            "showarrow": False,
            "font": {"size": 12},
        }
    ]
