"""Format `dense`: the evaluated weights themselves, in the model's own dtype, as an ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.artifacts import Artifact, find_artifact
from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout

_COPIED = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.jinja", "LICENSE*")
_OPENPANGU_NOTICE = """This checkpoint is derived from openPangu-Embedded: its weights were quantized and decoded by
Bitatlas. The openPangu Model License Agreement, which came with the original and is to stand beside this file as
LICENSE, holds for it too: among other things it asks products and services to say "Powered by openPangu", and excludes
use within the European Union. config.json describes the same model as a Llama with attention biases, so that no remote
code is needed; tokenizer.model is the original's.
"""


def export_dense(layout: Layout, cell: str, to: Path) -> int:
    """Write a cell as safetensors that any transformers version loads; returns the bytes of the weights.

    Raises:
        BitatlasError: no such cell, its artifact or model is gone, or `to` exists.
    """
    from orchestrator.models.checkpoint import read_config
    from orchestrator.models.loading import load_model, verified_directory
    from orchestrator.models.openpangu import is_openpangu
    from quantizers.apply import installed

    if to.exists():
        raise BitatlasError(f"--to {to} exists; give a directory that does not")
    artifact = find_cell(layout, cell)
    made_from = artifact.manifest["model"]
    directory = verified_directory(made_from, f"the model of {cell}")
    model = load_model(directory, made_from["dtype"])
    to.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        with installed(model, artifact.blocks()):
            model.save_pretrained(scratch)
        is_mapped = is_openpangu(read_config(directory, "model"))
        for pattern in _COPIED:
            for file in directory.glob(pattern):
                # The published configuration would need remote code; the one it was mapped to does not.
                if not (is_mapped and file.name == "config.json"):
                    shutil.copy(file, scratch / file.name)
        if is_mapped:
            (scratch / "NOTICE").write_text(_OPENPANGU_NOTICE, encoding="utf-8")
        (scratch / "bitatlas.json").write_text(json.dumps(_provenance(artifact, cell), indent=1), encoding="utf-8")
        scratch.chmod(0o755)
        scratch.rename(to)
    except OSError as error:
        raise BitatlasError(f"cannot write {to} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sum(file.stat().st_size for file in to.glob("*.safetensors"))


def find_cell(layout: Layout, cell: str) -> Artifact:
    """The artifact of a cell by its id.

    Raises:
        BitatlasError: there is none; names those that there are.
    """
    found = {}
    for directory in sorted(layout.artifacts.glob("[!.]*")) if layout.artifacts.exists() else []:
        artifact = find_artifact(directory)
        if artifact:
            found[artifact.manifest["cell"]] = artifact
    if cell not in found:
        known = ", ".join(found) or "none"
        raise BitatlasError(f"{layout.root} has no quantized cell {cell!r}; its cells: {known}")
    return found[cell]


def _provenance(artifact: Artifact, cell: str) -> dict[str, Any]:
    facts = {key: artifact.manifest[key] for key in ("model", "scheme", "code_version")}
    return {"cell": cell, "note": "quantized and decoded by Bitatlas; the values lie on the scheme's grid", **facts}
