"""A search in the terminal: what it found, and the bits of each block as a map of digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

from orchestrator.atlas import labels
from orchestrator.atlas.search_texts import (
    about,
    cell_labels_of,
    compact_maps,
    found_sentences,
    hurt_texts,
    title,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from orchestrator.atlas.search_rows import Search
    from orchestrator.atlas.tables import ModelMap

# Few bits light, many dark, as on the page; digits stay readable where there is no colour.
_COLOURS = {
    "1": "black on rgb(246,220,140)",
    "2": "black on rgb(246,220,140)",
    "3": "black on rgb(170,207,155)",
    "4": "black on rgb(110,175,168)",
    "5": "white on rgb(55,130,165)",
    "6": "white on rgb(45,110,150)",
    "7": "white on rgb(38,95,140)",
    "8": "white on rgb(29,79,128)",
}


def print_search(search: Search, maps: Sequence[ModelMap], console: Console) -> None:
    """Print the section of a search."""
    console.print()
    console.rule(Text(title(search), style="bold"), align="left")
    console.print(Text(about(search)))
    for study in search.studies:
        text = Text(f"{labels.plain(study.name)}: ", style="bold")
        text.append(" ".join(found_sentences(search, study, cell_labels_of(maps))), style="not bold")
        console.print(text)
    for one in compact_maps(search, console.width):
        console.print()
        console.print(Text(f"Bits of each block, {one.title}", style="bold"))
        for piece in one.pieces:
            margin = max(cell_len(label) for label, _ in piece)
            for label, squares in piece:
                line = Text(f"{label}{' ' * (margin - cell_len(label))}  ")
                line.append_text(_coloured(squares) if label else Text(squares, style="dim"))
                line.truncate(console.width)
                console.print(line)
        if one.outside:
            console.print(Text(one.outside))
    hurt = hurt_texts(search)
    if hurt is not None:
        console.print()
        console.print(Text(hurt.sentence))


def _coloured(squares: str) -> Text:
    text = Text()
    if "." in squares or " " in squares:  # means of experts, or two digits: a colour per character would mislead
        return Text(squares)
    for char in squares:
        text.append(char, style=_COLOURS.get(char, ""))
    return text
