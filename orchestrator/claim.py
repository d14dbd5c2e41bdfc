"""Whose an output directory is: this sweep's, another's, nobody's yet, or something that Bitatlas did not make."""

from __future__ import annotations

from pathlib import Path

import yaml

from orchestrator.config import Sweep, resolved
from orchestrator.errors import BitatlasError
from orchestrator.execution import SIMULATED
from orchestrator.layout import Layout
from orchestrator.schema import TABLES
from orchestrator.witness import is_witness

_SCRATCH = ".sweep.yaml.tmp"


def claim_output(layout: Layout, sweep: Sweep) -> None:
    """Raise if the output directory belongs to something else; touches nothing.

    Raises:
        BitatlasError: the output of another sweep or of another execution, or a directory that Bitatlas did not make.
    """
    if layout.sweep.exists():
        try:
            held = yaml.safe_load(layout.sweep.read_text(encoding="utf-8"))
            name, execution = held["name"], held.get("evaluation", {}).get("execution", SIMULATED)
        except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
            raise BitatlasError(f"{layout.sweep} is not readable; choose another --out, or mend that file") from error
        if name != sweep.name:
            raise BitatlasError(f"{layout.root} holds the sweep {name!r}, not {sweep.name!r}; choose another --out")
        if execution != sweep.evaluation.execution:  # the report would show rows of both as one
            raise BitatlasError(
                f"{layout.root} holds {execution} results, and evaluation.execution is now "
                f"{sweep.evaluation.execution}; choose another --out (--cache shares the artifacts)"
            )
    elif layout.root.exists() and not _is_free(layout):
        raise BitatlasError(f"{layout.root} exists and is no sweep's output; choose another --out")


def write_sweep(layout: Layout, sweep: Sweep) -> None:
    """Make the directory this sweep's.

    Raises:
        BitatlasError: it cannot be written.
    """
    scratch = layout.root / _SCRATCH
    try:
        scratch.write_text(resolved(sweep), encoding="utf-8")
        scratch.replace(layout.sweep)
    except OSError as error:
        raise BitatlasError(f"cannot write {layout.sweep} ({error.strerror}); choose another --out") from error


def _is_free(layout: Layout) -> bool:
    """Whether nothing is there but what a driver that was killed in its first moment leaves."""
    if not layout.root.is_dir():
        return False
    return all(_is_left_behind(path, layout) for path in layout.root.iterdir())


def _is_left_behind(path: Path, layout: Layout) -> bool:
    if path.is_dir():
        return path.name in TABLES and not any(path.iterdir())
    return path == layout.lock or path.name == _SCRATCH or is_witness(path)
