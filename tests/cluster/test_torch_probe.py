"""What the probe tells of a torch that is there, broken, or has devices."""

import json
from types import SimpleNamespace

import pytest

from cluster import torch_probe


def accelerator(*names, memory=64 * 2**30):
    return SimpleNamespace(
        is_available=lambda: bool(names),
        device_count=lambda: len(names),
        get_device_name=lambda index: names[index],
        get_device_properties=lambda index: SimpleNamespace(total_memory=memory),
    )


@pytest.fixture
def modules(monkeypatch):
    """Sets what importing gives: a module, or an exception to raise."""
    given = {}

    def load(name):
        found = given.get(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(torch_probe.importlib, "import_module", load)
    return given


def torch(**more):
    return SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=None), **more)


def test_devices_of_torch(modules):
    modules["torch"] = torch(cuda=accelerator("NVIDIA H100"))
    found = torch_probe.look()
    assert found["devices"] == [{"name": "NVIDIA H100", "memory_bytes": 64 * 2**30}]
    assert (found["torch"], found["torch_error"], found["npu_error"]) == ("2.13.0", [], [])


def test_devices_of_torch_npu(modules):
    modules |= {
        "torch": torch(npu=accelerator("Ascend910B1", "Ascend910B1"), cuda=accelerator()),
        "torch_npu": object(),
    }
    assert [device["name"] for device in torch_probe.look()["devices"]] == ["Ascend910B1", "Ascend910B1"]


def test_a_torch_that_does_not_load_says_why(modules):
    error = RuntimeError("Failed to load the backend extension: torch_npu")
    error.__cause__ = ImportError("libhccl.so: cannot open shared object file")
    modules["torch"] = error
    found = torch_probe.look()
    assert found["torch"] is None
    assert found["torch_error"] == [
        "RuntimeError: Failed to load the backend extension: torch_npu",
        "ImportError: libhccl.so: cannot open shared object file",
    ]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("libhccl.so"), ["ImportError: libhccl.so"]),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), ["ModuleNotFoundError: No module named 'yaml'"]),
        (ModuleNotFoundError("No module named 'torch_npu'", name="torch_npu"), []),
    ],
)
def test_a_torch_npu_that_is_broken_and_one_that_is_not_there(modules, error, told):
    modules |= {"torch": torch(cuda=accelerator()), "torch_npu": error}
    assert torch_probe.look()["npu_error"] == told


def test_it_prints_one_line(modules, capsys):
    modules["torch"] = torch(cuda=accelerator())
    torch_probe.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line.removeprefix(torch_probe.MARK))["torch"] == "2.13.0"


def test_it_stands_alone():
    """It is run by its path, where nothing of this project can be imported."""
    with open(torch_probe.__file__, encoding="utf-8") as file:
        assert not [line for line in file if line.startswith(("import cluster", "from cluster"))]
