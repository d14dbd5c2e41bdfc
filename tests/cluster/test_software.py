"""Versions are read where the software lies, and nothing is loaded for it."""

import importlib.metadata
import platform
import sys

import pytest

from cluster import software
from cluster.software import cann_version, driver_version, installed, knows_strict, names_variable, unsourced_cann

INFO = "package_name=Ascend-cann-toolkit\nversion={}\n"


def put_cann(home, version, *, arch=None):
    folder = home / f"{arch or platform.machine()}-linux"
    folder.mkdir(parents=True)
    (folder / "ascend_toolkit_install.info").write_text(INFO.format(version))


def test_versions_of_installed_packages():
    assert installed("torch") == importlib.metadata.version("torch")
    assert installed("no-such-package-at-all") is None


def test_the_cann_that_the_environment_names(tmp_path):
    put_cann(tmp_path / "a", "8.5.0")
    put_cann(tmp_path / "a", "0.0", arch="another")
    put_cann(tmp_path / "b", "9.1.0")
    (tmp_path / "empty").mkdir()
    assert cann_version({"ASCEND_TOOLKIT_HOME": str(tmp_path / "a")}) == "8.5.0"
    assert cann_version({"ASCEND_HOME_PATH": str(tmp_path / "b")}) == "9.1.0"
    named = {"ASCEND_TOOLKIT_HOME": str(tmp_path / "empty"), "ASCEND_HOME_PATH": str(tmp_path / "b")}
    assert cann_version(named) == "9.1.0"
    assert cann_version({"ASCEND_TOOLKIT_HOME": str(tmp_path / "gone")}) is None
    assert cann_version({}) is None


def test_an_older_cann_says_it_elsewhere(tmp_path):
    (tmp_path / "version.cfg").write_text("runtime_running_version=[7.6.0.1.220:8.0.0]\n")
    assert cann_version({"ASCEND_TOOLKIT_HOME": str(tmp_path)}) == "8.0.0"


def test_a_cann_that_nobody_sourced(tmp_path):
    assert unsourced_cann({}, tmp_path) is None
    put_cann(tmp_path / "ascend-toolkit" / "latest", "8.3.RC1")
    assert unsourced_cann({}, tmp_path) == str(tmp_path / "ascend-toolkit/latest")
    put_cann(tmp_path / "cann", "8.5.0")
    assert unsourced_cann({}, tmp_path) == str(tmp_path / "cann")
    assert unsourced_cann({"ASCEND_HOME_PATH": "/elsewhere"}, tmp_path) is None


@pytest.fixture
def npu_smi(tmp_path, monkeypatch):
    """A made-up npu-smi on the path, and nothing else."""
    tools = tmp_path / "bin"
    tools.mkdir()
    tool = tools / "npu-smi"
    tool.write_text(f"#!{sys.executable}\nprint('| npu-smi 24.1.rc2    Version: 24.1.rc2  |')\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))


def test_the_driver_s_file_comes_first(tmp_path, npu_smi):
    assert driver_version(tmp_path) == "24.1.rc2"
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "version.info").write_text("Version=25.2.0\n")
    assert driver_version(tmp_path) == "25.2.0"


def test_no_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version(tmp_path) is None


def test_rows_are_told_what_is_there(monkeypatch):
    monkeypatch.setattr(software, "installed", {"torch": "2.12.0", "torch-npu": "2.12.0"}.get)
    monkeypatch.setattr(software, "cann_version", lambda: "9.1.0")
    monkeypatch.setattr(software, "driver_version", lambda: None)
    assert software.versions_under("CPU") == {"torch": "2.12.0"}
    assert software.versions_under("NPU") == {"torch": "2.12.0", "torch_npu": "2.12.0", "cann": "9.1.0"}


def test_a_library_knows_the_variable_or_not(tmp_path, monkeypatch):
    package = tmp_path / "torch_npu"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('loaded')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not knows_strict()
    library = package / "lib" / "libtorch_npu.so"
    library.write_bytes(b"")
    assert not names_variable(library)
    library.write_bytes(b"\x7fELF PYTORCH_NPU_ALLOC_CONF\0")
    assert not knows_strict()
    library.write_bytes(b"\x7fELF\0TORCH_NPU_FALLBACK_CPU_DISABLE\0")
    assert knows_strict()
