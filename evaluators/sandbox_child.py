"""The child side of the sandbox: raise the walls, then run the program. `evaluators.sandbox_run` starts it by itself.

It stands alone: its interpreter has no site-packages, and whatever it imported would delay every program, which is why
`typing` and `signal` (some 10 ms together) are not. Three processes come of it: this one, which only waits; with a PID
namespace, that namespace's first process, which only waits too; and the program. Each dies with the one above it.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]
import ctypes
import errno
import importlib.machinery
import itertools
import os
import resource
import struct
import sys
import time
import types

TYPE_CHECKING = False  # to type checkers it is true whatever it says here
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

PROGRAM = "<program>"

# What an exception says that the program, or a library it called, did not catch.
KIND_OF_ERRNO = {
    errno.ENETUNREACH: "network",
    errno.EAGAIN: "processes",
    errno.EPERM: "signal",
    errno.ENOMEM: "memory",
    **dict.fromkeys(
        (errno.EACCES, errno.ENOENT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENOSPC, errno.EDQUOT, errno.EXDEV),
        "file",
    ),
}
_MAX_REPORT_BYTES = 1000

# Room above the program's memory, so that running out of it can still be reported.
_RESERVE_BYTES = 16 * 2**20

# Users that systemd sets aside for services without one of their own; nothing belongs to them.
_FIRST_USER, _USERS = 61184, 4336

_libc = ctypes.CDLL(None, use_errno=True)

# <sys/prctl.h>, <linux/capability.h>, <sched.h>, <sys/mount.h>
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 8, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION, _CAP_DAC_READ_SEARCH = 0x20080522, 2
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MS_KEPT = 1 | 2 | 4 | 8 | 1024 | 2048  # read-only, no set-uid, devices, executables, access times: as in statvfs
_MNT_DETACH = 2

# <linux/landlock.h>; the numbers of its calls are those of every architecture.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_VERSION, _LANDLOCK_PATH_BENEATH = 1, 1
_EXECUTE, _WRITE, _READ, _READ_FOLDER, _REMOVE_FILE, _MAKE_FILE, _TRUNCATE = (
    1 << bit for bit in (0, 1, 2, 3, 5, 8, 14)
)
# Every right on files that a version knows: what is not handled is not restricted.
_RIGHTS_OF_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_NETWORK_RIGHTS, _SCOPES = 3, 3  # bind and connect TCP (version 4); abstract sockets and signals (version 6)


def main() -> NoReturn:
    """Read the options and the program, raise the walls that hold for all three processes, start the next one."""
    split = sys.argv.index("--")
    options = dict(argument.split("=", 1) for argument in sys.argv[2:split])
    readable = sys.argv[split + 1 :]
    os.environ.clear()
    sys.dont_write_bytecode = True
    source = _read_standard_input()
    _die_with_parent()
    if os.getppid() != int(options["parent"]):
        os._exit(1)
    namespaces, mounts = options["namespaces"] == "1", options["files"] == "mounts"
    if namespaces or mounts:
        _unshare(namespaces=namespaces, mounts=mounts)
    if mounts:
        _change_root(options["stage"], options["folder"], readable, int(options["pivot_root"]))
    os.chdir(options["folder"])
    if not namespaces:
        _start_program(options, readable, source)
    child, lifeline = _fork()
    if child == 0:
        os.close(lifeline)
        _start_program(options, readable, source)
    os.waitpid(child, 0)
    os._exit(0)


def _start_program(options: dict[str, str], readable: Sequence[str], source: bytes) -> NoReturn:
    """Fork the program, wait for its end, and tell the parent of the sandbox how it ended."""
    status_file = int(options["status"])
    child, lifeline = _fork()
    if child == 0:
        _confine(options, readable, lifeline)
        os.write(status_file, f"ready {time.monotonic()}\n".encode())
        os.close(status_file)
        _run(source, int(options["report"]), int(options["token"]))
    _, status, usage = os.wait4(child, 0)
    processor_seconds = usage.ru_utime + usage.ru_stime
    os.write(status_file, f"end {time.monotonic()} {status} {processor_seconds}\n".encode())
    os._exit(0)


def _read_standard_input() -> bytes:
    """All of it; afterwards it is empty."""
    blocks = []
    while block := os.read(0, 2**16):
        blocks.append(block)
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    return b"".join(blocks)


def _fork() -> tuple[int, int]:
    """Fork so that neither can be left alone: SIGTERM here kills the child, and our end, whatever it is, does too.

    Returns:
        In the parent, the child and the end of a pipe that must stay open. In the child, 0 and the pipe's other end.
    """
    reader, writer = os.pipe()
    # Held back for as long as the handler does not know the child.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.set_blocking(reader, False)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    else:
        os.close(reader)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    if child == 0:
        _die_with_parent()
        _leave_if_alone(reader)
        return 0, reader
    return child, writer


def _leave_if_alone(lifeline: int) -> None:
    """End if the parent already has: nobody else would end us."""
    try:
        os.read(lifeline, 1)
    except BlockingIOError:
        return
    os._exit(1)


# Walls. Each raises OSError, which ends the process before the program was started.


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int, what: str) -> None:
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), what)


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, "PR_SET_PDEATHSIG")


def _unshare(*, namespaces: bool, mounts: bool) -> None:
    """Leave the namespaces of the machine. Without privileges that takes a user namespace, with the same user in it."""
    user, group = os.geteuid(), os.getegid()
    flags = _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS if namespaces else 0
    flags |= _CLONE_NEWNS if mounts else 0
    flags |= _CLONE_NEWUSER if user else 0
    _check(_libc.unshare(flags), "unshare")
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)


def _change_root(stage: str, folder: str, readable: Sequence[str], pivot_root: int) -> None:
    """Make a root in which there is nothing but the readable paths, read-only, and the program's own folder."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", stage, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    os.umask(0o022)
    for path in (*readable, folder):
        target = stage + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(path, target, None, _MS_BIND | _MS_REC)
        if path != folder and not path.startswith("/dev/"):
            # A user namespace may add restrictions to a mount, but must repeat those that it came with.
            given = os.statvfs(target).f_flag & _MS_KEPT
            _mount("none", target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | given)
    os.chdir(stage)
    _check(_libc.syscall(ctypes.c_long(pivot_root), b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    _mount("none", "/", None, _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    kind_bytes, data_bytes = kind and kind.encode(), data and data.encode()
    result = _libc.mount(os.fsencode(source), os.fsencode(target), kind_bytes, ctypes.c_ulong(flags), data_bytes)
    _check(result, f"mount {target}")


def _confine(options: dict[str, str], readable: Sequence[str], lifeline: int) -> None:
    """Raise the walls around this process alone: user, capabilities, limits, files, system calls."""
    root = os.geteuid() == 0
    dropped = root and _drop_user(options["folder"])
    # Python may live in a folder that only root may enter; what may be read is up to the file wall.
    _set_capabilities(1 << _CAP_DAC_READ_SEARCH if dropped else 0, int(options["capset"]))
    _die_with_parent()  # once more: changing the user undid it
    _leave_if_alone(lifeline)
    os.close(lifeline)
    limits = {name: int(options[name]) for name in ("cpu", "memory", "file_size", "open_files", "threads")}
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, limits["cpu"], limits["cpu"] + 1),
        (resource.RLIMIT_AS, limits["memory"], limits["memory"] + _RESERVE_BYTES),
        (resource.RLIMIT_FSIZE, limits["file_size"], limits["file_size"]),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_STACK, 8 * 2**20, 8 * 2**20),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    # Linux counts these by user, and from 5.14 on by user and namespace, where the two that wait count too. Where
    # others' processes would count as well the limit is left away: what it bounds is threads, and memory bounds them.
    if dropped:
        resource.setrlimit(resource.RLIMIT_NPROC, (limits["threads"], limits["threads"]))
    elif not root and options["namespaces"] == "1" and _kernel() >= (5, 14):
        resource.setrlimit(resource.RLIMIT_NPROC, (limits["threads"] + 2, limits["threads"] + 2))
    _prctl(_PR_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")  # a machine's collector of core dumps minds no limit
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    if options["files"] == "landlock":
        _restrict_files(options["folder"], readable)
    _restrict_calls(bytes.fromhex(options["filter"]), int(options["self"]))


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(itertools.takewhile(str.isdigit, minor)))


def _drop_user(folder: str) -> bool:
    """From root to a user of nobody's, to whom the folder then belongs; False if there is no such user."""
    user = _FIRST_USER + os.getppid() % _USERS
    try:
        os.chown(folder, user, user)
    except OSError as error:
        if error.errno == errno.EINVAL:  # root of a user namespace that has no other users
            return False
        raise
    _prctl(_PR_SET_KEEPCAPS, 1, "PR_SET_KEEPCAPS")
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    return True


def _set_capabilities(mask: int, number: int) -> None:
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    sets = struct.pack("=6I", mask, mask, 0, 0, 0, 0)  # effective, permitted, inheritable; then their upper halves
    _check(_libc.syscall(ctypes.c_long(number), header, sets), "capset")


def _restrict_files(folder: str, readable: Sequence[str]) -> None:
    """Landlock: read what is readable, write in the folder, and nothing else."""
    create = ctypes.c_long(_LANDLOCK_CREATE_RULESET)
    none = ctypes.c_size_t(0)
    version = _check(_libc.syscall(create, None, none, ctypes.c_uint(_LANDLOCK_VERSION)), "Landlock")
    handled = (1 << _RIGHTS_OF_VERSION.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", handled, _NETWORK_RIGHTS, _SCOPES)[
        : 8 if version < 4 else 16 if version < 6 else 24
    ]
    rules = _check(
        _libc.syscall(create, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)), "landlock_create_ruleset"
    )
    own = _READ | _WRITE | _READ_FOLDER | _REMOVE_FILE | _MAKE_FILE | _TRUNCATE
    for path in (*readable, folder):
        rights = own if path == folder else _READ | _READ_FOLDER
        if not os.path.isdir(path):
            rights = _READ | _WRITE | _TRUNCATE if path == "/dev/null" else _READ
        beneath = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", rights & handled, beneath)
        result = _libc.syscall(
            ctypes.c_long(_LANDLOCK_ADD_RULE), rules, ctypes.c_uint(_LANDLOCK_PATH_BENEATH), rule, ctypes.c_uint(0)
        )
        _check(result, f"landlock_add_rule {path}")
        os.close(beneath)
    _check(_libc.syscall(ctypes.c_long(_LANDLOCK_RESTRICT_SELF), rules, ctypes.c_uint(0)), "landlock_restrict_self")
    os.close(rules)


def _restrict_calls(program: bytes, placeholder: int) -> None:
    own = os.getpid()
    code = b"".join(
        struct.pack("=HBBI", *head, own if constant == placeholder else constant)
        for *head, constant in struct.iter_unpack("=HBBI", program)
    )
    buffer = ctypes.create_string_buffer(code, len(code))
    described = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    zero = ctypes.c_ulong(0)
    result = _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), described, zero, zero)
    _check(result, "seccomp")


# The program.


class _Loader(importlib.machinery.SourceFileLoader):
    """Python's own way to run a module, except that its source is here and not in a file."""

    def __init__(self, name: str, source: bytes) -> None:
        super().__init__(name, PROGRAM)
        self.source = source

    def get_data(self, path: str) -> bytes:
        return self.source

    def path_stats(self, path: str) -> NoReturn:
        raise OSError(f"{path} is no file, so there is no compiled one either")


def _run(source: bytes, report_file: int, token_file: int) -> NoReturn:
    """Run the program as a module that is not `__main__`, report how it went, and leave without another line of it.

    The token waits in a pipe and is not in this process before the last line of the program has been executed.
    """
    # The program may put anything in the place of these.
    read, write, leave, describe, limit = os.read, os.write, os._exit, _describe, resource.setrlimit
    output, memory = (sys.stdout, sys.stderr), resource.getrlimit(resource.RLIMIT_AS)[1]
    sys.argv = [PROGRAM]
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        _Loader("program", source).exec_module(module)
    except MemoryError:
        limit(resource.RLIMIT_AS, (memory, memory))
        write(report_file, b"memory 0 MemoryError")
    except BaseException as error:
        write(report_file, describe(error))
    else:
        write(report_file, b"passed " + read(token_file, 64))
    try:
        for stream in output:
            stream.flush()
    finally:
        leave(0)


def _describe(error: BaseException) -> bytes:
    """Kind, line and text of what the program did not catch."""
    try:
        text = " ".join(str(error).split())
    except Exception as again:
        text = f"(its text cannot be had: {type(again).__name__})"
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{_kind(error)} {_line(error)} {named}".encode(errors="replace")[:_MAX_REPORT_BYTES]


def _kind(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "unfinished"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "processes"
    # urllib and others raise an OSError without a number on top of the one that says what happened
    while isinstance(error, OSError) and error.errno is None and error.__context__ is not None:
        error = error.__context__
    if type(error).__name__ == "gaierror":
        return "network"
    number = error.errno if isinstance(error, OSError) else None
    return "wrong" if number is None else KIND_OF_ERRNO.get(number, "wrong")


def _line(error: BaseException) -> int:
    if isinstance(error, SyntaxError) and error.filename == PROGRAM:
        return error.lineno or 0
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == PROGRAM:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
