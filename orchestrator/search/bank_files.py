"""A bank as it lies on disk: artifacts of uniform cells, of which one linear at a time is read and unpacked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.artifacts import find_artifact, read_linear, set_aside, sha256_of
from orchestrator.errors import DamagedFileError

if TYPE_CHECKING:
    from orchestrator.search.mixtures import Key
    from quantizers.bank import Decodable, Variant


def variants_of(artifacts: Mapping[Key, str]) -> dict[str, dict[Key, Variant]]:
    """The variants of all linears; every file's digest is looked at once, here.

    Args:
        artifacts: (weight_bits, group_size) -> the artifact's directory.
    Raises:
        DamagedFileError: an artifact is gone or not what was written; it is set aside then.
    """
    found: dict[str, dict[Key, Variant]] = {}
    for key, place in artifacts.items():
        directory = Path(place)
        try:
            manifest = _checked(directory)
        except DamagedFileError:
            set_aside(directory)
            raise
        for name, facts in manifest["linears"].items():
            found.setdefault(name, {})[key] = partial(_read, directory / facts["file"], name, facts)
    return found


def _checked(directory: Path) -> Mapping[str, Any]:
    artifact = find_artifact(directory)
    if artifact is None:
        raise DamagedFileError(f"artifact {directory} is gone; run the same command again")
    for file, digest in artifact.manifest["files"].items():
        path = directory / file
        if not path.exists() or sha256_of(path) != digest:
            raise DamagedFileError(
                f"artifact {path} is missing or was changed after it was written; run the same command again"
            )
    return artifact.manifest


def _read(file: Path, name: str, facts: Mapping[str, Any]) -> Decodable:
    """The linear as it acts among others, which were rescaled otherwise or not at all."""
    from safetensors import safe_open

    from quantizers.rescaling import RestoredWeight

    with safe_open(file, framework="pt") as tensors:  # memory-mapped: workers of a node share its pages
        parts = [f"{name}.{part}" for part in (*facts["parts"], *facts.get("rescaled", ()))]
        linear = read_linear(name, facts, {part: tensors.get_tensor(part) for part in parts})
    return RestoredWeight(
        weight=linear.weight, input_scale_I=linear.input_scale_I, output_scale_O=linear.output_scale_O
    )
