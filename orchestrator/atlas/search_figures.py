"""Figures of a search: allocations, the front, how it went, and sensitivities. Pure, plotly is not imported.

Every string is escaped, because plotly reads a few HTML tags in its texts. What is no positive number has no place on
a logarithmic axis and is left out, and the name of its marks says so.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

from orchestrator.atlas import labels
from orchestrator.atlas.figures import PALETTE, SYMBOLS, log_ticks
from orchestrator.atlas.search_grid import BitsSquare, Grid, bits_squares, choice_name
from orchestrator.atlas.search_hurt import Level, grid_of, levels
from orchestrator.atlas.search_rows import is_finite
from orchestrator.atlas.search_texts import objective, outside_text, shown_allocations

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from orchestrator.atlas.figures import Figure
    from orchestrator.atlas.search_rows import Point, Search, Study
    from orchestrator.search.space import Allocation, Space

# From few bits to many, and from harmless to harmful: light to dark, on white and on near-black, for any colour vision.
BITS_SCALE = ((0.0, "#f6dc8c"), (0.35, "#8fc7a0"), (0.7, "#3f8fae"), (1.0, "#1d4f80"))
LOSS_SCALE = ((0.0, "#f7ecd2"), (0.4, "#efb368"), (0.75, "#cb5a35"), (1.0, "#7d1528"))
_NEUTRAL = "#8a8f98"
_ROW_PIXELS = 34


def search_figures(search: Search) -> dict[str, Any]:
    """All of them: {allocations: [{name, note, figure}], front, history, sensitivities: [{name, figure}]}."""
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
        "history": history_figure(search),
        "sensitivities": [{"name": level.name, "figure": sensitivity_figure(search, grid, level)} for level in found],
    }


def allocation_figure(space: Space, allocation: Allocation) -> Figure:
    """Bits by block and kind; the colour is what is stored, scales and zeros included."""
    grid = Grid.of(space)
    squares = bits_squares(space, grid, allocation)
    stored = [8 * one.stored_bytes / group.num_weights for group in space.groups for one in group.choices]
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
        name=f"{html.escape(objective(search))}, {level.name}",
        span=(low, high),
        scale=LOSS_SCALE,
    )
    ticks = sorted({low, (low + high) / 2, high})
    figure["data"][0] |= {
        "showscale": True,
        "colorbar": {
            "orientation": "h",
            "thickness": 10,
            "len": 0.5,
            "x": 0,
            "xanchor": "left",
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
            "outlinewidth": 0,
            "tickvals": ticks,
            "ticktext": [f"{10**tick:.2g}" for tick in ticks],
            "title": {"text": html.escape(objective(search)), "side": "top"},
        },
    }
    figure["layout"]["height"] += 62
    figure["layout"]["margin"]["b"] += 62
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
        "height": 8 + _ROW_PIXELS * len(kinds) + 52,
        "margin": {"l": 72, "r": 8, "t": 8, "b": 52},
        "hovermode": "closest",
    }
    return {"data": [trace], "layout": layout}


def _every(blocks: int) -> int:
    return 1 if blocks <= 16 else 2 if blocks <= 40 else 5


def front_figure(search: Search) -> Figure:
    """Loss over stored bits per weight: every complete trial, the starts, and what was chosen, over all studies."""
    traces = [
        _marks("complete trials", _trial_points(search), colour=_NEUTRAL, symbol="circle", size=4, opacity=0.45),
        *_start_traces(search),
        *_chosen_traces(search),
    ]
    traces = [trace for trace in traces if trace["x"]]
    return _with_axes(
        traces, "stored bits per weight, scales and zeros counted", f"{objective(search)}, search windows"
    )


# (x, loss, what to say of it)
_Mark = tuple[float | None, float | None, str]


def _marks(name: str, points: Iterable[_Mark], *, colour: str, symbol: str, size: int, opacity: float = 1.0) -> Figure:
    points = list(points)
    placed = [(x, y, text) for x, y, text in points if is_finite(x) and is_finite(y) and y > 0]
    lost = len(points) - len(placed)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": html.escape(name + (f" ({lost} without a place)" if lost else "")),
        "x": [x for x, _, _ in placed],
        "y": [y for _, y, _ in placed],
        "text": [html.escape(text) for _, _, text in placed],
        "hovertemplate": "%{text}<br>%{x:.3f} bits per weight: %{y:.4g}<extra></extra>",
        "marker": {"color": colour, "symbol": symbol, "size": size, "opacity": opacity},
    }


def _trial_points(search: Search) -> list[_Mark]:
    return [
        (trial.bits_per_weight, trial.loss, f"{labels.plain(study.name)}, trial {trial.number}")
        for study in search.studies
        for trial in study.trials
        if trial.counts
    ]


def _start_traces(search: Search) -> list[Figure]:
    """Starts by the first word of their names, knapsack or uniform; trials that are uniform are marked too."""
    kinds: dict[str, dict[object, _Mark]] = {"uniform": {}}
    for study in search.studies:
        for start in study.starts:
            words = labels.plain(start.name) or "start"
            key = start.allocation or (words, start.stored_bytes)
            kinds.setdefault(words.split()[0], {})[key] = (start.bits_per_weight, start.loss, words)
        for trial in study.trials:
            name = _uniform_name(search.space, trial.allocation) if trial.counts else ""
            if name:
                mark = (trial.bits_per_weight, trial.loss, f"uniform {name}")
                kinds["uniform"].setdefault(trial.allocation, mark)
    return [
        _marks(name, marks.values(), colour=PALETTE[-1 - rank % 3], symbol=f"{SYMBOLS[1 + rank % 6]}", size=9)
        for rank, (name, marks) in enumerate(kinds.items())
    ]


def _uniform_name(space: Space | None, allocation: Allocation | None) -> str:
    """ "3-g64" where all groups that have a choice got the same."""
    if space is None or allocation is None:
        return ""
    given = {
        (choice.weight_bits, choice.group_size)
        for group, choice in zip(space.groups, space.choices(allocation), strict=True)
        if len(group.choices) > 1
    }
    if len(given) != 1:
        return ""
    ((bits, size),) = given
    return f"{bits}-{f'g{size}' if size else 'per-channel'}"


def _chosen_traces(search: Search) -> list[Figure]:
    traces = []
    for rank, study in enumerate(search.studies):
        one = study.chosen or study.best
        points = sorted(study.front, key=lambda point: point.bits_per_weight or 0.0) or ([one] if one else [])
        name = f"{labels.plain(study.name)}, {'chosen' if study.ended else 'best so far'}"
        marks: list[_Mark] = [(point.bits_per_weight, point.loss, _said(name, point)) for point in points]
        trace = _marks(name, marks, colour=PALETTE[rank % len(PALETTE)], symbol="star", size=14)
        if study.front:
            trace |= {"mode": "lines+markers", "line": {"color": PALETTE[rank % len(PALETTE)], "width": 1.5}}
            trace["marker"]["size"] = 10
        traces.append(trace)
    return traces


def _said(name: str, point: Point) -> str:
    guard = f", {labels.number(point.guard_loss)} on guard windows" if is_finite(point.guard_loss) else ""
    return f"{name}{guard}"


def history_figure(search: Search) -> Figure:
    """The best loss so far over window forwards, and that of held-out windows; one colour per study."""
    traces = []
    for rank, study in enumerate(search.studies):
        colour = PALETTE[rank % len(PALETTE)]
        name = labels.plain(study.name)
        best, guard = _best_so_far(study), _guards(study)
        traces.append(_line(name, best, colour, dash="solid", shape="hv"))
        traces.append(_line(f"{name}, guard windows", guard, colour, dash="dot", shape="linear"))
        traces.append(_line(f"{name}, starts", _starts_at_zero(study), colour, dash="", shape="linear"))
    return _with_axes([trace for trace in traces if trace["x"]], "window forwards", objective(search))


def _within_budget(study: Study) -> list[Point]:
    """Starts that the study could have chosen itself."""
    budget = study.budget_bytes
    return [
        start for start in study.starts if budget is None or start.stored_bytes is None or start.stored_bytes <= budget
    ]


def _starts_at_zero(study: Study) -> list[_Mark]:
    return [(0, start.loss, labels.plain(start.name) or "a start") for start in _within_budget(study)]


def _best_so_far(study: Study) -> list[_Mark]:
    starts = [start for start in _within_budget(study) if is_finite(start.loss)]
    points: list[_Mark] = []
    lowest = math.inf
    if starts:
        start = min(starts, key=lambda one: one.loss or 0.0)
        lowest = start.loss or 0.0
        points.append((0, lowest, labels.plain(start.name) or "a start"))
    told = sorted(
        (one for one in study.trials if one.window_forwards is not None), key=lambda one: one.window_forwards or 0
    )
    for trial in told:
        if trial.counts and trial.loss is not None and trial.loss < lowest:
            lowest = trial.loss
            points.append((trial.window_forwards, lowest, f"trial {trial.number}"))
    if points and told and study.window_forwards is not None:
        points.append((study.window_forwards, lowest, f"after {study.tried:,} allocations"))
    return points


def _guards(study: Study) -> list[_Mark]:
    starts = [start for start in _within_budget(study) if is_finite(start.loss) and is_finite(start.guard_loss)]
    points: list[_Mark] = []
    if starts:
        start = min(starts, key=lambda one: one.loss or 0.0)
        points.append((0, start.guard_loss, labels.plain(start.name) or "a start"))
    points += [
        (trial.window_forwards, trial.guard_loss, f"trial {trial.number}")
        for trial in sorted(study.trials, key=lambda one: one.window_forwards or 0)
        if trial.window_forwards is not None and is_finite(trial.guard_loss)
    ]
    return points


def _line(name: str, points: Iterable[_Mark], colour: str, *, dash: str, shape: str) -> Figure:
    trace = _marks(name, points, colour=colour, symbol="circle" if dash else "diamond-open", size=5 if dash else 9)
    trace["hovertemplate"] = "%{fullData.name}: %{text}<br>%{x:,} window forwards: %{y:.4g}<extra></extra>"
    if dash:
        trace |= {"mode": "lines+markers", "line": {"color": colour, "width": 2, "dash": dash, "shape": shape}}
    return trace


def _with_axes(traces: list[Figure], x_title: str, y_title: str) -> Figure:
    heights = [y for trace in traces for y in trace["y"]]
    y_axis: Figure = {"title": {"text": html.escape(y_title)}, "type": "log"}
    if heights:
        low, high = math.log10(min(heights)), math.log10(max(heights))
        room = 0.06 * (high - low) + 0.02
        y_axis |= log_ticks(min(heights), max(heights)) | {"range": [low - room, high + room]}
    layout: Figure = {
        "xaxis": {"title": {"text": x_title}},
        "yaxis": y_axis,
        "margin": {"l": 72, "r": 16, "t": 28},
        "hovermode": "closest",
    }
    return {"data": traces, "layout": layout}
