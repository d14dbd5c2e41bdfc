"""The variables by which `huggingface_hub`, `datasets` and `transformers` find a bundle, here and in workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

# They read their variables once, when they are imported.
_READERS = ("huggingface_hub", "datasets", "transformers")


def caches_in(directory: Path) -> dict[str, str]:
    """Variables that make a directory the place of both caches. Where tokens are looked up stays as it is."""
    return {"HF_HUB_CACHE": str(directory / "hub"), "HF_DATASETS_CACHE": str(directory / "datasets")}


def offline_in(directory: Path) -> dict[str, str]:
    """Variables that make a directory all there is: nothing is asked of the network."""
    return caches_in(directory) | {"HF_HOME": str(directory), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def enter(variables: Mapping[str, str]) -> None:
    """Set variables in this process, which must not have imported their readers yet."""
    late = [name for name in _READERS if name in sys.modules]
    if late:
        raise AssertionError(f"{late[0]} was imported before its variables were set")
    os.environ.update(variables)
