"""Versions of the software under a device, from files and metadata: nothing is loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import mmap
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from cluster.ascend import FALLBACK_DISABLE, parse_cann, parse_driver

HOMES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
"""Variables that CANN's set_env.sh sets to where it is."""
_ASCEND = Path("/usr/local/Ascend")  # where its installers put everything unless told otherwise
_PLACES = ("cann", "ascend-toolkit/latest")  # of CANN in there; the first from 8.5 on
_SMI_SECONDS = 20.0


def versions_under(resource: str) -> dict[str, str]:
    """Name -> version of what computes on a kind of device, as rows tell it; what is not there is left out.

    Args:
        resource: Ray's name of the devices.
    """
    found = {"torch": installed("torch")}
    if resource == "NPU":
        found |= {"torch_npu": installed("torch-npu"), "cann": cann_version(), "driver": driver_version()}
    return {name: version for name, version in found.items() if version is not None}


def installed(package: str) -> str | None:
    """The version of an installed package, which is not imported; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version(root: Path = _ASCEND) -> str | None:
    """Of Ascend's driver: from its file, else from npu-smi where there is one."""
    version_info = _text(root / "driver" / "version.info")
    printed = None
    if version_info is None and (tool := shutil.which("npu-smi")):
        with suppress(OSError, subprocess.TimeoutExpired):
            printed = subprocess.run(
                [tool, "info"], capture_output=True, text=True, timeout=_SMI_SECONDS, check=False
            ).stdout
    return parse_driver(version_info, printed)


def cann_version(environment: Mapping[str, str] = os.environ) -> str | None:
    """Of the CANN that the environment names; None where it names none, or one without a version."""
    return next(filter(None, (_version_in(Path(environment[home])) for home in HOMES if environment.get(home))), None)


def unsourced_cann(environment: Mapping[str, str] = os.environ, root: Path = _ASCEND) -> str | None:
    """A CANN in its usual place that the environment does not name; None where there is none, or it names one."""
    if any(environment.get(home) for home in HOMES):
        return None
    return next((str(root / place) for place in _PLACES if _version_in(root / place)), None)


def _version_in(home: Path) -> str | None:
    infos = sorted(home.glob("*-linux/ascend_toolkit_install.info"))
    own = [info for info in infos if info.parent.name.startswith(platform.machine())]
    return parse_cann(_text((own or infos)[0]) if infos else None, _text(home / "version.cfg"))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def knows_strict() -> bool:
    """Whether the installed torch_npu can be told not to fall back to the CPU: older ones do not know the variable, and
    fall back whatever it says. Its library names it or does not; nothing is loaded."""
    try:
        spec = importlib.util.find_spec("torch_npu")
    except (ImportError, ValueError):
        return False
    if spec is None or not spec.submodule_search_locations:
        return False
    return names_variable(Path(next(iter(spec.submodule_search_locations))) / "lib" / "libtorch_npu.so")


def names_variable(library: Path) -> bool:
    """Whether a library holds the name of `FALLBACK_DISABLE`."""
    try:
        with library.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(FALLBACK_DISABLE.encode()) >= 0
    except (OSError, ValueError):  # absent or empty
        return False
