"""The seccomp filter of both architectures, run by a small interpreter of the few instructions that it uses."""

import errno
import re
import struct
from pathlib import Path

import pytest

from evaluators import sandbox_filter as filters

ALLOW, KILL = "allow", "kill"
PID = filters.SELF
HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm/unistd_64.h")),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"),),
}
EVERY_CALL = {**filters.ALLOWED, **filters.CONDITIONAL, **filters.SETUP} | {
    name: numbers for calls in filters.REFUSED.values() for name, numbers in calls.items()
}

every_machine = pytest.mark.parametrize("machine", filters.MACHINES)


def decide(machine, number, *arguments, architecture=None):
    """What the kernel would do with a call: ALLOW, KILL, or the errno of its refusal."""
    arguments = [argument % 2**64 for argument in arguments]
    arguments += [0] * (6 - len(arguments))
    data = struct.pack("<iIQ6Q", number, architecture or filters.MACHINES[machine], 0, *arguments)
    program = list(struct.iter_unpack("=HBBI", filters.assemble(machine)))
    accumulator = at = 0
    while True:
        code, if_true, if_false, constant = program[at]
        at += 1
        if code == 0x20:  # load a word
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif code == 0x15:  # jump if equal
            at += if_true if accumulator == constant else if_false
        elif code == 0x45:  # jump if any bit is set
            at += if_true if accumulator & constant else if_false
        elif code == 0x54:  # and
            accumulator &= constant
        else:
            assert code == 0x06  # return
            action = {0x7FFF0000: ALLOW, 0x80000000: KILL}.get(constant)
            assert action or constant >> 16 == 5
            return action or constant & 0xFFFF


def call(machine, name, *arguments):
    number = EVERY_CALL[name][list(filters.MACHINES).index(machine)]
    return None if number is None else decide(machine, number, *arguments)


@every_machine
def test_every_call_by_its_list(machine):
    for name in filters.ALLOWED:
        assert call(machine, name) in {ALLOW, None}, name
    for verdict, calls in filters.REFUSED.items():
        for name in calls:
            assert call(machine, name) in {filters.REFUSED_ERRNO[verdict], None}, name
    for name in filters.SETUP:
        assert call(machine, name) == errno.ENOSYS


@every_machine
def test_what_is_not_named_does_not_exist(machine):
    column = list(filters.MACHINES).index(machine)
    named = {numbers[column] for numbers in EVERY_CALL.values()} - {n[column] for n in filters.SETUP.values()}
    for number in set(range(1200)) - named:
        assert decide(machine, number) == errno.ENOSYS
    assert decide(machine, 435) == errno.ENOSYS  # clone3
    assert decide(machine, 425) == errno.ENOSYS  # io_uring_setup
    assert decide(machine, 0x40000000) == errno.ENOSYS  # read, by x86_64's other table


@every_machine
def test_calls_of_other_architectures_kill(machine):
    for architecture in (0x40000003, 0x40000028, *(set(filters.MACHINES.values()) - {filters.MACHINES[machine]})):
        assert decide(machine, 0, architecture=architecture) == KILL


@every_machine
def test_threads_but_no_processes(machine):
    thread = 0x3D0F00  # what pthread_create asks for
    assert call(machine, "clone", thread) == ALLOW
    assert call(machine, "clone", 17) == errno.EAGAIN  # fork: SIGCHLD
    assert call(machine, "clone", 0x4111) == errno.EAGAIN  # vfork
    assert call(machine, "clone", 0x10000000 | 17) == errno.EAGAIN  # a user namespace


@every_machine
def test_signals_to_oneself_alone(machine):
    for name in ("kill", "tkill", "tgkill"):
        assert call(machine, name, PID, PID, 15) == ALLOW
        for other in (0, -1, 1, -PID, PID + 1):
            assert call(machine, name, other, other, 15) == errno.EPERM
    assert call(machine, "kill", PID + 2**32) == ALLOW  # the kernel looks at the lower half too
    assert call(machine, "prlimit64", 0) == call(machine, "prlimit64", PID) == ALLOW
    assert call(machine, "prlimit64", 1) == errno.EPERM
    for operation in (8, 10, 15):  # F_SETOWN, F_SETSIG, F_SETOWN_EX
        assert call(machine, "fcntl", 3, operation, 1) == errno.EINVAL
    assert call(machine, "fcntl", 3, 1) == ALLOW
    assert call(machine, "ioctl", 3, 0x8901) == call(machine, "ioctl", 0, 0x5412) == errno.ENOTTY  # FIOSETOWN, TIOCSTI
    assert call(machine, "ioctl", 3, 0x5401) == ALLOW


@every_machine
def test_readers_do_not_truncate(machine):
    read, write, both, neither, create, truncate = 0, 1, 2, 3, 0o100, 0o1000
    for name, before in (("openat", (-100, 0)), ("open", (0,))):
        for flags in (read, write, both, write | create | truncate, both | truncate):
            assert call(machine, name, *before, flags) in {ALLOW, None}
        for flags in (truncate, neither, neither | truncate, create | truncate):
            assert call(machine, name, *before, flags) in {errno.EACCES, None}
    assert call(machine, "openat", -100, 0, truncate) == errno.EACCES


@every_machine
def test_numbers_are_the_kernels(machine):
    found = [path for path in HEADERS[machine] if path.exists()]
    if not found:
        pytest.skip("the kernel's headers are not installed")
    text = found[0].read_text(encoding="utf-8")
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    numbers |= {"newfstatat": numbers.get("newfstatat", numbers.get("fstatat"))}
    column = list(filters.MACHINES).index(machine)
    assert {name: pair[column] for name, pair in EVERY_CALL.items()} == {name: numbers.get(name) for name in EVERY_CALL}


def test_a_call_is_named_once():
    lists = [filters.ALLOWED, filters.CONDITIONAL, filters.SETUP, *filters.REFUSED.values()]
    assert sum(map(len, lists)) == len(EVERY_CALL)
