"""The atlas as rich tables, for a terminal of any width and for pipes without colour."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from orchestrator.atlas import labels
from orchestrator.atlas.advice import deployments
from orchestrator.atlas.against_fp import Verdict
from orchestrator.atlas.against_texts import NOTE as AGAINST_NOTE
from orchestrator.atlas.against_texts import TITLE as AGAINST_TITLE
from orchestrator.atlas.against_texts import against_lines
from orchestrator.atlas.provenance import census_text, protocol_lines, provenance_lines
from orchestrator.atlas.search_terminal import print_search
from orchestrator.atlas.seeds import seed_rows
from orchestrator.atlas.tables import HEAT_LEVELS, Entry, ModelMap, State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from orchestrator.atlas.against_texts import Line
    from orchestrator.atlas.rows import Atlas, Cell
    from orchestrator.atlas.tables import Column

MAPS_SHOWN = 8  # more columns than this have their own maps in atlas.html only
_SQUARE_WIDTH = 12
_LABEL_WIDTH = 22
_READING_WIDTH = 24
_STATE_STYLES = {State.NON_FINITE: "magenta", State.FAILED: "bold red", State.PENDING: "dim"}
_VERDICT_STYLES = {Verdict.LOSS: "red", Verdict.GAIN: "green", Verdict.LOSSLESS: "bold green"}
_ERRORS_SHOWN = 20

# Headings and, for every row, a text.
_Columns: TypeAlias = "Sequence[tuple[str, list[Text]]]"


def print_atlas(atlas: Atlas, maps: Sequence[ModelMap], console: Console) -> None:
    """Print the map of every model, what stands out, and how it was measured."""
    console.print(Text.assemble((f"Atlas of {labels.plain(atlas.name)}", "bold"), f"  {census_text(maps)}"))
    for name in atlas.history.running:
        console.print(Text(f"running: {labels.plain(name)}", style="dim"))
    if not maps:
        console.print(Text("The sweep file names no model and no row is written yet."))
    if atlas.search is not None:
        print_search(atlas.search, maps, console)
    for model_map in maps:
        _print_model(model_map, console)
    _print_failures(maps, console)
    _print_provenance(atlas, maps, console)


def _print_model(model_map: ModelMap, console: Console) -> None:
    console.print()
    console.rule(Text(labels.plain(model_map.model), style="bold"), align="left")
    for item in deployments(model_map):
        line = Text(f"{item.headline(model_map)}: ")
        line.append(item.answer(model_map), style="bold")
        line.append(f", {item.detail(model_map)}")
        console.print(line)
    if model_map.variants:
        shown = [column for column in model_map.columns if len(model_map.columns) <= MAPS_SHOWN or column.is_perplexity]
        for column in shown:
            for table in _map_tables(model_map, column, console.width):
                console.print(table)
        console.print(_legend())
        if len(shown) < len(model_map.columns):
            rest = labels.counted(len(model_map.columns) - len(shown), "further map")
            console.print(Text(f"{rest} in atlas.html; every value is below.", style="dim"))
    _print_against(model_map, console)
    _print_seeds(model_map, console)
    for table in _cell_tables(model_map, console.width):
        console.print(table)


def _print_against(model_map: ModelMap, console: Console) -> None:
    tables = against_lines(model_map)
    shown = tables if len(tables) <= MAPS_SHOWN else []
    for lines in shown:
        cells = [_Row(line.label, line.is_fp) for line in lines.lines]
        groups = [[(name, _against_texts(lines.lines, index))] for index, name in enumerate(lines.headings)]
        title = Text(f"{AGAINST_TITLE}: {lines.title}", style="bold")
        for table in _grouped_tables(cells, groups, console.width):
            table.title, title = title, Text(f"{title.plain}, continued", style="dim")
            console.print(table)
        for problem in lines.problems:
            console.print(Text(problem, style="red"))
    if shown:
        console.print(Text(AGAINST_NOTE, style="dim"))
    elif tables:
        console.print(Text(f"{AGAINST_TITLE}: {labels.counted(len(tables), 'table')} in atlas.html and atlas.md."))


def _against_texts(lines: Sequence[Line], index: int) -> list[Text]:
    """One column; the last one, the reading, has its colour, and is wrapped so that it leaves room for numbers."""
    texts = []
    for line in lines:
        if index < len(line.texts) - 1:
            texts.append(Text(line.texts[index]))
        else:
            style = "magenta" if line.at_chance else _VERDICT_STYLES.get(line.verdict, "")
            texts.append(Text(fill(line.texts[index], _READING_WIDTH), style=style))
    return texts


def _print_seeds(model_map: ModelMap, console: Console) -> None:
    """One table per column, so that a narrow terminal cuts no number."""
    rows = seed_rows(model_map)
    for index, column in enumerate(model_map.columns if rows else ()):
        title = Text(f"{model_map.title(column)} over calibration seeds", style="bold")
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, title_style="", pad_edge=False)
        table.add_column("cell")
        table.add_column("seeds")
        table.add_column("mean ± sd", justify="right", no_wrap=True)
        for row in rows:
            table.add_row(Text(row.label), Text(row.seeds), Text(row.scores[index]))
        console.print(table)


def _map_tables(model_map: ModelMap, column: Column, width: int) -> Iterator[Table]:
    """The method x bits map of one column, cut into several where the terminal is narrow."""
    fp = model_map.fp_entry(column)
    title = Text(model_map.title(column), style="bold")
    if fp is not None:
        title.append(f"  fp {_with_stderr(model_map, column, fp)}", style="not bold")
    fitting = max(1, (width - _LABEL_WIDTH - 2) // (_SQUARE_WIDTH + 2))
    for start in range(0, len(model_map.weight_bits), fitting):
        bits = model_map.weight_bits[start : start + fitting]
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, title_style="", pad_edge=False)
        table.add_column("method", max_width=max(_LABEL_WIDTH, width - len(bits) * (_SQUARE_WIDTH + 2) - 2))
        for width_bits in bits:
            table.add_column(labels.bits_header(width_bits), justify="right", width=_SQUARE_WIDTH)
        for variant in model_map.variants:
            squares = [
                _square(model_map, column, model_map.entry(variant.cells[key], column))
                if key in variant.cells
                else Text("")
                for key in bits
            ]
            table.add_row(Text(variant.label), *squares)
        yield table


def _with_stderr(model_map: ModelMap, column: Column, entry: Entry) -> str:
    if entry.value is None or not column.higher_is_better:
        return entry.text
    return labels.quality(entry.value, entry.stderr, percent=column in model_map.percent)


def _square(model_map: ModelMap, column: Column, entry: Entry) -> Text:
    if entry.state is not State.OK:
        return Text(entry.text, style=_STATE_STYLES[entry.state])
    text = Text(_with_stderr(model_map, column, entry), style=_heat_style(entry))
    if entry.best:
        text.stylize("bold")
    text.append("*" if entry.best else " ")  # the space keeps digits above digits
    return text


def _heat_style(entry: Entry) -> str:
    """From green over yellow to red."""
    if entry.heat is None:
        return ""
    share = entry.heat / HEAT_LEVELS
    red, green = (min(1.0, 2 * share), min(1.0, 2 * (1 - share)))
    return f"rgb({int(60 + 160 * red)},{int(70 + 120 * green)},70)"


def _legend() -> Text:
    legend = Text("* best with as many or fewer bits; colour: distance from fp ", style="dim")
    for level, text in ((0, "0.1%"), (3, "1%"), (7, "10%"), (HEAT_LEVELS, "100%")):
        sample = Entry(state=State.OK, text=text, change=10 ** (3 * level / HEAT_LEVELS - 3))
        legend.append(text + " ", style=f"not dim {_heat_style(sample)}")
    return legend


@dataclass(frozen=True)
class _Row:
    """A row of a table of cells."""

    label: str
    is_fp: bool


def _cell_tables(model_map: ModelMap, width: int) -> Iterator[Table]:
    """All cells with costs and values."""
    rows = [_Row(model_map.cell_labels[cell.key], cell.is_fp) for cell in model_map.cells]
    groups = [_costs(model_map.cells), *(_values(model_map, column) for column in model_map.columns)]
    return _grouped_tables(rows, groups, width)


def _grouped_tables(rows: Sequence[_Row], groups: Sequence[_Columns], width: int) -> Iterator[Table]:
    """Cells as rows: everything in one table where it fits, else a table per group of columns."""
    label_width = max((len(row.label) for row in rows), default=4)
    label_width = min(label_width, max(_LABEL_WIDTH, width // 3))
    pending = list(groups)
    while pending:
        taken = [pending.pop(0)]
        room = width - label_width - 3 - sum(_group_width(group) for group in taken)
        while pending and _group_width(pending[0]) <= room:
            room -= _group_width(pending[0])
            taken.append(pending.pop(0))
        yield _cell_table(rows, [column for group in taken for column in group], label_width)


def _cell_table(rows: Sequence[_Row], columns: _Columns, label_width: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="")
    table.add_column("cell", max_width=label_width)
    for header, _ in columns:
        table.add_column(header, justify="right")
    for index, row in enumerate(rows):
        label = Text(row.label, style="bold" if row.is_fp else "")
        table.add_row(label, *(texts[index] for _, texts in columns), end_section=row.is_fp)
    return table


def _group_width(group: _Columns) -> int:
    return sum(
        3 + max(cell_len(line) for text in [header, *(text.plain for text in texts)] for line in text.split("\n"))
        for header, texts in group
    )


def _costs(cells: Sequence[Cell]) -> _Columns:
    return [
        ("bits/\nweight", [Text(labels.bits(cell.decoder_bits_per_weight)) for cell in cells]),
        ("size\nMB", [Text(labels.megabytes(cell.checkpoint_bytes)) for cell in cells]),
        ("quantize\ntime", [Text(labels.duration(cell.quantize_seconds)) for cell in cells]),
    ]


def _values(model_map: ModelMap, column: Column) -> _Columns:
    texts = []
    for cell in model_map.cells:
        entry = model_map.entry(cell, column)
        text = _square(model_map, column, entry)
        if entry.difference:
            text.append(f" {entry.difference:>6}", style="not bold")
        texts.append(text)
    header = "\n".join([model_map.column_labels[column], labels.plain(column.metric)])
    return [(header, texts)]


def _print_failures(maps: Sequence[ModelMap], console: Console) -> None:
    failures = [item for model_map in maps for item in model_map.failures]
    if not failures:
        return
    console.print()
    console.print(Text("Failed and non-finite", style="bold"))
    for item in failures[:_ERRORS_SHOWN]:
        line = Text(f"{labels.plain(item.model)} {item.cell}, {item.task}: ")
        line.append(item.summary, style=_STATE_STYLES[item.state])
        line.append(f"; {item.error}" if item.error else "")
        console.print(line)
    if len(failures) > _ERRORS_SHOWN:
        console.print(Text(f"and {len(failures) - _ERRORS_SHOWN} more, listed in atlas.md", style="dim"))


def _print_provenance(atlas: Atlas, maps: Sequence[ModelMap], console: Console) -> None:
    lines = dict.fromkeys(line for model_map in maps for line in protocol_lines(model_map))
    console.print()
    console.print(Text("How it was measured", style="bold"))
    for subject, text in [*lines, *provenance_lines(atlas)]:
        if text != labels.UNKNOWN:
            console.print(Text.assemble((f"{subject}: ", "dim"), text))
