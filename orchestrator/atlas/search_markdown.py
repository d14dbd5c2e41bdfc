"""A search as GitHub markdown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from orchestrator.atlas import labels
from orchestrator.atlas.markdown_text import escape, table
from orchestrator.atlas.search_texts import (
    HURT_HEADINGS,
    HURT_NOTE,
    HURT_TITLE,
    about,
    cell_labels_of,
    compact_maps,
    found_sentences,
    hurt_texts,
    title,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.atlas.rows import Atlas
    from orchestrator.atlas.search_rows import Search
    from orchestrator.atlas.tables import ModelMap

# In a block of code nothing can be escaped; names of linears consist of these.
_NOT_PLAIN = re.compile(r"[^\w.+*· -]")


def search_lines(atlas: Atlas, maps: Sequence[ModelMap]) -> list[str]:
    """The section of a search; nothing where the sweep is of none."""
    search = atlas.search
    if search is None:
        return []
    lines = [f"## {escape(title(search))}", "", escape(about(search)), ""]
    for study in search.studies:
        text = " ".join(found_sentences(search, study, cell_labels_of(maps)))
        lines += [f"### {escape(study.name)}", "", escape(text), ""]
    return lines + _maps(search) + _hurt(search)


def _maps(search: Search) -> list[str]:
    lines: list[str] = []
    for one in compact_maps(search):
        lines += [f"Bits of each block, {escape(one.title)}:", "", "```"]
        for piece in one.pieces:
            margin = max(len(label) for label, _ in piece)
            for label, squares in piece:
                lines.append(_NOT_PLAIN.sub("?", f"{label:<{margin}}  {squares}").rstrip())
        lines += ["```", ""]
        lines += [escape(one.outside), ""] if one.outside else []
    return lines


def _hurt(search: Search) -> list[str]:
    found = hurt_texts(search)
    if found is None:
        return []
    rows = [[escape(text) for text in row] for row in found.rows]
    header = [labels.plain(heading) for heading in HURT_HEADINGS]
    return [f"### {HURT_TITLE}", "", escape(found.sentence), "", *table(header, rows, left=2), HURT_NOTE, ""]
