"""atlas.html: one file that needs no network. Builds what the template shows; words and marks are in the template."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.atlas import labels
from orchestrator.atlas.advice import deployments
from orchestrator.atlas.against_texts import NOTE as AGAINST_NOTE
from orchestrator.atlas.against_texts import TITLE as AGAINST_TITLE
from orchestrator.atlas.against_texts import against_lines
from orchestrator.atlas.figures import CURVE_AXES, curves, describe, method_colours, trade_off, unplaced
from orchestrator.atlas.layer_figures import layer_figures
from orchestrator.atlas.provenance import census_text, protocol_lines, provenance_lines
from orchestrator.atlas.search_page import search_section
from orchestrator.atlas.search_texts import cell_labels_of
from orchestrator.atlas.seeds import NOTE as SEED_NOTE
from orchestrator.atlas.seeds import seed_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from orchestrator.atlas.rows import Atlas, Cell
    from orchestrator.atlas.tables import Column, Entry, ModelMap

TEMPLATE = "page.html.jinja"
STYLE = "page.css"
SCRIPT = "page.js.jinja"  # plain JavaScript; the suffix makes it package data
SEARCH_STYLE = "search.css"
SEARCH_SCRIPT = "search.js.jinja"
_SEARCH_PLACE = "  // {{ search }}\n"  # in the script; it and the style hold no more than the page needs


def render_page(atlas: Atlas, maps: Sequence[ModelMap], *, made_at: datetime) -> str:
    """The whole page.

    Args:
        atlas: the sweep.
        maps: one map per model.
        made_at: the time to state as the page's own.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    here = Path(__file__).parent
    scripts = [text.replace("\r", "") for text in (get_plotlyjs(), _script(here, atlas))]
    search = search_section(atlas.search, cell_labels_of(maps)) if atlas.search else None
    if search:
        search["figures"] = Markup(_json_for_script(search["figures"]))
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    colours = method_colours(atlas)
    return environment.get_template(TEMPLATE).render(
        name=labels.plain(atlas.name),
        has_rows=bool(atlas.measurements),
        session_open=atlas.history.open,
        running=[labels.plain(job) for job in atlas.history.running],
        census=census_text(maps),
        models=[_model(model_map) for model_map in maps],
        failures=[item for model_map in maps for item in model_map.failures],
        protocols=list(dict.fromkeys(line for model_map in maps for line in protocol_lines(model_map))),
        provenance=provenance_lines(atlas),
        measured=dict(provenance_lines(atlas)),
        made_at=labels.moment(made_at),
        policy="; ".join(
            [
                "default-src 'none'",
                f"script-src {' '.join(_script_hash(text) for text in scripts)}",
                "style-src 'unsafe-inline'",
                "img-src data: blob:",
                "form-action 'none'",
                "base-uri 'none'",
            ]
        ),
        style=Markup(_style(here, atlas)),
        plotly=Markup(scripts[0]),
        script=Markup(scripts[1]),
        seed_note=SEED_NOTE,
        against_title=AGAINST_TITLE,
        against_note=AGAINST_NOTE,
        search=search,
        figures=Markup(_json_for_script([_figures(atlas, model_map, colours) for model_map in maps])),
    )


def _style(here: Path, atlas: Atlas) -> str:
    names = [STYLE, SEARCH_STYLE] if atlas.search else [STYLE]
    return "".join((here / name).read_text(encoding="utf-8") for name in names)


def _script(here: Path, atlas: Atlas) -> str:
    of_search = (here / SEARCH_SCRIPT).read_text(encoding="utf-8") if atlas.search else ""
    return (here / SCRIPT).read_text(encoding="utf-8").replace(_SEARCH_PLACE, of_search)


def _script_hash(text: str) -> str:
    """What the page's own policy calls this script; no other script may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json_for_script(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _model(model_map: ModelMap) -> dict[str, Any]:
    """What the template shows of one model."""
    return {
        "name": labels.plain(model_map.model),
        "advice": [
            {"headline": item.headline(model_map), "answer": item.answer(model_map), "detail": item.detail(model_map)}
            for item in deployments(model_map)
        ],
        "columns": [
            {
                "title": model_map.title(column),
                "label": model_map.column_labels[column],
                "metric": labels.plain(column.metric),
                "higher_is_better": column.higher_is_better,
                "fp": _square(model_map, column, model_map.reference) if model_map.reference else None,
                "percent": column in model_map.percent,
                "rows": [
                    {
                        "label": variant.label,
                        "squares": [
                            _square(model_map, column, variant.cells[bits]) if bits in variant.cells else None
                            for bits in model_map.weight_bits
                        ],
                    }
                    for variant in model_map.variants
                ],
            }
            for column in model_map.columns
        ],
        "bits": [labels.bits_header(bits) for bits in model_map.weight_bits],
        "has_variants": bool(model_map.variants),
        "against": against_lines(model_map),
        "seeds": seed_rows(model_map),
        "cells": [_cell(model_map, cell) for cell in model_map.cells],
    }


def _cell(model_map: ModelMap, cell: Cell) -> dict[str, Any]:
    return {
        "label": model_map.cell_labels[cell.key],
        "is_fp": cell.is_fp,
        "costs": [
            (labels.bits(cell.decoder_bits_per_weight), cell.decoder_bits_per_weight),
            (labels.megabytes(cell.checkpoint_bytes), cell.checkpoint_bytes),
            (labels.duration(cell.quantize_seconds), cell.quantize_seconds),
        ],
        "squares": [_square(model_map, column, cell) for column in model_map.columns],
    }


def _square(model_map: ModelMap, column: Column, cell: Cell) -> dict[str, Any]:
    entry: Entry = model_map.entry(cell, column)
    percent = column in model_map.percent
    stderr = column.higher_is_better and entry.stderr is not None and entry.value is not None
    return {
        "text": entry.text,
        "stderr": labels.quality(entry.value or 0, entry.stderr, percent=percent).split(" ")[-1] if stderr else "",
        "difference": entry.difference,
        "heat": entry.heat,
        "state": entry.state.value,
        "best": entry.best,
        "value": entry.value,
        "tip": "\n".join(describe(model_map, column, cell, entry)),
    }


def _figures(atlas: Atlas, model_map: ModelMap, colours: dict[str, str]) -> dict[str, Any]:
    layers = [layer for layer in atlas.layers if layer.cell[0] == model_map.model]
    return {
        "columns": [
            {
                "curves": [
                    {"name": axis.name, "figure": curves(model_map, column, axis, colours)} for axis in CURVE_AXES
                ],
                "tradeOff": trade_off(model_map, column, colours),
                "unplaced": unplaced(model_map, column),
            }
            for column in model_map.columns
        ],
        "layers": layer_figures(model_map, layers, colours),
    }
