"""Each cell against its model's own fp cell, on the same documents, with what chance alone does. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from orchestrator.atlas import labels
from orchestrator.atlas.tables import State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from evaluators.comparison import Flips, Interval, Scores
    from orchestrator.atlas.rows import Cell, ItemKey, ItemScores
    from orchestrator.atlas.tables import Column, ModelMap

WINDOW_METRIC = "nll"  # what the items of a perplexity are called
SIGNIFICANCE = 0.05
MARGIN = 0.01  # lossless claims less than this: a point of an accuracy, a hundredth of a perplexity


class Kind(Enum):
    """What the scores of a column's documents are, and so what can be said of them."""

    RIGHT_OR_WRONG = "right or wrong"
    SCORE = "score"
    WINDOW = "window"


class Verdict(Enum):
    """How a cell stands to fp."""

    LOSS = "loss"
    GAIN = "gain"
    UNCLEAR = "unclear"  # the interval leaves fp out, the adjusted p-value does not
    NO_MEASURABLE_LOSS = "no measurable loss"  # the interval holds fp
    LOSSLESS = "lossless"  # so it does, and lies within the margin
    NONE = ""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One cell in one column. What does not apply, or cannot be had, is None."""

    cell: Cell
    score: Interval | None = None  # an accuracy with its Wilson interval
    change: Interval | None = None  # other - fp with its paired interval; other / fp for perplexities
    flips: Flips | None = None
    p_value: float | None = None  # McNemar's, adjusted over the cells of the column
    verdict: Verdict = Verdict.NONE
    close: bool = False  # the whole interval lies within the margin
    at_chance: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AgainstFp:
    """The cells of a model in one column, fp first."""

    column: Column
    kind: Kind
    rows: tuple[Compared, ...]
    problems: tuple[str, ...] = ()  # a sentence for each cell that could not be paired


def against_fp(model_map: ModelMap, items: Mapping[ItemKey, ItemScores]) -> list[AgainstFp]:
    """One comparison per column in which documents of fp and of another cell are known."""
    found = (_compare(model_map, column, items) for column in model_map.columns)
    return [comparison for comparison in found if comparison is not None]


def _compare(model_map: ModelMap, column: Column, items: Mapping[ItemKey, ItemScores]) -> AgainstFp | None:
    if model_map.reference is None:
        return None
    measured = [
        cell
        for cell in model_map.cells
        if model_map.entry(cell, column).state in (State.OK, State.NON_FINITE)
        and (cell is model_map.reference or not cell.is_fp)
    ]
    found = {cell.key: _items_of(model_map, column, cell, items) for cell in measured}
    fp = found.pop(model_map.reference.key, None)
    others = [known for known in found.values() if known is not None]
    if fp is None or not others:
        return None
    kind = _kind(column, [fp, *others])
    rows, problems = [_fp_row(model_map.reference, fp, kind)], []
    for cell in measured:
        other = found.get(cell.key)
        if cell is model_map.reference:
            continue
        if other is None:
            rows.append(Compared(cell=cell, remarks=("no items",)))
            continue
        row, problem = _row(cell, fp, other, kind)
        rows.append(row)
        problems += [f"{model_map.cell_labels[cell.key]}: {problem}"] if problem else []
    return AgainstFp(
        column=column,
        kind=kind,
        rows=tuple(_judged(row, column, kind) for row in _adjusted(rows)),
        problems=tuple(problems),
    )


def _items_of(
    model_map: ModelMap, column: Column, cell: Cell, items: Mapping[ItemKey, ItemScores]
) -> ItemScores | None:
    metric = WINDOW_METRIC if column.is_perplexity else column.metric
    return items.get((*cell.key, model_map.entry(cell, column).job_id, column.task, metric))


def _kind(column: Column, found: Sequence[ItemScores]) -> Kind:
    if column.is_perplexity:
        return Kind.WINDOW
    right_or_wrong = all(((item.values_N == 0) | (item.values_N == 1)).all() for item in found)
    return Kind.RIGHT_OR_WRONG if right_or_wrong and column.higher_is_better else Kind.SCORE


def _fp_row(cell: Cell, fp: ItemScores, kind: Kind) -> Compared:
    return _scored(Compared(cell=cell), fp, kind)


def _row(cell: Cell, fp: ItemScores, other: ItemScores, kind: Kind) -> tuple[Compared, str]:
    """The row of a cell without its verdict, and why it could not be paired."""
    import numpy as np

    from evaluators.comparison import bootstrap_difference, flips, mcnemar, pair, perplexity_ratio
    from evaluators.errors import EvaluationError

    row = _scored(Compared(cell=cell), other, kind)
    try:
        before_N, after_N = pair(_scores(fp, kind), _scores(other, kind))
    except EvaluationError as error:
        return replace(row, remarks=(*row.remarks, "not paired")), labels.plain(str(error))
    if len(before_N) == 1:
        row = replace(row, remarks=(*row.remarks, "one document has no interval"))
    if kind is Kind.WINDOW:
        if not np.isfinite(before_N).all():
            row = replace(row, remarks=(*row.remarks, "fp not finite"))
        return replace(row, change=perplexity_ratio(before_N, after_N)), ""
    row = replace(row, change=bootstrap_difference(before_N, after_N))
    if kind is Kind.RIGHT_OR_WRONG:
        changed = flips(before_N, after_N)
        row = replace(row, flips=changed, p_value=mcnemar(changed))
    return row, ""


def _scored(row: Compared, found: ItemScores, kind: Kind) -> Compared:
    """What can be said of a cell alone."""
    import numpy as np

    from evaluators.comparison import chance_test, wilson_interval

    if kind is not Kind.RIGHT_OR_WRONG:
        unit = "window" if kind is Kind.WINDOW else "score"
        broken = int(np.count_nonzero(~np.isfinite(found.values_N)))
        remark = f"{broken:,} of {labels.counted(len(found.values_N), unit)} not finite"
        return replace(row, remarks=(remark,) if broken else ())
    values_N = _scores(found, kind).values_N
    correct, unanswered = int(values_N.sum()), int(np.count_nonzero(~found.answered_N))
    return replace(
        row,
        score=wilson_interval(correct, len(values_N)),
        # Without choices (an answer in words) there is no guessing.
        at_chance=bool(found.choices_N.min() >= 2) and chance_test(correct, found.choices_N) >= SIGNIFICANCE,
        remarks=(f"{unanswered:,} without an answer",) if unanswered else (),
    )


def _scores(found: ItemScores, kind: Kind) -> Scores:
    import numpy as np

    from evaluators.comparison import Scores

    values_N = found.values_N
    if kind is Kind.RIGHT_OR_WRONG:
        # lm-eval takes the first nan for the largest log-likelihood, so its choice would count as the answer.
        values_N = np.where(found.answered_N, values_N, 0.0)
    return Scores(found.doc_ids_N, values_N)


def _adjusted(rows: Sequence[Compared]) -> list[Compared]:
    from evaluators.comparison import holm

    p_values = [row.p_value for row in rows if row.p_value is not None]
    adjusted = iter(holm(p_values))
    return [row if row.p_value is None else replace(row, p_value=next(adjusted)) for row in rows]


def _judged(row: Compared, column: Column, kind: Kind) -> Compared:
    from evaluators.comparison import flip_interval

    if row.change is None or not row.change.known:
        return row
    same = 1.0 if kind is Kind.WINDOW else 0.0
    claims = [row.change] if row.flips is None else [row.change, flip_interval(row.flips)]
    close = kind is not Kind.SCORE and all(claim.within(same - MARGIN, same + MARGIN) for claim in claims)
    if row.change.contains(same):
        verdict = Verdict.LOSSLESS if close else Verdict.NO_MEASURABLE_LOSS
    elif row.p_value is not None and row.p_value >= SIGNIFICANCE:
        verdict = Verdict.UNCLEAR
    else:
        verdict = Verdict.GAIN if (row.change.value > same) == column.higher_is_better else Verdict.LOSS
    return replace(row, verdict=verdict, close=close)
