"""The comparison with fp as a reader sees it: headings, numbers and words, the same in every form of the report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.atlas import labels
from orchestrator.atlas.against_fp import MARGIN, Kind, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from evaluators.comparison import Flips, Interval
    from orchestrator.atlas.against_fp import AgainstFp, Compared
    from orchestrator.atlas.tables import ModelMap

TITLE = "Against fp"
_POINTS = f"{100 * MARGIN:.0f} point"
_SHARE = f"{MARGIN:.0%}"
NOTE = (
    "Every cell on the same documents as fp. In brackets, 95% intervals: Wilson's of an accuracy, the paired "
    "bootstrap's of the difference or ratio to fp. Flips: answers that became right / wrong. p: exact McNemar test, "
    "Holm-adjusted over the cells of the table. No measurable loss: the interval holds fp, which is easy with few "
    f"documents; lossless: it lies within {_POINTS} too ({_SHARE} of a perplexity); unclear: the interval leaves fp "
    "out, but p is above 0.05. At chance: not to be told from guessing."
)
_HEADINGS = {
    Kind.RIGHT_OR_WRONG: ("score, %", "to fp, points", "flips", "p", "reading"),
    Kind.SCORE: ("score", "to fp", "reading"),
    Kind.WINDOW: ("ratio to fp", "reading"),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One cell's line of a table."""

    label: str
    is_fp: bool
    texts: tuple[str, ...]  # one per heading
    verdict: Verdict
    at_chance: bool


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The table of one column."""

    title: str
    headings: tuple[str, ...]  # after the one of the cell
    lines: tuple[Line, ...]
    problems: tuple[str, ...]


def against_lines(model_map: ModelMap) -> list[Lines]:
    """The tables of a model, in the order of its columns; none where there is nothing to compare."""
    return [
        Lines(
            title=model_map.title(found.column),
            headings=_HEADINGS[found.kind],
            lines=tuple(_line(model_map, found, row) for row in found.rows),
            problems=found.problems,
        )
        for found in model_map.against
    ]


def _line(model_map: ModelMap, found: AgainstFp, row: Compared) -> Line:
    shown = model_map.entry(row.cell, found.column).text
    reading = _reading(row, found.kind)
    if found.kind is Kind.RIGHT_OR_WRONG:
        score = shown if row.score is None else _interval(row.score, lambda value: f"{100 * value:.1f}")
        change = _interval(row.change, lambda value: _signed(100 * value))
        texts: tuple[str, ...] = (score, change, _flips(row.flips), _p_value(row.p_value), reading)
    elif found.kind is Kind.SCORE:
        percent = found.column in model_map.percent
        change = _interval(row.change, lambda value: _signed(100 * value) if percent else f"{value:+.3g}")
        texts = (shown, change, reading)
    else:
        texts = ("1" if row.cell.is_fp else _ratio(row.change), reading)
    return Line(
        label=model_map.cell_labels[row.cell.key],
        is_fp=row.cell.is_fp,
        texts=texts,
        verdict=row.verdict,
        at_chance=row.at_chance,
    )


def _reading(row: Compared, kind: Kind) -> str:
    verdict = row.verdict.value
    if (
        row.close and row.verdict is not Verdict.UNCLEAR
    ):  # a loss of less than the margin, too, is told from a large one
        verdict += f" within {_SHARE if kind is Kind.WINDOW else _POINTS}"
    words = ["at chance" if row.at_chance else "", verdict, *row.remarks]
    return ", ".join(word for word in words if word)


def _interval(found: Interval | None, text: Callable[[float], str]) -> str:
    """ "58.5 [51.6, 65.1]"; without brackets where there is no interval."""
    if found is None:
        return ""
    return f"{text(found.value)} [{text(found.low)}, {text(found.high)}]" if found.known else text(found.value)


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _ratio(found: Interval | None) -> str:
    """Four decimals near 1, where cells are told apart by them."""
    if found is not None and not math.isfinite(found.value):
        return labels.NON_FINITE
    return _interval(found, lambda value: f"{value:.4f}" if found and found.value < 2 else labels.number(value))


def _flips(found: Flips | None) -> str:
    return "" if found is None else f"+{found.gained:,} / −{found.lost:,}"


def _p_value(value: float | None) -> str:
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"
