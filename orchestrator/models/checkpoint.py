"""What is on disk: is it a usable checkpoint, and which one is it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from orchestrator.errors import BitatlasError

_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Files besides the weights that change what a model computes.
_IDENTITY_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order."""
    index = directory / _INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any("/" in name or not name.endswith(".safetensors") for name in names):
            raise ValueError(f"{_INDEX} names a file that is no safetensors file of this directory")
        return [directory / name for name in names]
    return sorted(directory.glob("*.safetensors"))


def check_checkpoint(directory: Path, where: str) -> None:
    """Raise unless a directory holds a configuration and whole safetensors files.

    Raises:
        BitatlasError: says what is missing, broken or not accepted.
    """
    from safetensors import SafetensorError, safe_open

    subject = f"{where} = '{directory}'"
    config = read_config(directory, where)
    if "model_type" not in config:
        raise BitatlasError(f"{subject}: config.json has no model_type")
    if "quantization_config" in config:
        raise BitatlasError(
            f"{subject} is quantized already (config.json has a quantization_config); give the original"
        )
    try:
        files = weight_files(directory)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BitatlasError(f"{subject}: {_INDEX} is no index of weights; copy the checkpoint again") from error
    if not files:
        pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
        if pickles:
            raise BitatlasError(
                f"{subject} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when opened; "
                "convert them to safetensors"
            )
        raise BitatlasError(f"{subject} holds no weights: no *.safetensors file")
    for file in files:
        if not file.exists():
            raise BitatlasError(f"{subject}: {_INDEX} names {file.name}, which is missing; copy the checkpoint again")
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise BitatlasError(
                f"{subject}: {file.name} is truncated or corrupt ({error}); copy the checkpoint again"
            ) from error


def read_config(directory: Path, where: str) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        BitatlasError: absent or not a JSON object.
    """
    path = directory / "config.json"
    if not path.exists():
        raise BitatlasError(f"{where} = '{directory}' holds no config.json: it is no checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BitatlasError(f"{where} = '{directory}': config.json is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise BitatlasError(f"{where} = '{directory}': config.json is not a JSON object")
    return config


def checkpoint_digest(directory: Path, cache: Path) -> str:
    """A content hash of the weights, the configuration and the tokenizer.

    File digests are remembered in `cache` by path, size and modification time, so a large checkpoint is read once.
    """
    files = weight_files(directory) + [path for name in _IDENTITY_FILES if (path := directory / name).exists()]
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(f"{file.name}\0{file_digest(file, cache)}\n".encode())
    return whole.hexdigest()


def file_digest(file: Path, cache: Path) -> str:
    """sha256 of a file, remembered in `cache` by path, size and modification time."""
    status = file.resolve().stat()
    key = hashlib.sha256(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()
    remembered = cache / "digests" / key
    try:
        return remembered.read_text(encoding="ascii")
    except FileNotFoundError:
        pass
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    remembered.parent.mkdir(parents=True, exist_ok=True)
    scratch = remembered.with_suffix(f".{digest[:8]}.tmp")
    scratch.write_text(digest, encoding="ascii")
    scratch.replace(remembered)
    return digest
