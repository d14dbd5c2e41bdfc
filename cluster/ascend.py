"""Ascend's driver, CANN and torch_npu: what their files say, and which versions go together. Pure.

Not run on hardware: the files' forms are those of published logs, the pairs those of torch_npu's own list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

ALLOC_CONF = "PYTORCH_ALLOC_CONF"
NPU_ALLOC_CONF = "PYTORCH_NPU_ALLOC_CONF"
FALLBACK_DISABLE = "TORCH_NPU_FALLBACK_CPU_DISABLE"
"""Operators that the NPU lacks fail where it is 1, and otherwise run on the CPU. Read once, when torch_npu loads."""
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_NO_BACKEND = "Failed to load the backend extension: torch_npu"

# torch_npu as PyPI numbers it -> the CANN it was released for, from torch 2.7 on. Source: COMPATIBILITY.md of
# github.com/Ascend/pytorch at 9e73e708ab9350d203475609f36f8a43f6a0c2ab. Another pair may work: nobody says so there.
CANN_OF = {
    "2.12.0": "9.1.0",
    "2.11.0": "9.1.0",
    "2.10.0.post4": "9.1.0",
    "2.9.0.post6": "9.1.0",
    "2.9.0.post2": "9.0.0",
    "2.9.0": "8.5.0",
    "2.8.0.post4": "9.0.0",
    "2.8.0.post2": "8.5.0",
    "2.8.0": "8.3.RC1",
    "2.7.1.post8": "9.1.0",
    "2.7.1.post4": "9.0.0",
    "2.7.1.post2": "8.5.0",
    "2.7.1": "8.3.RC1",
}
# Seen in the libraries of the wheels on PyPI: these know FALLBACK_DISABLE, and those before them of the same torch
# (2.12.0.post2, 2.10.0.post6, 2.7.1.post8) do not, so that nothing stops their fallback.
STRICT_FROM = "2.13.0, or 2.12.0.post3, 2.10.0.post7, 2.7.1.post11"


def parse_cann(install_info: str | None, version_cfg: str | None) -> str | None:
    """CANN's version, such as "8.5.0"; None where neither file says it.

    Args:
        install_info: the text of `<arch>-linux/ascend_toolkit_install.info`: a line `version=8.1.RC1`.
        version_cfg: the text of `version.cfg`: a line `runtime_running_version=[7.6.0.1.220:8.0.0]`.
    """
    if install_info and (found := re.search(r"^version\s*=\s*(\S+)", install_info, re.MULTILINE)):
        return found.group(1)
    if version_cfg and (
        found := re.search(r"^(?:toolkit|runtime)_running_version\s*=\s*\[([^\]]+)\]", version_cfg, re.M)
    ):
        return found.group(1).rpartition(":")[2].removeprefix("CANN-")
    return None


def parse_driver(version_info: str | None, npu_smi: str | None = None) -> str | None:
    """The driver's version, such as "24.1.rc1"; None where neither text says it.

    Args:
        version_info: the text of `driver/version.info`: a line `Version=24.1.rc1`.
        npu_smi: what `npu-smi info` prints: `| npu-smi 24.1.rc2   Version: 24.1.rc2 |`.
    """
    if version_info and (found := re.search(r"^version\s*=\s*(\S+)", version_info, re.MULTILINE | re.IGNORECASE)):
        return found.group(1)
    if npu_smi and (found := re.search(r"\bVersion:\s*(\S+)", npu_smi)):
        return found.group(1)
    return None


def release(version: str) -> str:
    """The first two numbers of a version, by which torch and torch_npu pair: "2.13.0+cpu" -> "2.13"."""
    return ".".join(version.partition("+")[0].split(".")[:2])


def mismatch(torch: str | None, torch_npu: str | None) -> str | None:
    """What is wrong with a pair of torch and torch_npu, which must be of the same release; None where nothing is."""
    if torch is None or torch_npu is None or release(torch) == release(torch_npu):
        return None
    return f"torch_npu {torch_npu} needs torch {release(torch_npu)}, and torch {torch} is installed"


def unknown_pair(torch_npu: str, cann: str) -> str | None:
    """Why a pair of torch_npu and CANN is not known to work; None where it is."""
    known = CANN_OF.get(torch_npu.partition("+")[0])
    if known is None:
        return f"torch_npu {torch_npu} is not in the list of known pairs"
    if known.lower() != cann.lower():
        return f"torch_npu {torch_npu} was released for CANN {known}, and CANN {cann} is installed"
    return None


def two_allocators(variables: Mapping[str, str]) -> str | None:
    """The sentence for an environment with both allocator variables, with which torch_npu aborts; None elsewhere."""
    if variables.get(ALLOC_CONF) and variables.get(NPU_ALLOC_CONF):
        return f"both {NPU_ALLOC_CONF} and {ALLOC_CONF} are set, and torch_npu aborts then: unset one of them"
    return None


def load_remedy(causes: Iterable[str], *, cann: str | None, unsourced: str | None) -> str:
    """What to do where torch or torch_npu does not load.

    Args:
        causes: the messages of the exception and of what caused it.
        cann: the version of CANN that the environment names; None where it names none.
        unsourced: a directory of CANN that is there and that the environment does not name.
    """
    told = " ".join(causes)
    module = re.search(r"No module named '([\w.]+)'", told)
    if module:
        package = {"yaml": "pyyaml"}.get(module.group(1), module.group(1))
        return f"pip install {package}" + (
            ", which torch_npu needs and does not ask for" if "torch_npu" in told else ""
        )
    if "torch_npu" not in told and ".so" not in told:
        return "run `python -c 'import torch'` and mend what it says; reinstalling torch is the usual cure"
    if unsourced is not None:
        return f"source {unsourced}/set_env.sh before this command, and before `ray start` on every node"
    if cann is not None:
        return f"CANN {cann} does not fit this torch_npu: install a pair of versions that belong together"
    return (
        f"on a machine without NPUs `pip uninstall torch-npu` ({AUTOLOAD}=0 brings torch back, but not transformers, "
        "which loads torch_npu wherever it is installed); on one with NPUs install CANN and source its set_env.sh "
        "before this command and before `ray start`"
    )


def backend_trouble(error: BaseException) -> str | None:
    """One sentence for an `import torch` that failed because torch_npu did not load; None for any other error."""
    # torch's own may be told within another's, such as that of a package that imports torch when it is first used.
    here: BaseException | None = error
    while here is not None and not (isinstance(here, RuntimeError) and str(here).startswith(_NO_BACKEND)):
        here = here.__cause__ or here.__context__
    if here is None:
        return None
    cause = here.__cause__ or here.__context__
    why = f" ({cause})" if cause else ""
    remedy = load_remedy([str(here), str(cause)], cann=None, unsourced=None)
    return f"torch does not load, because torch_npu does not{why}: {remedy}; `bitatlas doctor` tells more"
