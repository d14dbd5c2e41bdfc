"""What the page's template shows of a search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.atlas import labels
from orchestrator.atlas.search_figures import search_figures
from orchestrator.atlas.search_hurt import grid_of
from orchestrator.atlas.search_texts import (
    HURT_HEADINGS,
    HURT_NOTE,
    HURT_TITLE,
    about,
    found_sentences,
    hurt_texts,
    objective,
    title,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.atlas.search_rows import Search


def search_section(search: Search, cell_labels: Mapping[str, str]) -> dict[str, Any]:
    """The section of a search; `figures` are plotly's, and the page's to put into a script.

    Args:
        cell_labels: cell id -> label, of cells in the sweep.
    """
    figures = search_figures(search)
    return {
        "title": title(search),
        "about": about(search),
        "studies": [
            {"name": labels.plain(study.name), "text": " ".join(found_sentences(search, study, cell_labels))}
            for study in search.studies
        ],
        "allocations": figures["allocations"],
        "sensitivities": [one["name"] for one in figures["sensitivities"]],
        "has_front": bool(figures["front"]["data"]),
        "has_history": any(one["figure"]["data"] for one in figures["history"]),
        "history": [one["name"] for one in figures["history"] if one["figure"]["data"]],
        "num_blocks": len(grid_of(search).blocks),
        "objective": objective(search),
        "hurt": hurt_texts(search),
        "hurt_title": HURT_TITLE,
        "hurt_headings": HURT_HEADINGS,
        "hurt_note": HURT_NOTE,
        "figures": figures,
    }
