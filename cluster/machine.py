"""What a machine has: cores, devices, the software under them, and variables that change how they are used."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import torch_probe
from cluster.ascend import ALLOC_CONF, AUTOLOAD, FALLBACK_DISABLE, NPU_ALLOC_CONF
from cluster.devices import CUDA_IDS, NPU_IDS
from cluster.software import HOMES, cann_version, driver_version, installed, knows_strict, unsourced_cann

NOSET = {"npu": f"RAY_EXPERIMENTAL_NOSET_{NPU_IDS}", "cuda": f"RAY_EXPERIMENTAL_NOSET_{CUDA_IDS}"}
"""With these, Ray does not tell a worker which device is its own."""
_VARIABLES = (ALLOC_CONF, AUTOLOAD, FALLBACK_DISABLE, NPU_ALLOC_CONF, *NOSET.values(), NPU_IDS, CUDA_IDS, *HOMES)
_PROBE_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator as torch sees it."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine. None, empty and 0 are "not there".

    Args:
        name: of the host.
        python: such as "3.12.3".
        bitatlas: the version of this project; None where it runs from a checkout.
        cores: of the processor.
        torch: its version, as installed.
        torch_npu: likewise.
        torch_error: why `import torch` fails: messages, the outermost first.
        npu_error: why `import torch_npu` fails.
        devices: accelerators that torch sees.
        npu_files: devices of Ascend's driver, seen by anyone.
        gpu_files: of NVIDIA's.
        driver: version of Ascend's driver.
        cann: version of the CANN that the environment names.
        unsourced: a directory of CANN that the environment does not name.
        is_strict_known: this torch_npu can be told not to fall back to the CPU.
        variables: those set here that matter.
    """

    name: str
    python: str
    cores: int
    bitatlas: str | None = None
    torch: str | None = None
    torch_npu: str | None = None
    torch_error: tuple[str, ...] = ()
    npu_error: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    npu_files: int = 0
    gpu_files: int = 0
    driver: str | None = None
    cann: str | None = None
    unsourced: str | None = None
    is_strict_known: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What `device: auto` means here: npu, cuda or cpu, as Ray counts them: by the driver's devices."""
        return "npu" if self.npu_files else "cuda" if self.gpu_files else "cpu"


def look_around(environment: Mapping[str, str] = os.environ) -> Machine:
    """Look at this machine, with these variables. Takes seconds: torch is loaded in a process of its own."""
    found = probe_torch(environment)
    return Machine(
        name=platform.node(),
        python=platform.python_version(),
        cores=os.cpu_count() or 1,
        bitatlas=installed("bitatlas"),
        torch=found["torch"] or installed("torch"),
        torch_npu=installed("torch-npu"),
        torch_error=tuple(found["torch_error"]),
        npu_error=tuple(found["npu_error"]),
        devices=tuple(Device(**device) for device in found["devices"]),
        npu_files=len(list(Path("/dev").glob("davinci[0-9]*"))),
        gpu_files=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        driver=driver_version(),
        cann=cann_version(environment),
        unsourced=unsourced_cann(environment),
        is_strict_known=knows_strict(),
        variables={name: environment[name] for name in _VARIABLES if environment.get(name)},
    )


def probe_torch(
    environment: Mapping[str, str] = os.environ, *, seconds: float = _PROBE_SECONDS, python: str = sys.executable
) -> dict[str, Any]:
    """What `torch_probe` says; where it says nothing, `torch_error` says why.

    Args:
        environment: of its process.
        seconds: the longest wait.
        python: the interpreter to ask.
    """
    broken: dict[str, Any] = {"torch": None, "cuda": None, "devices": [], "npu_error": []}
    # -P: the script's own folder is no place to import from.
    command = [python, "-P", str(torch_probe.__file__)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=dict(environment)
        )
    except subprocess.TimeoutExpired:
        return broken | {"torch_error": [f"`import torch` has not ended after {seconds:g} s"]}
    for line in done.stdout.splitlines():
        if line.startswith(torch_probe.MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(torch_probe.MARK))
            return found
    last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
    return broken | {"torch_error": [f"`import torch` ended its process (status {done.returncode}): {last}"]}
