"""Figures of a search: its allocations and sensitivities as grids of blocks and kinds. Pure, plotly is not imported.

Every string is escaped, because plotly reads a few HTML tags in its texts.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

from orchestrator.atlas import labels
from orchestrator.atlas.search_course import front_figure, history_figures
from orchestrator.atlas.search_grid import BitsSquare, Grid, bits_squares, choice_name
from orchestrator.atlas.search_hurt import Level, grid_of, levels
from orchestrator.atlas.search_rows import is_finite
from orchestrator.atlas.search_texts import axis_title, outside_text, shown_allocations
from orchestrator.search.space import LEFT_ALONE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.atlas.figures import Figure
    from orchestrator.atlas.search_rows import Search
    from orchestrator.search.space import Allocation, Space

# From few bits to many, and from harmless to harmful: light to dark, on white and on near-black, for any colour vision.
BITS_SCALE = ((0.0, "#f6dc8c"), (0.35, "#8fc7a0"), (0.7, "#3f8fae"), (1.0, "#1d4f80"))
LOSS_SCALE = ((0.0, "#f7ecd2"), (0.4, "#efb368"), (0.75, "#cb5a35"), (1.0, "#7d1528"))
_ROW_PIXELS, _BAR_PIXELS = 34, 44


def search_figures(search: Search) -> dict[str, Any]:
    """All of them: allocations by name, the front, the history by measure, sensitivities by name."""
    found = levels(search)
    grid = grid_of(search)
    return {
        "allocations": [
            {
                "name": one.name,
                "note": outside_text(search.space, one.allocation),
                "figure": allocation_figure(search.space, one.allocation),
            }
            for one in shown_allocations(search)
            if search.space is not None
        ],
        "front": front_figure(search),
        "history": history_figures(search),
        "sensitivities": [{"name": level.name, "figure": sensitivity_figure(search, grid, level)} for level in found],
    }


def allocation_figure(space: Space, allocation: Allocation) -> Figure:
    """Bits by block and kind; the colour is what is stored, scales and zeros included."""
    grid = Grid.of(space)
    squares = bits_squares(space, grid, allocation)
    placed = [group for group in space.groups if group.name not in grid.outside] or space.groups
    # Sixteen bits, which leave a group alone, would take the colours from all others.
    quantized = [(group, one) for group in placed for one in group.choices if one.weight_bits != LEFT_ALONE]
    stored = [8 * one.stored_bytes / group.num_weights for group, one in quantized]
    return _heatmap(
        grid,
        values={place: square.stored_bits for place, square in squares.items()},
        texts={place: square.text for place, square in squares.items()},
        hovers={place: _bits_hover(square) for place, square in squares.items()},
        name="stored bits per weight",
        span=(min(stored), max(stored)),
        scale=BITS_SCALE,
    )


def _bits_hover(square: BitsSquare) -> str:
    choices = " or ".join(choice_name(one.weight_bits, one.group_size) for one in square.choices)
    return (
        f"{choices}<br>{square.stored_bits:.3f} stored bits per weight<br>{square.stored_bytes:,} bytes"
        f"<br>{100 * square.share:.2f}% of the weights"
    )


def sensitivity_figure(search: Search, grid: Grid, level: Level) -> Figure:
    """Loss by block and kind, its logarithm as colour; of groups that share a square the worst."""
    values: dict[tuple[str, int], float] = {}
    texts: dict[tuple[str, int], str] = {}
    hovers: dict[tuple[str, int], str] = {}
    logs = {name: math.log10(loss) if loss > 0 else None for name, loss in level.losses.items() if is_finite(loss)}
    placed = [value for value in logs.values() if value is not None]
    low, high = (min(placed), max(placed)) if placed else (0.0, 1.0)
    for place, names in grid.squares.items():
        measured = [name for name in names if name in level.losses]
        if not measured:
            continue
        worst = max(measured, key=lambda name: level.losses[name] if is_finite(level.losses[name]) else math.inf)
        loss, logarithm = level.losses[worst], logs.get(worst)
        broken = not is_finite(loss)
        values[place] = high if broken else low if logarithm is None else logarithm
        texts[place] = "∞" if broken else ""
        share = level.share(worst)
        hovers[place] = (
            html.escape(labels.plain(worst))
            + "<br>"
            + (f"loss {labels.NON_FINITE}" if broken else f"loss {labels.number(loss)}")
        )
        hovers[place] += "" if share is None else f"<br>{100 * share:.1f}% of all groups' sum"
    figure = _heatmap(
        grid,
        values=values,
        texts=texts,
        hovers=hovers,
        name=html.escape(f"{axis_title(search)}, {level.name}"),
        span=(low, high),
        scale=LOSS_SCALE,
    )
    ticks = sorted({low, (low + high) / 2, high})
    bar = {"orientation": "h", "thickness": 10, "len": 0.4, "x": 0, "xanchor": "left", "outlinewidth": 0}
    bar |= {"yref": "container", "y": 0, "yanchor": "bottom"}
    bar |= {"tickvals": ticks, "ticktext": [labels.number(10**tick) for tick in ticks]}
    figure["data"][0] |= {"showscale": True, "colorbar": bar}
    figure["layout"]["height"] += _BAR_PIXELS
    figure["layout"]["margin"]["b"] += _BAR_PIXELS
    return figure


def _heatmap(
    grid: Grid,
    *,
    values: Mapping[tuple[str, int], float],
    texts: Mapping[tuple[str, int], str],
    hovers: Mapping[tuple[str, int], str],
    name: str,
    span: tuple[float, float],
    scale: Sequence[tuple[float, str]],
) -> Figure:
    kinds = list(grid.kinds.values())
    low, high = span if span[0] < span[1] else (span[0] - 0.5, span[1] + 0.5)

    def rows(of: Mapping[tuple[str, int], Any], without: object) -> list[list[Any]]:
        return [[of.get((kind, block), without) for block in grid.blocks] for kind in kinds]

    trace = {
        "type": "heatmap",
        "name": name,
        "x": grid.blocks,
        "y": [html.escape(kind) for kind in kinds],
        "z": rows({place: round(value, 4) for place, value in values.items()}, None),
        "text": rows(texts, ""),
        "texttemplate": "%{text}",
        "textfont": {"size": 12},
        "hovertext": rows(hovers, ""),
        "hovertemplate": "block %{x}, %{y}<br>%{hovertext}<extra></extra>",
        "hoverongaps": False,
        "zmin": low,
        "zmax": high,
        "colorscale": [list(stop) for stop in scale],
        "showscale": False,
        "xgap": 1,
        "ygap": 2,
    }
    layout: Figure = {
        "xaxis": {"title": {"text": "block"}, "showgrid": False, "zeroline": False, "dtick": _every(len(grid.blocks))},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False, "ticks": ""},
        # The page gives other figures one height; these are as high as they have rows.
        "height": 28 + _ROW_PIXELS * len(kinds) + 52,
        "margin": {"l": 72, "r": 8, "t": 28, "b": 52},
        "hovermode": "closest",
    }
    return {"data": [trace], "layout": layout}


def _every(blocks: int) -> int:
    return 1 if blocks <= 16 else 2 if blocks <= 40 else 5
