"""A task cut into slices, which different workers may score. Pure.

Documents are scored in units, and nothing of one unit is packed together with another: in bfloat16 the pack moves the
last bits of a score. A slice is a run of whole units, so what a document scores does not depend on the slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluators.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Consecutive documents of one task that are scored together. Change `SCORER_VERSION` in `harness` with it.
UNIT_DOCUMENTS = 64


@dataclass(frozen=True)
class Slice:
    """One of `count` slices of a task.

    Attributes:
        index: which, from 0.
        count: of how many.
    """

    index: int
    count: int

    def __post_init__(self) -> None:  # noqa: D105
        if not 0 <= self.index < self.count:
            raise EvaluationError(f"slice {self.index} of {self.count} does not exist: count from 0")

    def __str__(self) -> str:
        """As people count: `2/3`."""
        return f"{self.index + 1}/{self.count}"


def unit_of(doc_id: int) -> int:
    """The unit that a document of a task belongs to."""
    return doc_id // UNIT_DOCUMENTS


def num_units(sizes: Iterable[int]) -> int:
    """Units of tasks with so many documents; a task begins a unit of its own."""
    return sum(_units(size) for size in sizes)


def _units(size: int) -> int:
    return -(-size // UNIT_DOCUMENTS)


def documents_of(part: Slice, sizes: Mapping[str, int]) -> dict[str, range]:
    """The documents of a slice, task by task; a task that has none in it is left out.

    Args:
        part: the slice. Slices differ by at most one unit.
        sizes: documents of each task of a group, in its order; of a single task, its own.

    Raises:
        EvaluationError: there are fewer units than slices.
    """
    total = num_units(sizes.values())
    if part.count > total:
        raise EvaluationError(
            f"{part.count} slices of {', '.join(sizes)} are too many: there are {total} units of {UNIT_DOCUMENTS} "
            f"documents; ask for {total} at most"
        )
    first, last = (total * index // part.count for index in (part.index, part.index + 1))
    found, before = {}, 0
    for task, size in sizes.items():
        low, high = (min(max(unit - before, 0), _units(size)) for unit in (first, last))
        if low < high:
            found[task] = range(low * UNIT_DOCUMENTS, min(high * UNIT_DOCUMENTS, size))
        before += _units(size)
    return found
