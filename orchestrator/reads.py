"""What a file makes a sweep read besides the sweep's own sections: the texts and the task that steer a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.config import read_sweep, read_yaml

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.config import Sweep


@dataclass(frozen=True, kw_only=True)
class Text:
    """A corpus, read as calibration reads one.

    Args:
        where: its field: `search.corpus[0]`.
        corpus: as the file names it.
    """

    where: str
    corpus: str | dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task, with its field."""

    where: str
    name: str
    num_fewshot: int | None


@dataclass(frozen=True, kw_only=True)
class Reads:
    """All of them."""

    texts: tuple[Text, ...] = ()
    tasks: tuple[Task, ...] = ()


NOTHING_ELSE = Reads()


def is_search(path: Path) -> bool:
    """Whether a file is a search file, told by its section; raises as `read_either` where it is no YAML."""
    document: Any = read_yaml(path, "a sweep file")
    return isinstance(document, dict) and "search" in document


def read_either(path: Path) -> tuple[Sweep, Reads]:
    """Read and check a sweep file or a search file.

    Raises:
        BitatlasError: absent, not YAML, or neither: one sentence with the file and the field.
    """
    if not is_search(path):
        return read_sweep(path), NOTHING_ELSE
    from orchestrator.search.config import read_search

    search = read_search(path)
    return search.sweep, search.reads
