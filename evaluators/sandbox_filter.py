"""System calls that a program in the sandbox may make, and the seccomp filter that holds it to them.

What is not named here answers ENOSYS, as on an older kernel: libraries then fall back, and a call that a future kernel
invents stays shut. What a program may be caught at answers the errno that its own library would report on a machine
that lacks the thing, so that an honest program can go on and the verdict can name the wall.

The numbers are the kernel's own, from `asm/unistd_64.h` (x86_64) and `asm-generic/unistd.h` (aarch64); None: there is
no such call.
"""

from __future__ import annotations

import errno
import struct

# AUDIT_ARCH_* of <linux/audit.h>, in the order of the columns below.
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "close": (3, 57),
    "close_range": (436, 436),
    "lseek": (8, 62),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "fadvise64": (221, 223),
    "flock": (73, 32),
    "copy_file_range": (326, 285),
    "sendfile": (40, 71),
    "fstat": (5, 80),
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "umask": (95, 166),
    "creat": (85, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create": (213, None),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "msync": (26, 227),
    "mincore": (27, 232),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "pause": (34, None),
    "restart_syscall": (219, 128),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "alarm": (37, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getgroups": (115, 158),
    "getpgid": (121, 155),
    "getpgrp": (111, None),
    "getsid": (124, 156),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "getpriority": (140, 141),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "arch_prctl": (158, None),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "wait4": (61, 260),
    "waitid": (247, 95),
}

# Allowed or refused by their arguments, see `_conditional`.
CONDITIONAL = {
    "open": (2, None),
    "openat": (257, 56),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "clone": (56, 220),
}

# Verdict: the errno of its calls. Processes answer as at RLIMIT_NPROC. Landlock has no say in modes, owners, times and
# attributes, and in `truncate` only of late, so these are refused here. Folders are refused so that the sandbox's own
# stays flat, which keeps watching and removing it trivial.
REFUSED_ERRNO = {
    "network": errno.ENETUNREACH,
    "processes": errno.EAGAIN,
    "file": errno.EACCES,
    "signal": errno.EPERM,
}
REFUSED: dict[str, dict[str, tuple[int | None, int | None]]] = {
    "network": {
        "socket": (41, 198),
        "socketpair": (53, 199),
    },
    "processes": {
        "fork": (57, None),
        "vfork": (58, None),
        "execve": (59, 221),
        "execveat": (322, 281),
        "setsid": (112, 157),
        "setpgid": (109, 154),
    },
    "file": {
        "mkdir": (83, None),
        "mkdirat": (258, 34),
        "rmdir": (84, None),
        "mknod": (133, None),
        "mknodat": (259, 33),
        "symlink": (88, None),
        "symlinkat": (266, 36),
        "link": (86, None),
        "linkat": (265, 37),
        "chmod": (90, None),
        "fchmod": (91, 52),
        "fchmodat": (268, 53),
        "chown": (92, None),
        "fchown": (93, 55),
        "lchown": (94, None),
        "fchownat": (260, 54),
        "truncate": (76, 45),
        "utime": (132, None),
        "utimes": (235, None),
        "futimesat": (261, None),
        "utimensat": (280, 88),
        "setxattr": (188, 5),
        "lsetxattr": (189, 6),
        "fsetxattr": (190, 7),
        "removexattr": (197, 14),
        "lremovexattr": (198, 15),
        "fremovexattr": (199, 16),
        "chroot": (161, 51),
        "mount": (165, 40),
    },
    "signal": {
        "rt_sigqueueinfo": (129, 138),
        "rt_tgsigqueueinfo": (297, 240),
        "pidfd_open": (434, 434),
        "pidfd_send_signal": (424, 424),
        "ptrace": (101, 117),
    },
}

# Calls that the sandbox itself makes by number, because no C library is sure to wrap them.
SETUP = {
    "capset": (126, 91),
    "pivot_root": (155, 41),
}

# Stands in the filter for the program's own process id, which only the child knows. No process id is this large.
SELF = 0x7FFFFFFE

# <linux/filter.h> and <linux/seccomp.h>
_LOAD, _JUMP_EQUAL, _JUMP_SET, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

_CLONE_THREAD = 0x00010000
_O_ACCMODE, _O_TRUNC = 0o3, 0o1000
# Duplicate, flags, record locks, and F_DUPFD_CLOEXEC. Not F_SETOWN and F_SETSIG: they send signals to other processes.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
# TCGETS (what isatty asks), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def assemble(machine: str) -> bytes:
    """The filter for one of `MACHINES`: an array of `struct sock_filter`, with `SELF` for the program's process id."""
    column = list(MACHINES).index(machine)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, MACHINES[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),  # a 32-bit call: its numbers mean other things
        (_LOAD, 0, 0, _NUMBER),
    ]
    bodies: list[tuple[tuple[int | None, int | None], list[Instruction]]] = []
    bodies += [(numbers, [(_RETURN, 0, 0, _ALLOW)]) for numbers in ALLOWED.values()]
    bodies += [(numbers, _conditional(name)) for name, numbers in CONDITIONAL.items()]
    for verdict, calls in REFUSED.items():
        bodies += [(numbers, [_refuse(REFUSED_ERRNO[verdict])]) for numbers in calls.values()]
    for numbers, body in bodies:
        number = numbers[column]
        if number is not None:
            program += [(_JUMP_EQUAL, 0, len(body), number), *body]
    program.append(_refuse(errno.ENOSYS))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _refuse(number: int) -> Instruction:
    return (_RETURN, 0, 0, _ERRNO | number)


def _argument(index: int) -> Instruction:
    """Load the lower half of an argument: all of them here are 32 bits wide to the kernel."""
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index)


def _only(index: int, values: tuple[int, ...], otherwise: int) -> list[Instruction]:
    body = [_argument(index)]
    for value in values:
        body += [(_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*body, _refuse(otherwise)]


def _conditional(name: str) -> list[Instruction]:
    if name == "clone":  # threads, no processes; clone3 hides its flags from filters, so it stays ENOSYS
        return [
            _argument(0),
            (_JUMP_SET, 0, 1, _CLONE_THREAD),
            (_RETURN, 0, 0, _ALLOW),
            _refuse(REFUSED_ERRNO["processes"]),
        ]
    if name in {"open", "openat"}:
        # Landlock before 6.2 lets a reader truncate, and access mode 3 counts as neither reading nor writing.
        shut = (_O_TRUNC, _O_ACCMODE, _O_ACCMODE | _O_TRUNC)
        body = [_argument(1 if name == "open" else 2), (_AND, 0, 0, _O_ACCMODE | _O_TRUNC)]
        for flags in shut:
            body += [(_JUMP_EQUAL, 0, 1, flags), _refuse(REFUSED_ERRNO["file"])]
        return [*body, (_RETURN, 0, 0, _ALLOW)]
    if name == "fcntl":
        return _only(1, _FCNTL, errno.EINVAL)
    if name == "ioctl":
        return _only(1, _IOCTL, errno.ENOTTY)
    if name == "prlimit64":
        return _only(0, (0, SELF), REFUSED_ERRNO["signal"])
    return _only(0, (SELF,), REFUSED_ERRNO["signal"])  # kill, tkill, tgkill
