"""A worker makes sure of its device, and never takes another one."""

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace

import pytest

from cluster import devices
from cluster.ascend import ALLOC_CONF, FALLBACK_DISABLE, NPU_ALLOC_CONF
from cluster.devices import CUDA_IDS, KINDS, NPU_IDS, claim, strict_variables
from cluster.errors import ClusterError


@pytest.fixture(autouse=True)
def no_devices_promised(monkeypatch):
    for variable in (NPU_IDS, CUDA_IDS, ALLOC_CONF, NPU_ALLOC_CONF, FALLBACK_DISABLE):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def npu(monkeypatch):
    """A made-up torch.npu of one 910B1, promised as id 3, with its software; what a test changes of it counts."""
    import torch

    made = SimpleNamespace(names=["Ascend910B1"])
    made.is_available = lambda: bool(made.names)
    made.device_count = lambda: len(made.names)
    made.get_device_name = lambda index: made.names[index]
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: {"npu": made}[kind])
    monkeypatch.setattr(devices, "versions_under", lambda resource: {"torch": "2.13.0", "of": resource})
    monkeypatch.setattr(devices, "knows_strict", lambda: True)
    monkeypatch.setenv(NPU_IDS, "3")
    return made


def test_an_npu_is_claimed_with_what_is_under_it(npu, monkeypatch):
    device = claim(KINDS["npu"])
    assert (device.torch_device, device.name, device.ids) == ("npu:0", "Ascend910B1", ("3",))
    assert device.software == {"torch": "2.13.0", "of": "NPU"}
    assert device.cpu_fallback is True
    monkeypatch.setenv(FALLBACK_DISABLE, "0")
    assert claim(KINDS["npu"]).cpu_fallback is True
    monkeypatch.setenv(FALLBACK_DISABLE, "1")
    assert claim(KINDS["npu"]).cpu_fallback is False


@pytest.mark.parametrize("names", [[], ["Ascend910B1", "Ascend910B1"]])
def test_as_many_npus_as_ids(npu, names):
    npu.names = names
    with pytest.raises(ClusterError, match=f"Ray promised NPU 3, but torch_npu sees {len(names)} devices"):
        claim(KINDS["npu"])


def test_a_device_that_does_not_call_itself_ascend_is_refused(npu):
    npu.names = ["Graphics 3000"]
    with pytest.raises(ClusterError, match="torch_npu calls it 'Graphics 3000', which is no Ascend device"):
        claim(KINDS["npu"])


def test_both_allocator_variables_are_refused_before_torch_npu_aborts(npu, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # is not even tried
    monkeypatch.setenv(ALLOC_CONF, "expandable_segments:True")
    monkeypatch.setenv(NPU_ALLOC_CONF, "expandable_segments:True")
    with pytest.raises(ClusterError, match=f"both {NPU_ALLOC_CONF} and {ALLOC_CONF} are set.*unset one of them"):
        claim(KINDS["npu"])


def test_a_torch_npu_that_cannot_refuse_the_fallback_is_no_strict_one(npu, monkeypatch):
    monkeypatch.setattr(devices, "knows_strict", lambda: False)
    assert claim(KINDS["npu"]).cpu_fallback is True
    monkeypatch.setenv(FALLBACK_DISABLE, "1")
    with pytest.raises(ClusterError, match=r"install torch-npu 2.13.0.* or allow it with workers.strict: false"):
        claim(KINDS["npu"])


def test_the_fallback_is_decided_before_a_worker_s_process_starts():
    assert strict_variables(KINDS["npu"], strict=True) == {FALLBACK_DISABLE: "1"}
    assert strict_variables(KINDS["npu"], strict=False) == {FALLBACK_DISABLE: "0"}
    assert strict_variables(KINDS["cuda"], strict=True) == strict_variables(KINDS["cpu"], strict=True) == {}


def test_off_npus_there_is_no_word_of_them(monkeypatch):
    versions = {"torch": importlib.metadata.version("torch")}
    assert (claim(KINDS["cpu"]).software, claim(KINDS["cpu"]).cpu_fallback) == (versions, None)
    monkeypatch.setenv(NPU_IDS, "3")
    simulated = claim(KINDS["simulated-npu"])
    assert (simulated.software, simulated.cpu_fallback) == (versions, None)


def test_a_cpu_is_always_there():
    device = claim(KINDS["cpu"])
    assert (device.torch_device, device.ids) == ("cpu", ())
    assert device.name


def test_a_simulated_npu_computes_on_the_cpu_and_says_so(monkeypatch):
    monkeypatch.setenv(NPU_IDS, "3")
    device = claim(KINDS["simulated-npu"])
    assert (device.torch_device, device.ids) == ("cpu", ("3",))
    assert device.name.startswith("simulated NPU on ")


@pytest.mark.parametrize("kind", ["npu", "simulated-npu", "cuda"])
@pytest.mark.parametrize(("ids", "found"), [(None, "none"), ("", "none"), (",", "none"), ("0,1", "0,1")])
def test_anything_but_one_id_is_refused(monkeypatch, kind, ids, found):
    variable = CUDA_IDS if kind == "cuda" else NPU_IDS
    if ids is not None:
        monkeypatch.setenv(variable, ids)
    with pytest.raises(ClusterError) as caught:
        claim(KINDS[kind])
    assert str(caught.value) == (
        f"a {kind} worker needs exactly one id in {variable}, found {found}; "
        f"unset RAY_EXPERIMENTAL_NOSET_{variable} if it is set"
    )


def test_a_promised_gpu_that_torch_does_not_see_is_refused(monkeypatch):
    import torch

    monkeypatch.setenv(CUDA_IDS, "5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ClusterError, match="Ray promised GPU 5, but torch sees 0 CUDA devices"):
        claim(KINDS["cuda"])


def test_a_promised_npu_without_torch_npu_is_refused(monkeypatch):
    monkeypatch.setenv(NPU_IDS, "2")
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(
        ClusterError, match=r"was promised NPU 2, but torch_npu does not load .*source CANN's set_env.sh"
    ):
        claim(KINDS["npu"])


def test_kinds_are_named_as_in_the_sweep_file():
    assert all(kind.name == name for name, kind in KINDS.items())
    assert [name for name, kind in KINDS.items() if kind.simulated] == ["simulated-npu"]
