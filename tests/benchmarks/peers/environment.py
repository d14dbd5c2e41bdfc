"""The peer's own virtual environment: its pins differ from ours, so it never shares `.venv`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("llmcompressor-constraints.txt")


def ensure(root: Path) -> Path:
    """Return the Python of `root/.venv-bench`, built when it is missing, unfinished or pinned otherwise.

    pip's own configuration says where packages come from. torch is pinned because an unpinned one can pull
    gigabytes of CUDA; a local build such as 2.13.0+cpu satisfies the pin.
    """
    home = root / ".venv-bench"
    python = home / "bin" / "python"
    stamp = home / "installed-constraints.txt"  # written last: what is installed, and that it is complete
    pins = CONSTRAINTS.read_text()
    if not stamp.exists() or stamp.read_text() != pins:
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--constraint", CONSTRAINTS, "llmcompressor", "torch"], check=True)
        stamp.write_text(pins)
    return python
