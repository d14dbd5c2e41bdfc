"""What is wrong with one machine. Pure: a described machine in, findings out.

The NPU's part was not run on hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cluster.ascend import FALLBACK_DISABLE, STRICT_FROM, load_remedy, mismatch, release, two_allocators
from cluster.ascend import unknown_pair as unknown_pair_of
from cluster.devices import CUDA_IDS, NPU_IDS
from cluster.machine import NOSET, Machine
from orchestrator.doctor.world import Asked, Finding

_LEAST_PYTHON = (3, 11)
_SETUP = "install torch-npu and a CANN of matching versions, and source its set_env.sh before `ray start`"


def check_machine(machine: Machine, asked: Asked) -> list[Finding]:
    """All findings on a machine, for workers as they are asked for."""
    return [finding for check in _CHECKS for finding in check(machine, asked)]


def _computes_on_npus(machine: Machine, asked: Asked) -> bool:
    """Whether workers here would claim NPUs."""
    return asked.device == "npu" or (asked.device == "auto" and machine.kind == "npu")


def _python(machine: Machine, _: Asked) -> Iterator[Finding]:
    version = tuple(int(part) for part in machine.python.split(".")[:2] if part.isdecimal())
    old = version < _LEAST_PYTHON
    remedy = f"install Python {'.'.join(map(str, _LEAST_PYTHON))} or newer" if old else ""
    yield Finding(subject="python", found=machine.python, remedy=remedy, fatal=old)


def _torch(machine: Machine, _: Asked) -> Iterator[Finding]:
    if machine.torch is None:
        yield Finding(subject="torch", found="missing", remedy="pip install torch", fatal=True)
        return
    if not machine.torch_error:
        yield Finding(subject="torch", found=f"{machine.torch}, loads")
        return
    yield Finding(
        subject="torch",
        found=f"{machine.torch}, does not load: {machine.torch_error[-1]}",
        remedy=_load_remedy(machine, machine.torch_error),
        fatal=True,
    )


def _torch_npu(machine: Machine, asked: Asked) -> Iterator[Finding]:
    if machine.torch_npu is None:
        if _computes_on_npus(machine, asked):
            pair = f"=={release(machine.torch)}.*" if machine.torch else ""
            remedy = f"pip install 'torch-npu{pair}', of the torch that is installed; then: {_SETUP}"
            yield Finding(subject="torch_npu", found="missing", remedy=remedy, fatal=True)
        return
    wrong = mismatch(machine.torch, machine.torch_npu)
    if wrong is not None:
        yield Finding(subject="torch_npu", found=wrong, remedy=_same_release(machine), fatal=True)
    elif machine.npu_error:  # transformers loads it wherever it is installed, whatever torch is told
        found = f"{machine.torch_npu}, does not load: {machine.npu_error[-1]}"
        yield Finding(subject="torch_npu", found=found, remedy=_load_remedy(machine, machine.npu_error), fatal=True)
    elif machine.torch_error:
        yield Finding(subject="torch_npu", found=f"{machine.torch_npu}, not tried: torch does not load")
    else:
        yield Finding(subject="torch_npu", found=f"{machine.torch_npu}, loads")


def _stack(machine: Machine, asked: Asked) -> Iterator[Finding]:
    """Driver and CANN, where there is anything of Ascend's."""
    needed = _computes_on_npus(machine, asked)
    if machine.driver is not None or needed:
        remedy = (
            "" if machine.driver else "install Ascend's driver, or mount /usr/local/Ascend/driver into the container"
        )
        yield Finding(subject="driver", found=machine.driver or "no version found", remedy=remedy)
    if machine.cann is not None:
        doubt = unknown_pair_of(machine.torch_npu, machine.cann) if machine.torch_npu else None
        remedy = "compare Ascend/pytorch's COMPATIBILITY.md; rows tell both versions" if doubt else ""
        yield Finding(subject="CANN", found=machine.cann + (f": {doubt}" if doubt else ""), remedy=remedy)
    elif machine.unsourced is not None:
        remedy = f"source {machine.unsourced}/set_env.sh before this command, and before `ray start` on every node"
        found = f"in {machine.unsourced}, and the environment does not name it"
        yield Finding(subject="CANN", found=found, remedy=remedy if needed else "", fatal=needed)
    elif needed:
        yield Finding(subject="CANN", found="missing", remedy=_SETUP, fatal=True)


def _devices(machine: Machine, asked: Asked) -> Iterator[Finding]:
    files = {"npu": machine.npu_files, "cuda": machine.gpu_files, "cpu": 0}[machine.kind]
    names = {"npu": "Ascend NPUs", "cuda": "NVIDIA GPUs", "cpu": ""}[machine.kind]
    seen = ", ".join(
        f"{count} x {name} ({memory / 2**30:.0f} GiB)" for (name, memory), count in _counted(machine).items()
    )
    if not files:
        found = f"torch sees {seen}" if seen else f"no accelerators: {machine.cores} CPU cores will work"
        asked_in_vain = asked.device == "npu" and not seen
        remedy = "use device: auto, or a machine with NPUs and their driver" if asked_in_vain else ""
        yield Finding(subject="devices", found=found, remedy=remedy, fatal=asked_in_vain)
        return
    yield from _seen(machine, asked, f"{files} {names}" + (f"; torch sees {seen}" if seen else ""), files)


def _seen(machine: Machine, asked: Asked, found: str, files: int) -> Iterator[Finding]:
    ids_of = {"npu": NPU_IDS, "cuda": CUDA_IDS}[machine.kind]
    ids = [part for part in machine.variables.get(ids_of, "").split(",") if part]
    wanted, loads = len(ids) or files, not (machine.torch_error or machine.npu_error)
    works = asked.device in {"auto", machine.kind}
    strangers = [device.name for device in machine.devices if not device.name.startswith("Ascend")]
    if machine.kind == "npu" and strangers:
        remedy = "look at `npu-smi info`: workers refuse a device that does not call itself Ascend"
        yield Finding(subject="devices", found=f"{found}: {strangers[0]!r} is none", remedy=remedy, fatal=works)
    elif loads and len(machine.devices) != wanted:
        told = f"{ids_of} names {len(ids)}" if ids else f"the driver has {files}"
        dropped = "CANN drops an id that is none without a word; " if ids and machine.kind == "npu" else ""
        remedy = f"{dropped}mend or unset {ids_of}" if ids else "install torch for these devices, and see their driver"
        yield Finding(
            subject="devices",
            found=f"{found or 'none'}: {told}, torch sees {len(machine.devices)}",
            remedy=remedy,
            fatal=works,
        )
    else:
        yield Finding(subject="devices", found=found)


def _isolation(machine: Machine, asked: Asked) -> Iterator[Finding]:
    is_set = [(kind, variable) for kind, variable in NOSET.items() if variable in machine.variables]
    if not is_set:
        yield Finding(subject="device isolation", found="Ray sets visible devices per worker")
    for kind, variable in is_set:
        yield Finding(
            subject="device isolation",
            found=f"{variable} is set",
            remedy=f"unset {variable}: with it every worker sees every {'NPU' if kind == 'npu' else 'GPU'}",
            fatal=asked.device in {"auto", kind} or (kind, asked.device) == ("npu", "simulated-npu"),
        )


def _allocators(machine: Machine, _: Asked) -> Iterator[Finding]:
    trouble = two_allocators(machine.variables)
    if trouble is not None and machine.torch_npu is not None:
        found, remedy = trouble.rsplit(": ", 1)
        yield Finding(subject="allocator", found=found, remedy=remedy, fatal=True)


def _strict(machine: Machine, asked: Asked) -> Iterator[Finding]:
    if machine.torch_npu is None or not _computes_on_npus(machine, asked):
        return
    if not asked.strict:
        yield Finding(subject="CPU fallback", found="allowed by workers.strict: false; every row tells")
    elif machine.is_strict_known:
        yield Finding(subject="CPU fallback", found=f"refused: workers get {FALLBACK_DISABLE}=1")
    else:
        yield Finding(
            subject="CPU fallback",
            found=f"torch_npu {machine.torch_npu} cannot be told to refuse it",
            remedy=f"install torch-npu {STRICT_FROM} or newer, or set workers.strict: false, which rows then tell",
            fatal=True,
        )


def _same_release(machine: Machine) -> str:
    return f"pip install 'torch-npu=={release(machine.torch or '')}.*', or the torch that it needs"


def _load_remedy(machine: Machine, messages: tuple[str, ...]) -> str:
    if mismatch(machine.torch, machine.torch_npu) is not None:
        return _same_release(machine)  # whatever else there may be
    return load_remedy(messages, cann=machine.cann, unsourced=machine.unsourced)


def _counted(machine: Machine) -> dict[tuple[str, int], int]:
    counts: dict[tuple[str, int], int] = {}
    for device in machine.devices:
        key = device.name, device.memory_bytes
        counts[key] = counts.get(key, 0) + 1
    return counts


_CHECKS: tuple[Callable[[Machine, Asked], Iterator[Finding]], ...] = (
    _python,
    _torch,
    _torch_npu,
    _stack,
    _devices,
    _isolation,
    _allocators,
    _strict,
)
