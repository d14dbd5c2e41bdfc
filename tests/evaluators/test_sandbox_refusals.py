"""What the sandbox refuses to do: run a program without walls, or with walls that do not hold."""

import pytest

from evaluators import sandbox, sandbox_run
from evaluators.errors import EvaluationError
from evaluators.sandbox import Isolation, Limits, run_program

OFFERED = [walls for walls in sandbox._CANDIDATES if sandbox.probe().files and sandbox._failure(walls) is None]

pytestmark = pytest.mark.skipif(not OFFERED, reason="this machine cannot hold programs, see sandbox.probe()")

ALLOW_ALL = bytes.fromhex("06000000" + "0000ff7f")  # a filter of system calls that lets all of them pass


def test_no_program_is_run_without_walls(monkeypatch):
    monkeypatch.setattr(sandbox, "_failure", lambda isolation: f"no {isolation.files}")
    monkeypatch.setattr(sandbox, "probe", sandbox.probe.__wrapped__)
    monkeypatch.setattr(sandbox_run, "run", None)
    assert sandbox.probe().files is None
    with pytest.raises(
        EvaluationError, match=r"landlock with namespaces: no landlock; .*mounts with namespaces: no mounts"
    ):
        run_program("pass")


@pytest.mark.parametrize(("machine", "system"), [("riscv64", "linux"), ("x86_64", "darwin")])
def test_unknown_machines_are_refused_by_name(monkeypatch, machine, system):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: machine)
    monkeypatch.setattr(sandbox.sys, "platform", system)
    monkeypatch.setattr(sandbox, "probe", sandbox.probe.__wrapped__)
    with pytest.raises(
        EvaluationError, match=rf"no sandbox is known for {system} on {machine}\): use x86_64 or aarch64"
    ):
        run_program("pass")


def test_walls_with_holes_are_noticed(monkeypatch):
    assert "reads a file outside" in sandbox._failure(Isolation(files=None, namespaces=False))
    monkeypatch.setattr(sandbox_run.sandbox_filter, "assemble", lambda _: ALLOW_ALL)
    for isolation in OFFERED:
        assert "AssertionError" in sandbox._failure(isolation)


def test_walls_that_cannot_be_raised_are_errors(monkeypatch):
    monkeypatch.setattr(sandbox_run, "readable_paths", lambda: ("/there/is/no/such/path",))
    with pytest.raises(EvaluationError, match=r"could not be set up: .*/there/is/no/such/path"):
        run_program("pass")


def test_a_sandbox_that_was_killed_is_an_error():
    with pytest.raises(EvaluationError, match="killed from outside"):
        sandbox_run._judge(b"ready 1.0\n", b"", b"token", "pass", Limits())


def test_limits_are_positive():
    with pytest.raises(EvaluationError, match=r"Limits\.cpu_seconds = 0 .* not positive"):
        Limits(cpu_seconds=0)
