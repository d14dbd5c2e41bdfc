"""Artifacts on disk: the packed weights of a cell, one safetensors file per decoder block, and a manifest.

An artifact is written beside its place and renamed when it is whole, so a directory that has its name is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import BitatlasError, DamagedFileError

if TYPE_CHECKING:
    from torch import Tensor

    from quantizers.apply import StoredBlock, StoredLinear
    from quantizers.stream import QuantizedBlock, QuantizedLinear

MANIFEST = "artifact.json"
_FORMAT = "bitatlas-artifact/2"
_SCALES = ("input_scale_I", "output_scale_O")  # of a StoredLinear: tensors under their own names


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A finished artifact.

    Args:
        manifest: the parsed `artifact.json`: `linears` (name -> shape, encoding, file, quantized activations, scales
            of a rescaled block, errors),
            `vocabulary` (likewise, of embedding and head where they are quantized; absent of older artifacts),
            `dense` (changed parameter -> file), `files` (name -> sha256), and whatever facts the writer was given.
    """

    directory: Path
    manifest: dict[str, Any]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all packed tensors of the decoder's linears."""
        return sum(linear["stored_bytes"] for linear in self.manifest["linears"].values())

    @property
    def num_weights(self) -> int:
        """Weights of the decoder's linears."""
        return sum(linear["out_features"] * linear["in_features"] for linear in self.manifest["linears"].values())

    @property
    def published_bits_per_weight(self) -> float | None:
        """Mean over all weights by the method's own published convention; None where it has none."""
        linears = self.manifest["linears"].values()
        if any(linear["published_bits_per_weight"] is None for linear in linears):
            return None
        bits = sum(
            linear["published_bits_per_weight"] * linear["out_features"] * linear["in_features"] for linear in linears
        )
        return float(bits / self.num_weights)

    def blocks(self) -> Iterator[StoredBlock]:
        """The decoder blocks, one in memory at a time.

        Raises:
            DamagedFileError: a file is not what was written.
        """
        from safetensors.torch import load_file

        from quantizers.apply import StoredBlock

        for file, digest in self.manifest["files"].items():
            path = self.directory / file
            if not path.exists() or sha256_of(path) != digest:
                raise DamagedFileError(
                    f"artifact {path} is missing or was changed after it was written; delete {self.directory} "
                    "and run the same command again"
                )
            tensors = load_file(path)
            linears, vocabulary = (
                [
                    read_linear(name, facts, tensors)
                    for name, facts in self.manifest.get(section, {}).items()
                    if facts["file"] == file
                ]
                for section in ("linears", "vocabulary")
            )
            yield StoredBlock(
                linears=linears,
                dense={name: tensors[name] for name, place in self.manifest["dense"].items() if place == file},
                vocabulary=vocabulary,
            )


def read_linear(name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredLinear:
    """A linear of an artifact, by its facts in the manifest and the tensors of its file."""
    from quantizers.activations import ActivationQuantizer
    from quantizers.apply import StoredLinear
    from quantizers.encodings import ENCODINGS

    packed = {part: tensors[f"{name}.{part}"] for part in facts["parts"]}
    shape = facts["out_features"], facts["in_features"]
    inputs, outputs = (
        None if facts[place] is None else ActivationQuantizer.from_spec(facts[place]) for place in ("inputs", "outputs")
    )
    weight = ENCODINGS[facts["encoding"]].unpack(packed, facts["spec"], shape)
    scales = {scale: tensors[f"{name}.{scale}"] for scale in facts.get("rescaled", ())}  # absent of older artifacts
    return StoredLinear(name=name, weight=weight, inputs=inputs, outputs=outputs, **scales)


class ArtifactWriter:
    """Writes blocks as they come; nothing appears under the artifact's name until `finish`."""

    def __init__(self, directory: Path) -> None:
        """Make a scratch directory beside `directory`."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        self._files: dict[str, str] = {}
        self._linears: dict[str, Any] = {}
        self._vocabulary: dict[str, Any] = {}
        self._dense: dict[str, str] = {}

    def add_block(self, block: QuantizedBlock) -> None:
        """Write one decoder block."""
        file = f"block-{len(self._files) - len(self._vocabulary):04d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for linear in block.linears:
            own, self._linears[linear.name] = _stored(linear, file)
            tensors |= own
        for name, value in block.dense.items():
            tensors[name] = value.cpu().contiguous()
            self._dense[name] = file
        self._write(file, tensors)

    def add_matrix(self, matrix: QuantizedLinear) -> None:
        """Write the embedding or the head."""
        file = f"vocabulary-{len(self._vocabulary)}.safetensors"
        tensors, self._vocabulary[matrix.name] = _stored(matrix, file)
        self._write(file, tensors)

    def _write(self, file: str, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        content = save(tensors)
        (self._scratch / file).write_bytes(content)  # not `save_file`: its error for a full disk is no OSError
        self._files[file] = hashlib.sha256(content).hexdigest()

    def finish(self, **facts: Any) -> Artifact:
        """Write the manifest and give the artifact its name.

        Args:
            facts: JSON values to keep in the manifest: cell, model, method, seconds.
        """
        sections = {"files": self._files, "dense": self._dense, "linears": self._linears}
        if self._vocabulary:
            sections["vocabulary"] = self._vocabulary
        manifest = {"format": _FORMAT, **facts, **sections}
        with (self._scratch / MANIFEST).open("w", encoding="utf-8") as stream:
            json.dump(manifest, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        self._scratch.chmod(0o755)
        try:
            self._scratch.rename(self._directory)
        except OSError:
            existing = find_artifact(self._directory)  # another worker was first: the same key, the same content
            if existing is None:
                raise
            self.discard()
            return existing
        return Artifact(directory=self._directory, manifest=manifest)

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self._scratch, ignore_errors=True)


def _stored(linear: QuantizedLinear, file: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors under their full names, and its facts in the manifest."""
    packed = linear.weight.pack()
    scales = {scale: getattr(linear, scale) for scale in _SCALES if getattr(linear, scale) is not None}
    # safetensors refuses tensors that share memory, as the column groups of one stage do: hence the clone
    tensors = {f"{linear.name}.{part}": tensor.contiguous().clone() for part, tensor in packed.items()}
    tensors |= {f"{linear.name}.{scale}": value.cpu().contiguous() for scale, value in scales.items()}
    out_features, in_features = linear.weight.shape
    return tensors, {
        "out_features": out_features,
        "in_features": in_features,
        "encoding": linear.weight.encoding,
        "spec": linear.weight.spec(),
        "inputs": linear.inputs.spec() if linear.inputs else None,
        "outputs": linear.outputs.spec() if linear.outputs else None,
        "file": file,
        "parts": list(packed),
        "rescaled": list(scales),
        "stored_bytes": linear.stored_bytes,
        "published_bits_per_weight": linear.weight.published_bits_per_weight,
        "weight_error": linear.weight_error,
        "output_error": linear.output_error,
        "damping": linear.damping,
        "seconds": linear.seconds,
    }


def find_artifact(directory: Path) -> Artifact | None:
    """The finished artifact of this name, or None.

    Raises:
        DamagedFileError: the manifest is not readable.
        BitatlasError: another version of Bitatlas wrote it.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        return None
    except ValueError as error:  # also bad JSON and bad UTF-8
        raise DamagedFileError(
            f"{directory / MANIFEST} is not readable ({error}); delete {directory} and run again"
        ) from error
    if manifest.get("format") != _FORMAT:
        raise BitatlasError(
            f"{directory} has the format {manifest.get('format')!r}, this version reads {_FORMAT!r}; delete it and run "
            "again"
        )
    return Artifact(directory=directory, manifest=manifest)


def set_aside(directory: Path) -> None:
    """Move a damaged artifact out of the way, for a person to look at; does nothing where another worker was first."""
    aside = directory.parent.parent / "set_aside" / directory.parent.name
    aside.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        directory.rename(Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=aside)) / directory.name)


def remove_unfinished(artifacts: Path) -> None:
    """Remove scratch directories that a killed worker left behind."""
    for scratch in artifacts.glob(".*"):
        shutil.rmtree(scratch, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """A file's digest, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
