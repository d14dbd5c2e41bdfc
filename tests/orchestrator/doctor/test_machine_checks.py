"""Machines made up, each with one thing wrong: what is found, and the remedy."""

from dataclasses import replace

import pytest

from cluster.machine import Device, Machine
from orchestrator.doctor.machine_checks import check_machine
from orchestrator.doctor.world import Asked

GIB = 2**30
PLAIN = Machine(name="plain", python="3.12.3", cores=8, torch="2.13.0+cpu")
CARD = Device(name="Ascend910B1", memory_bytes=64 * GIB)
NPUS = replace(
    PLAIN,
    name="node",
    torch="2.13.0",
    torch_npu="2.13.0",
    devices=(CARD,) * 8,
    npu_files=8,
    driver="25.2.0",
    cann="9.1.0",
    is_strict_known=True,
)
BROKEN = (
    "RuntimeError: Failed to load the backend extension: torch_npu. You can disable extension auto-loading",
    "ImportError: libhccl.so: cannot open shared object file: No such file or directory",
)


def findings(machine, **asked):
    return {finding.subject: finding for finding in check_machine(machine, Asked(**asked))}


def wrong(machine, **asked):
    return {name: finding for name, finding in findings(machine, **asked).items() if finding.remedy}


def fatal(machine, **asked):
    return [name for name, finding in findings(machine, **asked).items() if finding.fatal]


def test_a_plain_machine_has_no_word_of_npus():
    found = findings(PLAIN)
    assert set(found) == {"python", "torch", "devices", "device isolation"}
    assert found["devices"].found == "no accelerators: 8 CPU cores will work"
    assert not wrong(PLAIN)


def test_a_machine_of_npus():
    found = findings(replace(NPUS, torch="2.12.0", torch_npu="2.12.0"))
    assert found["devices"].found == "8 Ascend NPUs; torch sees 8 x Ascend910B1 (64 GiB)"
    assert (found["driver"].found, found["CANN"].found) == ("25.2.0", "9.1.0")
    assert found["torch_npu"].found == "2.12.0, loads"
    assert not wrong(replace(NPUS, torch="2.12.0", torch_npu="2.12.0"))


def test_gpus():
    card = Device(name="NVIDIA H100", memory_bytes=80 * GIB)
    machine = replace(PLAIN, gpu_files=2, devices=(card, card))
    assert findings(machine)["devices"].found == "2 NVIDIA GPUs; torch sees 2 x NVIDIA H100 (80 GiB)"
    assert not wrong(machine)
    finding = findings(replace(machine, devices=()))["devices"]
    assert (finding.found, finding.fatal) == ("2 NVIDIA GPUs: the driver has 2, torch sees 0", True)
    assert not findings(replace(machine, devices=()), device="cpu")["devices"].fatal


def test_no_npu_where_npus_are_asked_for():
    finding = findings(PLAIN, device="npu")["devices"]
    assert finding.found == "no accelerators: 8 CPU cores will work"
    assert finding.remedy == "use device: auto, or a machine with NPUs and their driver"
    assert finding.fatal
    assert {"torch_npu", "CANN"} <= set(fatal(PLAIN, device="npu"))


def test_torch_npu_without_cann():
    machine = replace(PLAIN, torch_npu="2.13.0", torch_error=BROKEN)
    finding = findings(machine)["torch"]
    assert finding.found == (
        "2.13.0+cpu, does not load: ImportError: libhccl.so: cannot open shared object file: No such file or directory"
    )
    assert finding.remedy.startswith("on a machine without NPUs `pip uninstall torch-npu`")
    assert "install CANN and source its set_env.sh" in finding.remedy
    assert fatal(machine) == ["torch"]


def test_torch_that_is_told_not_to_load_torch_npu():
    """TORCH_DEVICE_BACKEND_AUTOLOAD=0 brings torch back, and transformers loads torch_npu all the same."""
    machine = replace(PLAIN, torch_npu="2.13.0", npu_error=BROKEN[1:], variables={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert findings(machine)["torch"].found == "2.13.0+cpu, loads"
    assert findings(machine)["torch_npu"].remedy.startswith("on a machine without NPUs `pip uninstall torch-npu`")
    assert fatal(machine) == ["torch_npu"]


def test_cann_that_nobody_sourced():
    machine = replace(NPUS, cann=None, unsourced="/usr/local/Ascend/cann", torch_error=BROKEN, devices=())
    found = findings(machine)
    assert found["torch"].remedy == found["CANN"].remedy
    assert found["CANN"].remedy.startswith("source /usr/local/Ascend/cann/set_env.sh before this command")
    assert {"torch", "CANN"} <= set(fatal(machine))


def test_npus_without_any_software():
    machine = replace(NPUS, torch_npu=None, cann=None, driver=None, devices=())
    found = wrong(machine)
    assert found["torch_npu"].remedy.startswith("pip install 'torch-npu==2.13.*'")
    assert found["driver"].remedy.startswith("install Ascend's driver")
    assert found["CANN"].found == "missing"
    assert {"torch_npu", "CANN", "devices"} == set(fatal(machine))
    assert fatal(machine, device="cpu") == []


def test_versions_that_do_not_match():
    machine = replace(NPUS, torch="2.13.0", torch_npu="2.10.0.post4")
    finding = findings(machine)["torch_npu"]
    assert finding.found == "torch_npu 2.10.0.post4 needs torch 2.10, and torch 2.13.0 is installed"
    assert finding.remedy == "pip install 'torch-npu==2.13.*', or the torch that it needs"
    assert finding.fatal
    broken = replace(machine, torch_error=(BROKEN[0], "ImportError: libtorch_npu.so: undefined symbol"), devices=())
    assert findings(broken)["torch"].remedy == finding.remedy


def test_a_pair_that_nobody_knows_is_a_warning():
    finding = wrong(replace(NPUS, cann="8.5.0", torch="2.12.0", torch_npu="2.12.0"))["CANN"]
    assert finding.found == "8.5.0: torch_npu 2.12.0 was released for CANN 9.1.0, and CANN 8.5.0 is installed"
    assert not finding.fatal


def test_ids_that_cann_dropped():
    machine = replace(NPUS, devices=(CARD,) * 2, variables={"ASCEND_RT_VISIBLE_DEVICES": "0,1,9"})
    finding = findings(machine)["devices"]
    assert finding.found == (
        "8 Ascend NPUs; torch sees 2 x Ascend910B1 (64 GiB): ASCEND_RT_VISIBLE_DEVICES names 3, torch sees 2"
    )
    assert finding.remedy == "CANN drops an id that is none without a word; mend or unset ASCEND_RT_VISIBLE_DEVICES"
    assert finding.fatal
    assert not wrong(replace(machine, devices=(CARD,) * 3)).keys() & {"devices"}


def test_a_stranger_among_devices():
    machine = replace(NPUS, devices=(Device(name="Card 9", memory_bytes=GIB),) * 8)
    assert "'Card 9' is none" in findings(machine)["devices"].found
    assert fatal(machine) == ["devices"]


@pytest.mark.parametrize(
    ("variable", "device", "is_fatal"),
    [
        ("RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES", "auto", True),
        ("RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES", "npu", True),
        ("RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES", "simulated-npu", True),
        ("RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES", "cuda", False),
        ("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "cuda", True),
        ("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "cpu", False),
    ],
)
def test_the_noset_variables(variable, device, is_fatal):
    finding = findings(replace(PLAIN, variables={variable: "1"}), device=device)["device isolation"]
    what = "NPU" if "ASCEND" in variable else "GPU"
    assert (finding.found, finding.fatal) == (f"{variable} is set", is_fatal)
    assert finding.remedy == f"unset {variable}: with it every worker sees every {what}"


def test_both_allocator_variables():
    machine = replace(NPUS, variables={"PYTORCH_ALLOC_CONF": "a", "PYTORCH_NPU_ALLOC_CONF": "b"})
    finding = findings(machine)["allocator"]
    assert (finding.remedy, finding.fatal) == ("unset one of them", True)
    assert "allocator" not in findings(replace(machine, torch_npu=None))


def test_a_fallback_that_cannot_be_refused():
    assert findings(NPUS)["CPU fallback"].found == "refused: workers get TORCH_NPU_FALLBACK_CPU_DISABLE=1"
    old = replace(NPUS, is_strict_known=False)
    finding = findings(old)["CPU fallback"]
    assert finding.remedy.startswith("install torch-npu 2.13.0")
    assert finding.remedy.endswith("or set workers.strict: false, which rows then tell")
    assert finding.fatal
    assert not wrong(old, strict=False).keys() & {"CPU fallback"}
    assert "CPU fallback" not in findings(old, device="cpu")


def test_an_old_python_and_a_missing_torch():
    assert fatal(replace(PLAIN, python="3.10.9")) == ["python"]
    assert fatal(replace(PLAIN, torch=None, torch_error=("ModuleNotFoundError: No module named 'torch'",))) == ["torch"]
    assert findings(replace(PLAIN, torch=None))["torch"].remedy == "pip install torch"
