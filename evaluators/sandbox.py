"""The place in which programs written by a language model are run: `run_program`, and what it needs, `probe`.

A program is a process without network, processes of its own, environment, or any file but Python's library and an empty
folder that is removed with it, under limits on time, memory, threads, files and output. The kernel enforces this:
Landlock or a mount namespace for files, seccomp for system calls, resource limits, and further namespaces where they
are allowed. What must hold is tried out once per process by a program of our own; where it does not, nothing is run.
`docs/code-tasks.md` says what this does and does not protect from.

The rooms: `sandbox_run` (starts, watches, judges), `sandbox_child` (raises the walls), `sandbox_filter` (system calls).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import sys
import tempfile
from pathlib import Path

from evaluators import sandbox_filter, sandbox_run
from evaluators.errors import EvaluationError
from evaluators.sandbox_run import Isolation, Kind, Limits, Verdict

__all__ = ["Isolation", "Kind", "Limits", "Verdict", "probe", "run_program"]

# From the most to the least isolation. All of them keep what the module promises.
_CANDIDATES = (
    Isolation(files="landlock", namespaces=True),
    Isolation(files="landlock", namespaces=False),
    Isolation(files="mounts", namespaces=True),
)


def run_program(source: str, *, limits: Limits | None = None) -> Verdict:
    """Run Python source in the sandbox, as a module that is not `__main__`, on an empty standard input.

    A program that is to be tested is followed by its tests in the same source; it has passed if the last line of all
    was executed. Hashes of strings are the same in every run, so that a verdict is.

    Args:
        source: the program.
        limits: what it may use; by default `Limits()`.

    Raises:
        EvaluationError: this machine lacks an isolation that is required, or the sandbox itself broke.
    """
    isolation = probe()
    if isolation.files is None:
        raise EvaluationError(
            f"programs are not run on this machine, for they could not be held ({'; '.join(isolation.missing)}): use "
            "x86_64 or aarch64 Linux with Landlock (5.13 or newer), or allow user namespaces, or, in a container as "
            "root, add the capability SYS_ADMIN"
        )
    return sandbox_run.run(source, limits or Limits(), isolation)


@functools.cache
def probe() -> Isolation:
    """What this machine offers, found by running a program that tries to break out; once per process."""
    if sys.platform != "linux" or platform.machine() not in sandbox_filter.MACHINES:
        return Isolation(
            files=None, namespaces=False, missing=(f"no sandbox is known for {sys.platform} on {platform.machine()}",)
        )
    missing: list[str] = []
    for candidate in _CANDIDATES:
        failure = _failure(candidate)
        if failure is None:
            return dataclasses.replace(candidate, missing=tuple(missing))
        missing.append(f"{candidate.files} {'with' if candidate.namespaces else 'without'} namespaces: {failure}")
    return Isolation(files=None, namespaces=False, missing=tuple(missing))


# Each line is a promise of this module. Whoever is let through ends in an AssertionError.
_CHECK = """
import os, threading, _socket
def refused(call, *arguments):
    try:
        call(*arguments)
    except OSError:
        return True
    return False
assert refused(open, {outside!r}), "reads a file outside"
assert refused(open, {outside!r}, "w"), "writes a file outside"
assert refused(os.open, {outside!r}, os.O_RDONLY | os.O_TRUNC), "truncates a file outside"
assert refused(open, {outside!r} + ".new", "w"), "makes a file outside"
assert refused(os.unlink, {outside!r}), "removes a file outside"
assert refused(os.chmod, {outside!r}, 0o777), "changes the mode of a file outside"
assert refused(_socket.socket), "opens a socket"
assert refused(os.fork), "starts a process"
assert refused(os.kill, {parent}, 0), "signals another process"
assert refused(os.kill, -1, 0), "signals all processes"
assert not os.environ, "has an environment"
with open("own", "w") as file:
    file.write("text")
os.rename("own", "renamed")
assert open("renamed").read() == "text"
os.unlink("renamed")
thread = threading.Thread(target=print)
thread.start()
thread.join()
"""


def _failure(isolation: Isolation) -> str | None:
    """Why a machine does not offer an isolation; None if it does."""
    with tempfile.TemporaryDirectory(prefix="bitatlas-sandbox-check-") as folder:
        # Open to everybody, so that it is the sandbox that refuses and not the file's mode.
        Path(folder).chmod(0o777)
        outside = Path(folder, "outside")
        outside.write_text("secret", encoding="utf-8")
        outside.chmod(0o666)
        try:
            verdict = sandbox_run.run(_CHECK.format(outside=str(outside), parent=os.getpid()), Limits(), isolation)
        except EvaluationError as error:
            return str(error)
    return None if verdict.passed else verdict.detail
