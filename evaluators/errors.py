"""The exceptions of this package, and the wording of "unknown name"."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class EvaluationError(ValueError):
    """Something the caller asked for cannot be measured; the message is one sentence that says how to mend it."""


class DataError(EvaluationError):
    """Data that should be there is not: another machine may have it."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> EvaluationError:
    """Word the refusal of a name that no registry holds, suggesting the nearest one.

    Args:
        kind: what the name should have been, such as "task" or "corpus".
        name: what was given.
        known: every name that would have been accepted.
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(names)}"
    return EvaluationError(f"unknown {kind} {name!r}: {hint}")
