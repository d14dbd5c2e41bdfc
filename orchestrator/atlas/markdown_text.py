"""Text and tables that GitHub markdown shows as they are. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.atlas import labels

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_SPECIAL = str.maketrans({char: f"\\{char}" for char in "\\`*[]|#~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})


def escape(text: str) -> str:
    """Text that markdown and HTML leave as it is, on one line."""
    return labels.plain(text).translate(_SPECIAL)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """A markdown table of escaped cells; the first `left` columns are words, the others numbers."""
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    return [f"| {' | '.join(row)} |" for row in [header, rule, *rows]] + [""]
