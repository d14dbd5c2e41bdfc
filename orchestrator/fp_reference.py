"""What the unquantized model finds most likely on some windows, on disk, by content: recorded by the first worker that
needs it, read by all others, of this sweep and of later ones.

One safetensors file per window, in the node's cache. A file lock makes the others wait; it is released by the operating
system when its holder dies, and what was not finished is not there.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from orchestrator.errors import BitatlasError, reason

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evaluators.divergence import TopTokens

    Read = Callable[[int], TopTokens]
    Write = Callable[[int, TopTokens], None]

_TENSORS = ("ids_NK", "log_probabilities_NK", "rest_N", "best_N")


def reference_key(model: Mapping[str, str], windows: NDArray[np.int64], *, top_k: int, device: str) -> str:
    """Content hash of all that a reference depends on.

    Args:
        model: its `digest` and `dtype`.
        windows: the tokens that are scored.
        top_k: how many tokens are kept per position.
        device: the kind of device; another one rounds otherwise.
    """
    from evaluators.divergence import VERSION

    facts = f"{VERSION} {model['digest']} {model['dtype']} {top_k} {device} {windows.shape} "
    return hashlib.sha256(facts.encode() + windows.tobytes()).hexdigest()[:32]


def fp_reference(
    directory: Path, num_windows: int, record: Callable[[Write], None], report: Callable[[str], None]
) -> Read:
    """What was recorded in `directory`; records it first where it is not there.

    A reference of which a file is missing or damaged is set aside beside it and recorded again.

    Args:
        directory: named by `reference_key`.
        num_windows: how many windows it is of.
        record: runs the unquantized model and writes what is to be kept, window by window.
        report: takes one line on what is being done.

    Returns:
        Reads what was recorded of a window.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    report("waiting for what the unquantized model finds likely")
    with FileLock(f"{directory}.lock"):
        if directory.exists() and not _intact(directory, num_windows):
            aside = Path(tempfile.mkdtemp(prefix=f"{directory.name}.damaged-", dir=directory.parent))
            directory.rename(aside)  # over an empty directory
            report(f"{directory} is damaged, so it was set aside as {aside.name} and is recorded again")
        if not directory.exists():
            _record(directory, record)
    return lambda window: _unpack(directory / _window_file(window))


def _record(directory: Path, record: Callable[[Write], None]) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        record(lambda window, kept: _pack(scratch / _window_file(window), kept))
        scratch.chmod(0o755)
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _intact(directory: Path, num_windows: int) -> bool:
    try:
        for window in range(num_windows):
            _unpack(directory / _window_file(window))
    except BitatlasError:
        return False
    return True


def _window_file(window: int) -> str:
    return f"window-{window:05d}.safetensors"


def _pack(file: Path, kept: TopTokens) -> None:
    from safetensors.torch import save_file

    tensors = {name: part.contiguous() for name, part in zip(_TENSORS, kept.parts, strict=True)}
    save_file(tensors, file, metadata={"sha256": _digest(kept)})


def _unpack(file: Path) -> TopTokens:
    from safetensors import SafetensorError, safe_open

    from evaluators.divergence import TopTokens

    try:
        with safe_open(file, framework="pt") as opened:
            kept = TopTokens(**{name: opened.get_tensor(name) for name in _TENSORS})
            told = (opened.metadata() or {}).get("sha256")
        if told != _digest(kept):
            raise ValueError("its contents are not what was written")
    except (SafetensorError, OSError, ValueError) as error:
        raise BitatlasError(
            f"{file}, what the unquantized model finds likely, cannot be read ({reason(error)}); run the same command "
            "again, and it is recorded anew"
        ) from error
    return kept


def _digest(kept: TopTokens) -> str:
    digest = hashlib.sha256()
    for part in kept.parts:
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()
