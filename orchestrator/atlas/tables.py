"""The map: what each cell of a model scored in each column, against fp. Pure, no IO, no drawing."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from orchestrator.atlas import labels
from orchestrator.atlas.expected import as_list, expected_tasks
from orchestrator.atlas.rows import QUANTIZE_TASK, Atlas, Cell, CellKey, Measurement

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from orchestrator.atlas.against_fp import AgainstFp

PERPLEXITY = "perplexity"
TOKEN_METRICS = {PERPLEXITY, "kl_divergence", "top1_agreement"}
HEAT_LEVELS = 10
_HEAT_FLOOR, _HEAT_CEILING = 1e-3, 1.0  # relative differences that are as green, and as red, as it gets


class State(Enum):
    """What is known of a cell in a column."""

    OK = "ok"
    NON_FINITE = "non_finite"
    FAILED = "failed"
    PENDING = "pending"


@dataclass(frozen=True)
class Column:
    """One thing measured by one protocol: numbers of different protocols never share a column."""

    task: str
    metric: str
    protocol: str
    higher_is_better: bool

    @property
    def is_perplexity(self) -> bool:
        """Whether the deployment advice may rest on this column."""
        return self.metric == PERPLEXITY

    @property
    def unit(self) -> str:
        """What was scored."""
        return "token" if self.metric in TOKEN_METRICS else "item"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One square of the map."""

    state: State
    text: str  # the value, or why there is none
    value: float | None = None
    stderr: float | None = None
    n: int | None = None
    change: float | None = None  # relative to fp; positive is worse, whichever direction is better
    difference: str = ""  # the same for people
    best: bool = False  # nothing quantized scores better with as many or fewer weight bits
    error: str = ""
    job_id: str = ""  # whose items belong to this square

    @property
    def heat(self) -> int | None:
        """0 is as good as fp, `HEAT_LEVELS` is twice as bad or worse; logarithmic between."""
        return None if self.change is None else heat_level(self.change)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the method x bits map: cells that differ in weight bits alone."""

    label: str
    method: str
    cells: dict[int | None, Cell]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A failed or non-finite row, to be listed with its reason."""

    model: str
    cell: str
    task: str
    state: State
    summary: str
    error: str


@dataclass(frozen=True, kw_only=True)
class ModelMap:
    """Everything the report shows of one model."""

    model: str
    cells: tuple[Cell, ...]  # fp first, then from many bits to few
    variants: tuple[Variant, ...]
    weight_bits: tuple[int | None, ...]  # from many to few; None where the sweep file does not say
    columns: tuple[Column, ...]
    column_labels: dict[Column, str]
    percent: frozenset[Column]  # columns whose values are shares
    cell_labels: dict[CellKey, str]
    reference: Cell | None
    entries: dict[tuple[CellKey, Column], Entry]
    failures: tuple[Failure, ...]
    against: tuple[AgainstFp, ...] = ()  # columns whose documents are known, every cell against fp

    def entry(self, cell: Cell, column: Column) -> Entry:
        """The square of a cell and a column."""
        return self.entries[(cell.key, column)]

    def title(self, column: Column) -> str:
        """The column's label with its metric."""
        label, metric = self.column_labels[column], labels.plain(column.metric)
        return label if metric in label else f"{label} {metric}"

    def fp_entry(self, column: Column) -> Entry | None:
        """What the unquantized model scored."""
        return None if self.reference is None else self.entry(self.reference, column)

    def state(self, cell: Cell) -> State:
        """One word for a cell: the worst thing that is known of it."""
        states = {self.entry(cell, column).state for column in self.columns}
        for state in (State.FAILED, State.NON_FINITE, State.PENDING):
            if state in states:
                return state
        return State.PENDING if cell.pending or not states else State.OK


def heat_level(change: float) -> int:
    """Where a relative difference lies on the colour scale; everything beyond an end is at that end."""
    if change == math.inf:
        return HEAT_LEVELS
    span = math.log10(_HEAT_CEILING / _HEAT_FLOOR)
    position = math.log10(max(change, _HEAT_FLOOR) / _HEAT_FLOOR) / span
    return round(HEAT_LEVELS * min(position, 1.0))


def model_maps(atlas: Atlas) -> list[ModelMap]:
    """One map per model, in the order of the sweep file."""
    from orchestrator.atlas.against_fp import against_fp  # it speaks of the map

    maps = [_model_map(atlas, model) for model in atlas.models]
    return [replace(found, against=tuple(against_fp(found, atlas.items))) for found in maps]


def _model_map(atlas: Atlas, model: str) -> ModelMap:
    cells = [cell for cell in atlas.cells if cell.model == model]
    rows = [row for row in atlas.measurements if row.cell[0] == model]
    variant_of = labels.variant_labels(cells)
    methods = _method_order(atlas)
    cells.sort(key=lambda cell: _cell_order(cell, methods, variant_of[cell.key]))
    cell_labels = {cell.key: labels.cell_label(cell, variant_of[cell.key]) for cell in cells}
    columns = _columns(atlas, rows)
    percent = frozenset(column for column in columns if _is_share(column, rows))
    reference = _reference(cells, rows)
    entries = _entries(cells, columns, percent, reference, rows)
    variants = _variants(cells, methods, variant_of)
    return ModelMap(
        model=model,
        cells=tuple(cells),
        variants=tuple(variants),
        weight_bits=tuple(sorted({bits for row in variants for bits in row.cells}, key=_bits_order)),
        columns=tuple(columns),
        column_labels=labels.column_labels(columns),
        percent=percent,
        cell_labels=cell_labels,
        reference=reference,
        entries=entries,
        failures=tuple(_failures(rows, cell_labels)),
    )


def _method_order(atlas: Atlas) -> dict[str, int]:
    asked = [str(entry.get("method")) for entry in as_list(atlas.config.get("grid")) if isinstance(entry, dict)]
    seen = sorted({cell.method for cell in atlas.cells})
    return {method: rank for rank, method in enumerate(dict.fromkeys([*asked, *seen]))}


def _bits_order(bits: int | None) -> float:
    return math.inf if bits is None else -bits


def _cell_order(cell: Cell, methods: dict[str, int], variant: str) -> tuple[object, ...]:
    return (
        not cell.is_fp,
        _bits_order(cell.weight_bits),
        -cell.activation_bits,
        methods[cell.method],
        labels.natural(variant),
    )


def _variants(cells: Iterable[Cell], methods: dict[str, int], variant_of: dict[CellKey, str]) -> list[Variant]:
    rows: dict[str, Variant] = {}
    for cell in cells:
        if not cell.is_fp:
            label = variant_of[cell.key]
            row = rows.setdefault(label, Variant(label=label, method=cell.method, cells={}))
            row.cells[cell.weight_bits] = cell

    def order(row: Variant) -> tuple[object, ...]:
        activation_bits = next(iter(row.cells.values())).activation_bits
        return (methods[row.method], -activation_bits, labels.natural(row.label))

    return sorted(rows.values(), key=order)


def _columns(atlas: Atlas, rows: Sequence[Measurement]) -> list[Column]:
    """Columns in the order of the sweep file: first those in which less is better, then the tasks."""
    corpora, tasks = expected_tasks(atlas.config)
    found: dict[tuple[str, str, str], bool] = {}
    for row in rows:
        if not row.failed:
            better = row.metric != PERPLEXITY if row.higher_is_better is None else row.higher_is_better
            found.setdefault((row.task, row.metric, row.protocol), better)
    for row in rows:  # a task of which nothing but failures is known still has its column
        if row.failed and row.task != QUANTIZE_TASK and all(task != row.task for task, _, _ in found):
            is_corpus = row.task in corpora or row.metric == PERPLEXITY
            found[(row.task, row.metric or (PERPLEXITY if is_corpus else ""), row.protocol)] = not is_corpus
    # The sweep file may name a suite whose tasks carry longer names.
    for name in [*corpora, *tasks]:
        if not any(task == name or task.startswith(f"{name}_") for task, _, _ in found):
            found[(name, PERPLEXITY if name in corpora else "", "")] = name not in corpora
    rank = {name: position for position, name in enumerate([*corpora, *tasks])}
    columns = [Column(*identity, better) for identity, better in found.items()]
    return sorted(
        columns,
        key=lambda column: (
            column.higher_is_better,
            not column.is_perplexity,
            rank.get(column.task, len(rank)),
            labels.natural(column.task),
            column.metric,
            labels.natural(column.protocol),
        ),
    )


def _is_share(column: Column, rows: Iterable[Measurement]) -> bool:
    values = [row.value for row in rows if _in_column(row, column) and row.value is not None]
    return column.higher_is_better and bool(values) and all(0 <= value <= 1 for value in values)


def _in_column(row: Measurement, column: Column) -> bool:
    same = (row.task, row.metric, row.protocol) == (column.task, column.metric, column.protocol)
    return same and not row.failed


def _reference(cells: Iterable[Cell], rows: Sequence[Measurement]) -> Cell | None:
    """The fp cell; of several (the weights were changed) the one measured last."""
    fp = {cell.key: cell for cell in cells if cell.is_fp}
    for row in reversed(rows):
        if row.cell in fp and not row.failed:
            return fp[row.cell]
    return next(iter(fp.values()), None)


def _entries(
    cells: Sequence[Cell],
    columns: Sequence[Column],
    percent: frozenset[Column],
    reference: Cell | None,
    rows: Sequence[Measurement],
) -> dict[tuple[CellKey, Column], Entry]:
    measured = {(row.cell, row.task, row.metric, row.protocol): row for row in rows if not row.failed}
    failures: dict[tuple[CellKey, str], list[Measurement]] = defaultdict(list)
    for row in rows:
        if row.failed:
            failures[(row.cell, row.task)].append(row)

    entries: dict[tuple[CellKey, Column], Entry] = {}
    for column in columns:
        column_key = (column.task, column.metric, column.protocol)
        fp_row = measured.get((reference.key, *column_key)) if reference else None
        fp_value = fp_row.value if fp_row is not None and fp_row.status == "ok" else None
        best = _best(cells, column, {cell.key: measured.get((cell.key, *column_key)) for cell in cells})
        for cell in cells:
            found = measured.get((cell.key, *column_key))
            if found is None:
                entry = _entry_without_row(cell, column, columns, failures)
            else:
                entry = _entry(
                    found, column, fp_value, is_fp=cell.is_fp, percent=column in percent, best=cell.key in best
                )
            entries[(cell.key, column)] = entry
    return entries


def _entry(
    row: Measurement, column: Column, fp_value: float | None, *, is_fp: bool, percent: bool, best: bool
) -> Entry:
    if row.status == "ok" and row.value is not None:
        compared = fp_value is not None and not is_fp
        return Entry(
            state=State.OK,
            text=labels.quality(row.value, None, percent=percent),
            value=row.value,
            stderr=row.stderr,
            n=row.n,
            change=_change(row.value, fp_value, column) if compared else None,
            difference=labels.difference(row.value, fp_value, percent=percent) if compared and fp_value else "",
            best=best,
            job_id=row.job_id,
        )
    if row.status in ("ok", "non_finite"):
        text = labels.NON_FINITE if row.status == "non_finite" else "no value recorded"
        return Entry(state=State.NON_FINITE, text=text, n=row.n, error=labels.plain(row.error), job_id=row.job_id)
    return Entry(state=State.FAILED, text=labels.plain(row.status.replace("_", " ")), error=labels.plain(row.error))


def _entry_without_row(
    cell: Cell,
    column: Column,
    columns: Sequence[Column],
    failures: dict[tuple[CellKey, str], list[Measurement]],
) -> Entry:
    protocols = {other.protocol for other in columns if other.task == column.task}
    # A failed job may not know its protocol: then it answers for every column of its task.
    of_task = [
        row
        for row in failures.get((cell.key, column.task), [])
        if row.protocol == column.protocol or row.protocol not in protocols
    ]
    reasons = of_task or failures.get((cell.key, QUANTIZE_TASK), [])
    if not reasons:
        return Entry(state=State.PENDING, text=labels.NOT_RUN)
    row = reasons[-1]
    return Entry(state=State.FAILED, text=labels.failure_reason(row.error_kind), error=labels.plain(row.error))


def _change(value: float, reference: float | None, column: Column) -> float | None:
    if reference is None:
        return None
    worse = reference - value if column.higher_is_better else value - reference
    if reference == 0:  # a divergence from fp, or a rate that fp has none of: its own size says it
        return worse
    return worse / abs(reference)


def _best(cells: Iterable[Cell], column: Column, rows: dict[CellKey, Measurement | None]) -> set[CellKey]:
    """Quantized cells that no quantized cell beats with as many or fewer weight bits."""
    sign = -1.0 if column.higher_is_better else 1.0
    scored: list[tuple[int, float, CellKey]] = []
    for cell in cells:
        row = rows[cell.key]
        if row is not None and row.status == "ok" and row.value is not None and not cell.is_fp:
            scored.append((16 if cell.weight_bits is None else cell.weight_bits, sign * row.value, cell.key))
    best: set[CellKey] = set()
    bound = math.inf
    for width in sorted({width for width, _, _ in scored}):
        bound = min(bound, *(score for other, score, _ in scored if other == width))
        best |= {key for other, score, key in scored if other == width and score == bound}
    return best


def _failures(rows: Iterable[Measurement], cell_labels: dict[CellKey, str]) -> list[Failure]:
    found = []
    for row in rows:
        if row.status == "ok":
            continue
        failed = row.status != "non_finite"
        found.append(
            Failure(
                model=labels.plain(row.cell[0]),
                cell=cell_labels[row.cell],
                task=labels.plain(row.task),
                state=State.FAILED if failed else State.NON_FINITE,
                summary=labels.failure_reason(row.error_kind) if failed else labels.NON_FINITE,
                error=labels.plain(row.error),
            )
        )
    return sorted(found, key=lambda item: (item.state.value, labels.natural(item.cell), item.task))
