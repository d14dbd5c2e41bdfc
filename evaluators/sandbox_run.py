"""One program in one sandbox: started, watched, stopped, judged. `evaluators.sandbox` decides whether that may be."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

from evaluators import sandbox_filter
from evaluators.errors import EvaluationError

Kind = Literal[
    "passed",  # its last line was executed
    "wrong",  # it ended in an exception
    "unfinished",  # it left before its last line, with whatever exit status
    "timeout",  # of processor or of wall-clock time
    "memory",
    "processes",  # it tried to start one, or too many threads
    "file",  # one outside of its folder, one that is not there, one too large, too many
    "network",
    "signal",  # it tried to signal another process
    "crash",  # a signal ended it: a segmentation fault, or one it sent itself
]

FileWall = Literal["landlock", "mounts"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use. Of the two times the processor's ought to strike: it is the same on a busy machine.

    Attributes:
        cpu_seconds: processor time of all threads together.
        wall_seconds: time from the program's first line, for programs that sleep or wait.
        memory_bytes: address space, Python's own included.
        threads: threads, the first included; unprivileged without namespaces, memory alone bounds them.
        file_bytes: size of one file.
        folder_bytes: all files of the program together, looked at ten times a second.
        folder_files: number of them, likewise.
        open_files: file descriptors.
        output_bytes: how much of standard output and standard error is kept; the rest is read and dropped.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory_bytes: int = 2 * 2**30
    threads: int = 32
    file_bytes: int = 16 * 2**20
    folder_bytes: int = 64 * 2**20
    folder_files: int = 1000
    open_files: int = 64
    output_bytes: int = 64 * 2**10

    def __post_init__(self) -> None:
        """Refuse what no program could run under.

        Raises:
            EvaluationError: a limit is not positive.
        """
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise EvaluationError(
                    f"Limits.{name} = {value} of the sandbox is not positive: leave it at its default"
                )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a program ended.

    Attributes:
        kind: one of `Kind`; a program that met a wall and carried on is judged by what it did then.
        detail: one line: the exception and where it was raised, or what was exceeded.
        seconds: wall-clock time from the program's first line to its end.
        output: the beginning of what it wrote to standard output and standard error.
    """

    kind: Kind
    detail: str
    seconds: float
    output: str

    @property
    def passed(self) -> bool:
        """Whether the program was executed to its last line."""
        return self.kind == "passed"


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """What this machine offers to the sandbox.

    Attributes:
        files: what keeps programs from files; None if nothing does, and then no program is run.
        namespaces: whether programs also get PID, network, IPC and UTS namespaces: a second wall behind seccomp.
        missing: what was tried and did not hold, in words.
    """

    files: FileWall | None
    namespaces: bool
    missing: tuple[str, ...] = ()


# What a program may read besides Python's library: the C library and what it needs to load others.
_READABLE = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/etc/ld.so.cache",
    "/etc/ssl/openssl.cnf",
    "/usr/share/zoneinfo",
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
)

# Raising the walls takes milliseconds, unless the machine is overwhelmed. So does taking them down.
_SETUP_SECONDS, _GRACE_SECONDS = 60.0, 10.0
_TICK_SECONDS = 0.1
_STATUS_BYTES, _REPORT_BYTES, _DETAIL_CHARACTERS = 4096, 4096, 300


# Imports the child by its name alone, since Python keeps compiled what it imports, but not what it is given to run.
_BEGIN = "import sys; sys.path.append(sys.argv[1]); import sandbox_child; sys.path.pop(); sandbox_child.main()"


class _Pipe:
    """A pipe that is read without waiting; beyond `most` bytes what comes is dropped."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.kept = b""

    def drain(self) -> bool:
        """Take what there is, up to a mebibyte so that no flood holds the caller; False once the end was reached."""
        for _ in range(16):
            try:
                block = os.read(self.read_end, 2**16)
            except BlockingIOError:
                return True
            if not block:
                return False
            self.kept += block[: self.most - len(self.kept)]
        return True

    def close_write_end(self) -> None:
        os.close(self.write_end)
        self.write_end = -1

    def close(self) -> None:
        os.close(self.read_end)
        if self.write_end >= 0:
            os.close(self.write_end)


@dataclass
class _Run:
    """What is known of a program while it runs."""

    process: subprocess.Popen[bytes]
    folder: Path
    limits: Limits
    status: _Pipe
    pipes: tuple[_Pipe, ...]
    exceeded: tuple[Kind, str] | None = None


def run(source: str, limits: Limits, isolation: Isolation) -> Verdict:
    """Run a program behind the given walls, whatever they are worth.

    Raises:
        EvaluationError: a wall could not be raised, or the sandbox was killed from outside.
    """
    token = secrets.token_hex(16).encode()
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitatlas-sandbox-"))).resolve()
        folder, stage = base / "program", base / "root"
        folder.mkdir()
        stage.mkdir()
        pipes = {
            name: stack.enter_context(contextlib.closing(_Pipe(most)))
            for name, most in (
                ("output", limits.output_bytes),
                ("status", _STATUS_BYTES),
                ("report", _REPORT_BYTES),
                ("token", 0),
            )
        }
        os.write(pipes["token"].write_end, token)
        os.set_blocking(pipes["token"].read_end, True)
        text = stack.enter_context(tempfile.TemporaryFile())
        text.write(source.encode("utf-8", "surrogatepass"))
        text.seek(0)
        process = _start(text, folder, stage, pipes, limits, isolation)
        watched = (pipes["output"], pipes["status"], pipes["report"])
        for pipe in (*watched, pipes["token"]):
            pipe.close_write_end()
        state = _Run(process, folder, limits, pipes["status"], watched)
        try:
            _watch(state)
        finally:
            _stop(process)
        stopped = time.monotonic()
        for pipe in watched:
            pipe.drain()
        output = pipes["output"].kept.decode(errors="replace")
        began, ended = _times(state.status.kept)
        if began is None:
            reason = output.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            raise EvaluationError(f"the sandbox could not be set up: {reason[0]}")
        kind, detail = state.exceeded or _judge(state.status.kept, pipes["report"].kept, token, source, limits)
        seconds = (ended or stopped) - began
    return Verdict(kind=kind, detail=detail[:_DETAIL_CHARACTERS], seconds=seconds, output=output)


def _start(
    text: IO[bytes], folder: Path, stage: Path, pipes: dict[str, _Pipe], limits: Limits, isolation: Isolation
) -> subprocess.Popen[bytes]:
    """Start the child, which raises the walls and then runs the program that it reads from its standard input."""
    machine = platform.machine()
    column = list(sandbox_filter.MACHINES).index(machine)
    inherited = {
        "status": pipes["status"].write_end,
        "report": pipes["report"].write_end,
        "token": pipes["token"].read_end,
    }
    options = {
        **inherited,
        "parent": os.getpid(),
        "folder": folder,
        "stage": stage,
        "files": isolation.files,
        "namespaces": int(isolation.namespaces),
        "filter": sandbox_filter.assemble(machine).hex(),
        "self": sandbox_filter.SELF,
        **{name: numbers[column] for name, numbers in sandbox_filter.SETUP.items()},
        "cpu": limits.cpu_seconds,
        "memory": limits.memory_bytes,
        "threads": limits.threads,
        "file_size": limits.file_bytes,
        "open_files": limits.open_files,
    }
    return subprocess.Popen(
        # No site-packages, and nothing importable but the library.
        [
            *(sys.executable, "-s", "-S", "-P", "-X", "utf8", "-c", _BEGIN, str(Path(__file__).parent)),
            *(f"{name}={value}" for name, value in options.items()),
            *("--", *readable_paths()),
        ],
        stdin=text,
        stdout=pipes["output"].write_end,
        stderr=pipes["output"].write_end,
        # The child removes it again before the program starts.
        env={"PYTHONHASHSEED": "0"},
        cwd="/",
        pass_fds=tuple(inherited.values()),
        start_new_session=True,
    )


@functools.cache
def readable_paths() -> tuple[str, ...]:
    """What exists of the paths that a program may read: Python's library and the system's, without those inside others.

    A link comes along with what it points to, for the new root has to have both.
    """
    python = (os.path.dirname(os.__file__), *(f"{prefix}/lib" for prefix in (sys.base_prefix, sys.base_exec_prefix)))
    found: dict[str, None] = {}
    for path in (*python, *_READABLE):
        if os.path.exists(path):
            found[os.path.abspath(path)] = found[os.path.realpath(path)] = None
    return tuple(
        path for path in found if os.path.islink(path) or not any(path.startswith(f"{other}/") for other in found)
    )


def _watch(run: _Run) -> None:
    """Wait for the end of a program, reading what it writes, or until it has exceeded a limit that only we can see."""
    began = looked = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for pipe in run.pipes:
            selector.register(pipe.read_end, selectors.EVENT_READ, pipe)
        while run.process.poll() is None:
            now = time.monotonic()
            started, _ = _times(run.status.kept)
            left = began + _SETUP_SECONDS - now if started is None else started + run.limits.wall_seconds - now
            if left <= 0:
                if started is not None:
                    run.exceeded = ("timeout", f"more than {run.limits.wall_seconds:g} s of wall-clock time")
                return
            if now - looked >= _TICK_SECONDS:
                looked = now
                if _is_full(run.folder, run.limits):
                    run.exceeded = (
                        "file",
                        f"more than {run.limits.folder_bytes} bytes or too many files in its folder",
                    )
                    return
            if not selector.get_map():  # everybody who could write has ended
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.process.wait(_TICK_SECONDS)
                continue
            for key, _ in selector.select(min(_TICK_SECONDS, left)):
                if not key.data.drain():
                    selector.unregister(key.fileobj)


def _times(status: bytes) -> tuple[float | None, float | None]:
    """When the program began and when it ended, as far as that is known, on the clock that all processes share."""
    times = {line.split()[0]: float(line.split()[1]) for line in status.splitlines(keepends=True) if line[-1:] == b"\n"}
    return times.get(b"ready"), times.get(b"end")


def _is_full(folder: Path, limits: Limits) -> bool:
    size = count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # removed while we look
                size += entry.stat(follow_symlinks=False).st_blocks * 512
            count += 1
            if size > limits.folder_bytes or count > limits.folder_files:
                return True
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the child, which ends and reaps the program first; nothing is left of either when this returns."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # what is below it dies with it
    process.wait()


def _judge(status: bytes, report: bytes, token: bytes, source: str, limits: Limits) -> tuple[Kind, str]:
    """Verdict and detail, from what the waiting process and the program itself wrote.

    Only the first can be trusted. The second can at most exchange one failure for another, for it lacks the token.
    """
    ends = [line.split() for line in status.splitlines() if line.startswith(b"end ")]
    if not ends:
        raise EvaluationError("the sandbox was killed from outside while a program ran in it: run it again")
    wait_status, cpu_seconds = int(ends[0][2]), float(ends[0][3])
    if os.WIFSIGNALED(wait_status):
        number = os.WTERMSIG(wait_status)
        if number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_seconds >= limits.cpu_seconds):
            return "timeout", f"more than {limits.cpu_seconds} s of processor time"
        return "crash", f"killed by {signal.Signals(number).name}"
    if report == b"passed " + token and wait_status == 0:
        return "passed", ""
    kind, line, text = _parse(report)
    if kind is None:
        return "unfinished", f"left with exit status {os.waitstatus_to_exitcode(wait_status)} before its last line"
    lines = source.splitlines()
    where = f" (line {line}: {lines[line - 1].strip()})" if 0 < line <= len(lines) else ""
    return kind, text[: _DETAIL_CHARACTERS // 2] + where


def _parse(report: bytes) -> tuple[Kind | None, int, str]:
    """Kind, line and text of a report; no kind if there is none that a program may claim."""
    kind, _, rest = report.decode(errors="replace").partition(" ")
    line, _, text = rest.partition(" ")
    for known in get_args(Kind):
        if kind == known != "passed" and line.isdecimal():
            return known, int(line), text
    return None, 0, ""
