"""Looking at this machine: torch is asked in a process of its own, which may do what it likes."""

import sys

import pytest

from cluster.machine import Machine, look_around, probe_torch


def test_this_machine():
    machine = look_around({"ASCEND_RT_VISIBLE_DEVICES": "0,1", "PYTORCH_ALLOC_CONF": "", "OTHER": "x"})
    assert machine.python == ".".join(map(str, sys.version_info[:3]))
    assert machine.torch.startswith("2.")
    assert machine.torch_error == machine.npu_error == ()
    assert machine.cores >= 1
    assert machine.variables == {"ASCEND_RT_VISIBLE_DEVICES": "0,1"}


@pytest.fixture
def interpreter(tmp_path):
    """A program that stands for Python, from its lines."""

    def make(*lines):
        program = tmp_path / "python"
        program.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
        program.chmod(0o755)
        return str(program)

    return make


def test_a_process_that_crashes_is_an_answer(interpreter):
    found = probe_torch(python=interpreter("echo noise", "echo 'Fatal: no HAL' >&2", "exit 134"))
    assert found["torch_error"] == ["`import torch` ended its process (status 134): Fatal: no HAL"]
    assert found["devices"] == []


def test_a_process_that_hangs_is_an_answer(interpreter):
    found = probe_torch(python=interpreter("exec sleep 60"), seconds=0.2)
    assert found["torch_error"] == ["`import torch` has not ended after 0.2 s"]


def test_what_others_print_is_passed_over(interpreter):
    program = interpreter("echo '[W] noise'", 'echo \'bitatlas-probe {"torch": "9.9"}\'', "echo more")
    assert probe_torch(python=program) == {"torch": "9.9"}


def test_its_environment_is_what_it_is_given(interpreter):
    program = interpreter('echo "bitatlas-probe {\\"torch\\": \\"$MINE\\"}"')
    assert probe_torch({"MINE": "here"}, python=program) == {"torch": "here"}


def test_the_kind_is_by_the_driver_s_devices():
    machine = Machine(name="m", python="3.12.0", cores=4)
    assert machine.kind == "cpu"
    assert Machine(name="m", python="3.12.0", cores=4, gpu_files=1).kind == "cuda"
    assert Machine(name="m", python="3.12.0", cores=4, npu_files=8, gpu_files=1).kind == "npu"
