"""The atlas as GitHub markdown, for pull requests and notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.atlas import labels
from orchestrator.atlas.advice import deployments
from orchestrator.atlas.against_texts import NOTE as AGAINST_NOTE
from orchestrator.atlas.against_texts import TITLE as AGAINST_TITLE
from orchestrator.atlas.against_texts import against_lines
from orchestrator.atlas.markdown_text import escape, table
from orchestrator.atlas.provenance import census_text, protocol_lines, provenance_lines
from orchestrator.atlas.search_markdown import search_lines
from orchestrator.atlas.seeds import NOTE, seed_rows
from orchestrator.atlas.tables import Entry, ModelMap, State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.atlas.rows import Atlas
    from orchestrator.atlas.tables import Column


def render_markdown(atlas: Atlas, maps: Sequence[ModelMap]) -> str:
    """The whole atlas.md."""
    lines = [f"# Atlas of {escape(atlas.name)}", "", f"{census_text(maps)}.", ""]
    for name in atlas.history.running:
        lines += [f"Running: {escape(name)}", ""]
    if not maps:
        lines += ["The sweep file names no model and no row is written yet.", ""]
    lines += search_lines(atlas, maps)
    for model_map in maps:
        lines += _model(model_map)
    lines += _failures(maps)
    lines += _provenance(atlas, maps)
    return "\n".join(lines).rstrip() + "\n"


def _model(model_map: ModelMap) -> list[str]:
    lines = [f"## {escape(model_map.model)}", ""]
    advice = deployments(model_map)
    for item in advice:
        answer = f"**{escape(item.answer(model_map))}**, {escape(item.detail(model_map))}"
        lines.append(f"- {escape(item.headline(model_map))}: {answer}")
    lines += [""] if advice else []
    for column in model_map.columns if model_map.variants else ():
        fp = model_map.fp_entry(column)
        lines += [f"### {escape(model_map.title(column))}", ""]
        if fp is not None:
            lines += [f"fp: {_square(model_map, column, fp)}", ""]
        header = ["method", *(labels.bits_header(bits) for bits in model_map.weight_bits)]
        rows = []
        for variant in model_map.variants:
            cells = [variant.cells.get(bits) for bits in model_map.weight_bits]
            squares = [_square(model_map, column, model_map.entry(cell, column)) if cell else "" for cell in cells]
            rows.append([escape(variant.label), *squares])
        lines += table(header, rows)
    return lines + _against(model_map) + _seeds(model_map) + _cells(model_map)


def _against(model_map: ModelMap) -> list[str]:
    tables = against_lines(model_map)
    lines = [f"### {AGAINST_TITLE}", ""] if tables else []
    for found in tables:
        rows = [[escape(line.label), *map(escape, line.texts)] for line in found.lines]
        lines += [f"#### {escape(found.title)}", "", *table(["cell", *found.headings], rows)]
        lines += [f"- {escape(problem)}" for problem in found.problems] + ([""] if found.problems else [])
    return [*lines, AGAINST_NOTE, ""] if tables else []


def _seeds(model_map: ModelMap) -> list[str]:
    found = seed_rows(model_map)
    if not found:
        return []
    header = ["cell", "seeds", *(escape(model_map.title(column)) for column in model_map.columns)]
    rows = [[escape(row.label), row.seeds, *map(escape, row.scores)] for row in found]
    return ["### Over calibration seeds", "", *table(header, rows), NOTE, ""]


def _cells(model_map: ModelMap) -> list[str]:
    columns = [escape(model_map.title(column)) for column in model_map.columns]
    rows = [
        [
            escape(model_map.cell_labels[cell.key]),
            labels.bits(cell.decoder_bits_per_weight),
            labels.megabytes(cell.checkpoint_bytes),
            labels.duration(cell.quantize_seconds),
            *(_square(model_map, column, model_map.entry(cell, column)) for column in model_map.columns),
        ]
        for cell in model_map.cells
    ]
    note = "Bold: nothing quantized is better with as many or fewer weight bits. In brackets: difference to fp."
    return ["### All cells", "", *table(["cell", "bits/weight", "MB", "quantize", *columns], rows), note, ""]


def _square(model_map: ModelMap, column: Column, entry: Entry) -> str:
    if entry.state is not State.OK or entry.value is None:
        return escape(entry.text)
    stderr = entry.stderr if column.higher_is_better else None
    text = labels.quality(entry.value, stderr, percent=column in model_map.percent)
    if entry.best:
        text = f"**{text}**"
    return f"{text} ({entry.difference})" if entry.difference else text


def _failures(maps: Sequence[ModelMap]) -> list[str]:
    failures = [item for model_map in maps for item in model_map.failures]
    if not failures:
        return []
    rows = [
        [escape(text) for text in (item.model, item.cell, item.task, item.summary, item.error)] for item in failures
    ]
    header = ["model", "cell", "task", "what", "error"]
    return ["## Failed and non-finite", "", *table(header, rows, left=len(header))]


def _provenance(atlas: Atlas, maps: Sequence[ModelMap]) -> list[str]:
    protocols = dict.fromkeys(line for model_map in maps for line in protocol_lines(model_map))
    lines = ["## How it was measured", ""]
    lines += [f"- {escape(subject)}: {escape(text)}" for subject, text in [*protocols, *provenance_lines(atlas)]]
    return [*lines, ""]
