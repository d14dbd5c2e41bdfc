"""Figures of the layers table: where in the model the error of each cell lies. Pure, plotly is not imported."""

from __future__ import annotations

import html
import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from orchestrator.atlas import labels
from orchestrator.atlas.figures import DASHES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.atlas.figures import Figure
    from orchestrator.atlas.rows import Layer
    from orchestrator.atlas.tables import ModelMap

MEASURES = ("output error", "weight error")
_DEPTH = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_place(name: str) -> tuple[int | None, str]:
    """(block, kind) of a linear: block 3, "mlp.up_proj" for model.layers.3.mlp.up_proj; experts are one kind."""
    found = _DEPTH.search(name)
    if found is None:
        return None, labels.plain(name)
    kind = name[found.end() :] or name[: found.start()]
    return int(found.group(1)), labels.plain(re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{kind}.").strip("."))


def layer_figures(
    model_map: ModelMap, layers: Sequence[Layer], colours: dict[str, str]
) -> dict[str, dict[str, Figure]]:
    """Error over depth, one line per cell: {measure: {kind of linear: figure}}; what was not measured is left out."""
    grouped: dict[tuple[str, str], dict[Any, dict[int, list[float]]]] = {}
    for layer in layers:
        block, kind = layer_place(layer.name)
        for measure, error in (("output error", layer.output_error), ("weight error", layer.weight_error)):
            if block is not None and error is not None and math.isfinite(error) and layer.cell in model_map.cell_labels:
                cells = grouped.setdefault((measure, kind), defaultdict(lambda: defaultdict(list)))
                cells[layer.cell][block].append(error)
    figures: dict[str, dict[str, Figure]] = {}
    for measure in MEASURES:
        kinds = [kind for other, kind in grouped if other == measure]
        for kind in kinds:
            figures.setdefault(measure, {})[kind] = _layer_figure(
                model_map, measure, kind, grouped[(measure, kind)], colours
            )
    return figures


def _layer_figure(
    model_map: ModelMap, measure: str, kind: str, errors: dict[Any, dict[int, list[float]]], colours: dict[str, str]
) -> Figure:
    traces = []
    widths = sorted({cell.weight_bits for cell in model_map.cells if cell.key in errors}, key=lambda bits: bits or 0)
    for cell in model_map.cells:
        if cell.key not in errors:
            continue
        means = {block: sum(values) / len(values) for block, values in sorted(errors[cell.key].items())}
        # A logarithm has no place for a block that came out exact, so the legend says how many there are.
        exact = sum(mean <= 0 for mean in means.values())
        note = f" ({labels.counted(exact, 'block')} exactly 0)" if exact else ""
        blocks = [(block, float(f"{mean:.4g}")) for block, mean in means.items() if mean > 0]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": html.escape(model_map.cell_labels[cell.key] + note),
                "x": [block for block, _ in blocks],
                "y": [mean for _, mean in blocks],
                "hovertemplate": "%{fullData.name}<br>block %{x}: %{y:.3g}<extra></extra>",
                "line": {
                    "color": colours[cell.method],
                    "width": 1.8,
                    "dash": DASHES[widths.index(cell.weight_bits) % len(DASHES)],
                },
                "marker": {"size": 4, "color": colours[cell.method]},
            }
        )
    averaged = any(len(values) > 1 for blocks in errors.values() for values in blocks.values())
    text = f"{measure}, {html.escape(kind)}{' (mean)' if averaged else ''}"
    layout: Figure = {
        "xaxis": {"title": {"text": "block"}},
        "yaxis": {"title": {"text": text}, "type": "log", "exponentformat": "power", "dtick": 1},
        "margin": {"l": 84, "r": 16, "t": 28},
        "hovermode": "closest",
    }
    return {"data": traces, "layout": layout}
