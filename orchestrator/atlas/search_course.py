"""Figures of a search: the front of loss over size, and how it went. Pure, plotly is not imported.

Every string is escaped, because plotly reads a few HTML tags in its texts. What is no positive number has no place on
a logarithmic axis and is left out, and the name of its marks says so.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

from orchestrator.atlas import labels
from orchestrator.atlas.figures import PALETTE, SYMBOLS, log_ticks
from orchestrator.atlas.search_grid import short_choice
from orchestrator.atlas.search_rows import is_finite
from orchestrator.atlas.search_texts import axis_title

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from orchestrator.atlas.figures import Figure
    from orchestrator.atlas.search_rows import Point, Search, Study
    from orchestrator.search.space import Allocation, Space

_NEUTRAL = "#8a8f98"


def front_figure(search: Search) -> Figure:
    """Loss over stored bits per weight: every complete trial, the starts, and what was chosen, over all studies."""
    traces = [
        _marks("complete trials", _trial_points(search), colour=_NEUTRAL, symbol="circle", size=4, opacity=0.45),
        *_start_traces(search),
        *_chosen_traces(search),
    ]
    traces = [trace for trace in traces if trace["x"]]
    return _with_axes(traces, "stored bits per weight", axis_title(search))


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
    return short_choice(bits, size)


def _chosen_traces(search: Search) -> list[Figure]:
    """Stars for what was chosen, and a line through all of a front."""
    traces = []
    for rank, study in enumerate(search.studies):
        colour = PALETTE[rank % len(PALETTE)]
        one = study.chosen or study.best
        plain = labels.plain(study.name)
        if study.front:
            ordered = sorted(study.front, key=lambda point: point.bits_per_weight or 0.0)
            line = _marks(f"{plain}, front", _said(plain, ordered), colour=colour, symbol="circle", size=5)
            traces.append(line | {"mode": "lines+markers", "line": {"color": colour, "width": 1.5}})
        name = f"{plain}, {'chosen' if study.ended else 'best so far'}"
        points = study.picked or ([one] if one else [])
        traces.append(_marks(name, _said(name, points), colour=colour, symbol="star", size=13))
    return traces


def _said(name: str, points: Iterable[Point]) -> list[_Mark]:
    marks: list[_Mark] = []
    for point in points:
        guard = f", {labels.number(point.guard_loss)} on guard windows" if is_finite(point.guard_loss) else ""
        marks.append((point.bits_per_weight, point.loss, f"{name}{guard}"))
    return marks


def history_figures(search: Search) -> list[dict[str, Any]]:
    """The best loss so far over window forwards, and that of held-out windows: as it is, and to the best start.

    Relative to its best start, what a search has gained is seen for all budgets at once, also where it is little.
    """
    by_measure: dict[str, list[Figure]] = {"loss": [], "relative to the best start": []}
    for rank, study in enumerate(search.studies):
        colour = PALETTE[rank % len(PALETTE)]
        name = labels.plain(study.name)
        best, guard = _best_so_far(study), _guards(study)
        lines = [
            (name, best, "solid", "hv"),
            (f"{name}, guard windows", guard, "dot", "linear"),
        ]
        by_measure["loss"] += [_line(*line[:2], colour, dash=line[2], shape=line[3]) for line in lines]
        by_measure["loss"].append(_line(f"{name}, starts", _starts_at_zero(study), colour, dash="", shape="linear"))
        by_measure["relative to the best start"] += [
            _line(title, _by_first(points), colour, dash=dash, shape=shape) for title, points, dash, shape in lines
        ]
    titles = (axis_title(search), "relative to the best start")
    return [
        {"name": name, "figure": _with_axes([one for one in traces if one["x"]], "window forwards", title)}
        for (name, traces), title in zip(by_measure.items(), titles, strict=True)
    ]


def _by_first(points: Sequence[_Mark]) -> list[_Mark]:
    """Losses as multiples of the first one, where that is a start's."""
    if not points or points[0][0] != 0 or not points[0][1]:
        return []
    first = points[0][1]
    return [(x, None if y is None else y / first, text) for x, y, text in points]


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
        room = 0.06 * (high - low) + 0.004
        y_axis |= log_ticks(min(heights), max(heights)) | {"range": [low - room, high + room]}
    layout: Figure = {
        "xaxis": {"title": {"text": x_title}},
        "yaxis": y_axis,
        "margin": {"l": 72, "r": 16, "t": 28},
        "hovermode": "closest",
    }
    return {"data": traces, "layout": layout}
