"""Kinds of device: what a worker asks Ray for, and how it makes sure that it got it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.ascend import FALLBACK_DISABLE, STRICT_FROM, two_allocators
from cluster.errors import ClusterError
from cluster.software import knows_strict, versions_under

NPU_IDS = "ASCEND_RT_VISIBLE_DEVICES"
CUDA_IDS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """One kind of worker.

    Args:
        name: as in the sweep file.
        resource: the Ray resource that counts these devices.
        simulated: goes through the NPU placement but computes on the CPU, for development.
    """

    name: str
    resource: str
    simulated: bool = False


KINDS = {
    "npu": DeviceKind(name="npu", resource="NPU"),
    "cuda": DeviceKind(name="cuda", resource="GPU"),
    "cpu": DeviceKind(name="cpu", resource="CPU"),
    "simulated-npu": DeviceKind(name="simulated-npu", resource="NPU", simulated=True),
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A device that a worker made sure of.

    Args:
        torch_device: what to hand to torch: "cpu", "cuda:0", "npu:0".
        name: for tables: "Ascend910B1", "NVIDIA H100", the processor's name.
        ids: the node's ids of the device; empty on CPU.
        software: name -> version of what computes on it: torch; CUDA; torch_npu, cann and driver.
        cpu_fallback: whether operators that an NPU lacks may run on the CPU; None where there is no NPU.
    """

    torch_device: str
    name: str
    ids: tuple[str, ...] = ()
    software: Mapping[str, str] = field(default_factory=dict)
    cpu_fallback: bool | None = None


def claim(kind: DeviceKind) -> Claim:
    """Assert, inside a worker, that the device it was promised is there. Never falls back to another.

    Raises:
        ClusterError: no device, or not exactly one.
    """
    if kind.resource == "NPU":
        ids = _single_id(NPU_IDS, kind)
        return _simulated(ids) if kind.simulated else _claim_npu(ids)
    if kind.resource == "GPU":
        ids = _single_id(CUDA_IDS, kind)
        import torch

        if not torch.cuda.is_available() or torch.cuda.device_count() != len(ids):
            raise ClusterError(f"Ray promised GPU {ids[0]}, but torch sees {torch.cuda.device_count()} CUDA devices")
        software = versions_under(kind.resource) | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
        return Claim(torch_device="cuda:0", name=torch.cuda.get_device_name(0), ids=ids, software=software)
    return Claim(torch_device="cpu", name=_processor(), software=versions_under(kind.resource))


def strict_variables(kind: DeviceKind, *, strict: bool) -> dict[str, str]:
    """What workers' environments need before their processes start, for operators that an NPU lacks: to fail, or to run
    on the CPU; nothing on other devices."""
    return {FALLBACK_DISABLE: "1" if strict else "0"} if kind.resource == "NPU" else {}


def _simulated(ids: tuple[str, ...]) -> Claim:
    name = f"simulated NPU on {_processor()}"
    return Claim(torch_device="cpu", name=name, ids=ids, software=versions_under("CPU"))


def limit_memory(device: Claim, share: float) -> None:
    """Let this process take at most a share of its device's memory, where others share the device; 1 is no limit."""
    if share >= 1 or device.torch_device == "cpu":
        return
    import torch

    # `torch.npu` has it too; not run on hardware.
    torch.get_device_module(device.torch_device).set_per_process_memory_fraction(share)


def _claim_npu(ids: tuple[str, ...]) -> Claim:
    # Not run on hardware.
    is_strict = os.environ.get(FALLBACK_DISABLE) == "1"
    _check_npu_software(is_strict=is_strict)
    try:
        import torch
        import torch_npu  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise ClusterError(
            f"this worker was promised NPU {ids[0]}, but torch_npu does not load ({error}); install torch-npu and CANN "
            "of matching versions and source CANN's set_env.sh before `ray start`"
        ) from error
    npu = torch.get_device_module("npu")
    # CANN drops ids that are no valid index without a word, hence the count.
    if not npu.is_available() or npu.device_count() != len(ids):
        raise ClusterError(f"Ray promised NPU {ids[0]}, but torch_npu sees {npu.device_count()} devices")
    name = str(npu.get_device_name(0))
    if not name.startswith("Ascend"):
        raise ClusterError(
            f"Ray promised NPU {ids[0]}, but torch_npu calls it {name!r}, which is no Ascend device; look at `npu-smi "
            "info` and `bitatlas doctor` there"
        )
    software = versions_under("NPU")
    return Claim(torch_device="npu:0", name=name, ids=ids, software=software, cpu_fallback=not is_strict)


def _check_npu_software(*, is_strict: bool) -> None:
    """Before anything is loaded: torch_npu aborts the process over the first, and is silent over the second."""
    trouble = two_allocators(os.environ)
    if trouble is not None:
        raise ClusterError(trouble)
    if is_strict and not knows_strict():
        raise ClusterError(
            "this torch_npu does not know how to refuse operators that would run on the CPU; install torch-npu "
            f"{STRICT_FROM} or newer, or allow it with workers.strict: false, which every row then tells"
        )


def _single_id(variable: str, kind: DeviceKind) -> tuple[str, ...]:
    ids = tuple(part for part in os.environ.get(variable, "").split(",") if part)
    if len(ids) != 1:
        raise ClusterError(
            f"a {kind.name} worker needs exactly one id in {variable}, found {','.join(ids) or 'none'}; unset "
            f"RAY_EXPERIMENTAL_NOSET_{variable} if it is set"
        )
    return ids


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
