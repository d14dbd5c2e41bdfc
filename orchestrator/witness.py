"""The file in a sweep's output directory by which each worker tells whether its node sees that directory."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.witness import Witness
from orchestrator.errors import BitatlasError

_PREFIX = ".witness-"


@contextmanager
def left_witness(root: Path) -> Iterator[Witness]:
    """Leave one for as long as workers may join. In the end it is gone, and so is the directory if it was made for it
    and nothing else came into it.

    Args:
        root: the output directory, made where it is not there.
    Raises:
        BitatlasError: it cannot be written.
    """
    token = secrets.token_hex(16)
    # A name of its own: what a node's file system remembers of an earlier session's says nothing.
    path = root.resolve() / f"{_PREFIX}{token[:8]}"
    made = [directory for directory in (root, *root.parents) if not directory.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        path.write_text(token, encoding="ascii")
    except OSError as error:
        raise BitatlasError(f"cannot write into {root} ({error.strerror or error}); choose another --out") from error
    try:
        yield Witness(path=str(path), token=token)
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            for directory in made:
                directory.rmdir()


def is_witness(path: Path) -> bool:
    """Whether a file is one, such as a killed driver leaves behind."""
    return path.name.startswith(_PREFIX)


def remove_other_witnesses(witness: Witness) -> None:
    """Remove what killed drivers left; only for who holds the directory's lock."""
    own = Path(witness.path)
    for path in own.parent.glob(f"{_PREFIX}*"):
        if path != own:
            path.unlink(missing_ok=True)
