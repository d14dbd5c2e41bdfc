"""What is printed, and the exit status; once with everything real."""

import importlib.metadata
import json

import pytest

from orchestrator.doctor import command
from orchestrator.doctor.command import as_text, doctor_command
from orchestrator.doctor.world import Finding

FINE = Finding(subject="ray", found="2.60.0")
WARNING = Finding(subject="disk", found="1 GB [free] here", remedy="free some space")
FATAL = Finding(subject="torch", found="missing", remedy="pip install torch", fatal=True)


@pytest.fixture
def found(monkeypatch):
    """Sets the findings."""
    monkeypatch.setattr(command, "gather", lambda *_, **__: None)
    return lambda *findings: monkeypatch.setattr(command, "diagnose", lambda _: list(findings))


@pytest.mark.parametrize(("findings", "status"), [((FINE,), 0), ((FINE, WARNING), 0), ((FINE, WARNING, FATAL), 1)])
def test_the_status(found, capsys, findings, status):
    found(*findings)
    assert doctor_command() == status
    shown = capsys.readouterr().out
    for finding in findings:
        assert all(text in shown for text in (finding.subject, finding.found, finding.remedy))
    assert doctor_command(as_json=True) == status
    assert [Finding(**told) for told in json.loads(capsys.readouterr().out)] == list(findings)


def test_json_has_the_keys_that_others_rely_on():
    assert json.loads(as_text([FATAL])) == [
        {"subject": "torch", "found": "missing", "remedy": "pip install torch", "fatal": True}
    ]


def test_this_machine_can_run_a_sweep(capsys, monkeypatch):
    monkeypatch.delenv("RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES", raising=False)
    assert doctor_command(as_json=True) == 0
    told = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert told["torch"]["found"].startswith(importlib.metadata.version("torch"))
    assert told["the packaged model"]["found"] == "installed"
    assert {"python", "ray", "devices", "workers", "disk", "the packaged data"} <= set(told)
    assert not any(finding["fatal"] for finding in told.values())
