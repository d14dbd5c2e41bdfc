"""A worker makes sure of its device, and never takes another one."""

import pytest

from cluster.devices import CUDA_IDS, KINDS, NPU_IDS, claim
from cluster.errors import ClusterError


@pytest.fixture(autouse=True)
def no_devices_promised(monkeypatch):
    for variable in (NPU_IDS, CUDA_IDS):
        monkeypatch.delenv(variable, raising=False)


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
    import sys

    monkeypatch.setenv(NPU_IDS, "2")
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(
        ClusterError, match=r"was promised NPU 2, but torch_npu does not load .*source CANN's set_env.sh"
    ):
        claim(KINDS["npu"])


def test_kinds_are_named_as_in_the_sweep_file():
    assert all(kind.name == name for name, kind in KINDS.items())
    assert [name for name, kind in KINDS.items() if kind.simulated] == ["simulated-npu"]
