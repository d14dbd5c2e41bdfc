"""Programs that try to break out, each with the verdict it must get."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from evaluators import sandbox, sandbox_run
from evaluators.sandbox import Limits, run_program

# Every set of walls that this machine offers must give the same verdicts.
OFFERED = [walls for walls in sandbox._CANDIDATES if sandbox.probe().files and sandbox._failure(walls) is None]

pytestmark = pytest.mark.skipif(not OFFERED, reason="this machine cannot hold programs, see sandbox.probe()")

# The wall-clock limit is for tests of its own: a busy machine must not change a verdict.
QUICK = Limits(cpu_seconds=1, wall_seconds=60.0, memory_bytes=512 * 2**20)
ALLOW_ALL = bytes.fromhex("06000000" + "0000ff7f")


def name_of(isolation):
    return f"{isolation.files}-{'namespaces' if isolation.namespaces else 'alone'}"


def processes_of(folder):
    """Those that were started for a program whose folder lies in this one: forks share their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The sandboxes' temporary folder. After each test there is nothing in it, and no process that came from it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert processes_of(folder) == []
    assert list(folder.iterdir()) == []
    assert not [child for child in psutil.Process().children(recursive=True) if child.status() == "zombie"]


# The fast tests run behind the walls that programs get here, the slow ones behind all others that are offered too.
@pytest.fixture(
    params=[
        pytest.param(offered, id=name_of(offered), marks=[pytest.mark.slow] if number else [])
        for number, offered in enumerate(OFFERED)
    ]
)
def run(request):
    return lambda source, limits=QUICK: sandbox_run.run(source, limits, request.param)


@pytest.fixture
def outside(tmp_path):
    """A file that everybody may read and write, as far as its mode goes."""
    tmp_path.chmod(0o777)
    file = tmp_path / "checkpoint"
    file.write_text("weights", encoding="utf-8")
    file.chmod(0o666)
    return file


def test_this_machine_is_used():
    assert sandbox.probe().files == OFFERED[0].files
    assert sandbox.probe().namespaces == OFFERED[0].namespaces


# Programs that do nothing wrong, or are simply wrong.


def test_a_program_passes_and_its_output_is_kept(run):
    verdict = run("import sys\nprint('out')\nsys.stderr.write('err')\nassert 1 + 1 == 2\n")
    assert verdict.passed
    assert (verdict.kind, verdict.detail) == ("passed", "")
    assert sorted(verdict.output.replace("err", "err ").split()) == ["err", "out"]
    assert 0 < verdict.seconds < 5


def test_libraries_of_python_work(run):
    assert run(
        "import bisect, collections, csv, dataclasses, datetime, decimal, enum, fractions, functools, hashlib, heapq\n"
        "import inspect, itertools, json, math, operator, random, re, statistics, string, sqlite3, ssl, typing, zlib\n"
        "import asyncio, concurrent.futures, multiprocessing, subprocess, tempfile, threading, uuid, zoneinfo\n"
        "assert hashlib.md5(b'').hexdigest().startswith('d41d8') and random.random() < 1\n"
        "with concurrent.futures.ThreadPoolExecutor(4) as pool:\n"
        "    assert sum(pool.map(abs, range(100))) == 4950\n"
        "with tempfile.NamedTemporaryFile(dir='.') as file:\n"
        "    assert file.write(b'text') == 4\n"
        "open('/dev/null', 'w').write('text')\n"
        "@dataclasses.dataclass\n"
        "class Point:\n"
        "    x: 'int'\n"
        "assert Point(3) == Point(3) and __name__ != '__main__'\n"
    ).passed


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("x = 1\nassert x == 2", "AssertionError (line 2: assert x == 2)"),
        ("def f():\n    raise ValueError('a\\nb')\nf()", "ValueError: a b (line 2: raise ValueError('a\\nb'))"),
        ("x = 1\nx +", "SyntaxError: invalid syntax (<program>, line 2) (line 2: x +)"),
        ("def f(n):\n    return f(n + 1)\nf(0)", "RecursionError: maximum recursion depth exceeded (line 2"),
        ("input()", "EOFError: EOF when reading a line (line 1: input())"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt (line 1: raise KeyboardInterrupt)"),
        ("class E(Exception):\n  def __str__(self): raise E\nraise E", "E: (its text cannot be had: E) (line 3"),
        ("x = '\ud800'", "SyntaxError"),
        ("x = '\0'", "SyntaxError: source code"),
        ("import os\nos.environ['HOME']", "KeyError: 'HOME' (line 2"),
        ("import os\nassert 'PATH' in os.environ", "AssertionError (line 2"),
        ("raise TypeError('x' * 10**6)", "TypeError: xxxx"),
    ],
)
def test_wrong_programs(source, detail):
    verdict = run_program(source, limits=QUICK)
    assert verdict.kind == "wrong"
    assert verdict.detail.startswith(detail) or (detail.startswith("SyntaxError") and "SyntaxError" in verdict.detail)
    assert len(verdict.detail) <= 300
    assert not verdict.passed


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.exit(0)\nassert False",
        "exit = __import__('os')._exit\nexit(0)\nassert False",
        "import os\nos._exit(3)",
        "raise SystemExit",
        # messages to whoever listens, without the token
        "import os\nfor file in range(3, 64):\n"
        "    for text in (b'passed ', b'passed ' + b'0' * 32, b'ready 1.0\\nend 2.0 0 0.0\\n'):\n"
        "        try:\n            os.write(file, text)\n        except OSError:\n            pass\n"
        "os._exit(0)",
        # nothing left to report to
        "import os\nos.closerange(3, 64)",
    ],
)
def test_who_leaves_before_the_last_line_has_not_passed(run, source):
    assert run(source).kind == "unfinished"


def test_what_a_program_puts_in_the_place_of_ours_is_not_used(run):
    source = "import os, sys, builtins\nos.write = os.read = os._exit = sys.stdout = None\nbuiltins.isinstance = None\n"
    assert run(source).passed
    assert not run(source + "assert False").passed


def test_hashes_of_strings_do_not_change():
    source = "print([hash('text'), list({'a', 'b', 'c', 'd', 'e'})])"
    assert run_program(source).output == run_program(source).output != ""


# Programs that do.


def test_fork_bomb(run):
    verdict = run("import os\nwhile True:\n    os.fork()")
    assert verdict.kind == "processes"
    assert verdict.detail.startswith("BlockingIOError")


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import os\nos.system('true') and os.fork()",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import os\nos.execv('/bin/true', ['true'])",
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n",
        "import os\nos.setpgid(0, 0)",
    ],
)
def test_processes(run, source):
    assert run(source).kind == "processes"


def test_threads_have_a_limit():
    source = (
        "import threading, time\n"
        "for _ in range({}):\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    limits = Limits(threads=8, cpu_seconds=5, wall_seconds=60.0, memory_bytes=2**29)
    assert run_program(source.format(4), limits=limits).passed
    assert run_program(source.format(1000), limits=limits).kind == "processes"


@pytest.mark.parametrize("swallow", ["", "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"])
def test_endless_loop(swallow):
    verdict = run_program(f"{swallow}while True:\n    pass", limits=QUICK)
    assert (verdict.kind, verdict.detail) == ("timeout", "more than 1 s of processor time")
    assert verdict.seconds > 0.5


def test_who_sleeps_and_ignores_signals_is_ended(run):
    source = (
        "import signal, time\n"
        "for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "time.sleep(60)"
    )
    verdict = run(source, Limits(wall_seconds=0.5))
    assert (verdict.kind, verdict.detail) == ("timeout", "more than 0.5 s of wall-clock time")
    assert 0.4 < verdict.seconds < 10


def test_a_stopped_program_is_ended(run):
    assert run("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", Limits(wall_seconds=0.5)).kind == "timeout"


@pytest.mark.parametrize(
    "source",
    ["bytearray(8 * 2**30)", "x = []\nwhile True:\n    x.append(bytes(2**20))", "x = []\nwhile True:\n    x = [x]"],
)
def test_memory(run, source):
    verdict = run(source, Limits(memory_bytes=128 * 2**20, cpu_seconds=5))
    assert (verdict.kind, verdict.detail) == ("memory", "MemoryError")


def test_files_outside_are_neither_read_nor_changed(run, outside):
    before = outside.stat()
    for attempt in (
        "open(path).read()",
        "open(path, 'w')",
        "open(path, 'a')",
        "os.open(path, os.O_RDONLY | os.O_TRUNC)",
        "os.open(path, 3)",
        "os.truncate(path, 0)",
        "os.unlink(path)",
        "os.rename(path, 'mine')",
        "os.chmod(path, 0)",
        "os.chown(path, 0, 0)",
        "os.utime(path)",
        "os.link(path, 'mine')",
        "os.setxattr(path, 'user.x', b'')",
        "open(path + '.new', 'w')",
        "os.mkdir(path + '.new')",
        "assert 'checkpoint' not in os.listdir(os.path.dirname(path))",
        "assert not {'proc', 'sys', 'var', 'boot'} & set(os.listdir('/'))",
        "os.symlink(path, 'mine')",
        "open('/proc/self/environ')",
        f"open('/proc/{os.getpid()}/environ')",
        f"open({str(Path.home() / '.profile')!r})",
        "open('/etc/passwd')",
        "open('/dev/shm/file', 'w')",
        "open(os.__file__, 'a')",
        "os.open('.', os.O_TMPFILE | os.O_RDWR) and open('../new', 'w')",
    ):
        verdict = run(f"import os\npath = {str(outside)!r}\n{attempt}")
        if "listdir" in attempt and verdict.passed:  # in a root of its own, where there is nothing to see
            continue
        assert verdict.kind == "file", (attempt, verdict)
    assert outside.read_text(encoding="utf-8") == "weights"
    after = outside.stat()
    assert (after.st_mode, after.st_mtime, after.st_nlink) == (before.st_mode, before.st_mtime, before.st_nlink)
    assert [file.name for file in outside.parent.iterdir() if file.name.startswith("checkpoint")] == ["checkpoint"]


def test_huge_file(run):
    verdict = run("file = open('huge', 'wb')\nwhile True:\n    file.write(bytes(2**20))", Limits(file_bytes=2**20))
    assert (verdict.kind, verdict.detail[:7]) == ("file", "OSError")
    assert "File too large" in verdict.detail


@pytest.mark.parametrize(("number", "size"), [(10**9, 1), (10**9, 2**20)])
def test_many_files(number, size):
    source = (
        f"for number in range({number}):\n    with open(str(number), 'wb') as file:\n        file.write(bytes({size}))"
    )
    limits = Limits(folder_bytes=2 * 2**20, folder_files=50, wall_seconds=60.0)
    verdict = run_program(source, limits=limits)
    assert (verdict.kind, "in its folder" in verdict.detail) == ("file", True)


def test_open_files(run):
    assert run("files = [open('/dev/null') for _ in range(1000)]").kind == "file"


@pytest.mark.parametrize(
    "source",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
        "import socket\nsocket.socket(socket.AF_UNIX)",
        "import socket\nsocket.socketpair()",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
        "import socket\nsocket.getaddrinfo('example.org', 80)",
    ],
)
def test_network(run, source):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        assert run(source.format(port=server.getsockname()[1])).kind == "network"
        with pytest.raises(BlockingIOError):
            server.accept()


def test_signals_do_not_leave(run):
    received = []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGIO)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        for call in (
            f"os.kill({os.getpid()}, signal.SIGTERM)",
            f"os.killpg({os.getpgrp()}, signal.SIGTERM)",
            f"signal.pidfd_send_signal(os.pidfd_open({os.getpid()}), signal.SIGTERM)",
            "os.kill(-1, signal.SIGTERM)",
            "os.kill(0, signal.SIGTERM)",
            "os.kill(os.getppid(), signal.SIGTERM)",
            f"__import__('resource').prlimit({os.getpid()}, 7, (10, 10))",
        ):
            verdict = run(f"import os, signal\n{call}")
            assert verdict.kind == "signal", (call, verdict)
        own = f"import fcntl, os\nfile = os.pipe()[0]\nfcntl.fcntl(file, fcntl.F_SETOWN, {os.getpid()})"
        assert run(own).kind == "wrong"
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert received == [signal.SIGUSR1]  # ours, so signals would have been seen


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", "SIGTERM"),
        ("import os\nos.abort()", "SIGABRT"),
        ("import ctypes\nctypes.string_at(0)", "SIGSEGV"),
    ],
)
def test_crashes(run, source, name):
    verdict = run(source)
    assert (verdict.kind, verdict.detail) == ("crash", f"killed by {name}")


def test_flood_of_output_is_dropped(run):
    verdict = run("import sys\nfor _ in range(2000):\n    sys.stdout.write('x' * 10000)", Limits(output_bytes=1000))
    assert verdict.passed
    assert verdict.output == "x" * 1000
    assert run("while True:\n    print('x' * 10000)", Limits(wall_seconds=0.5)).kind == "timeout"


def test_other_calls_do_not_exist(run):
    """io_uring, which could do all of this behind the filter's back, and clone3, whose flags a filter cannot read."""
    for number in (425, 435, 99999):
        verdict = run(
            "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            f"assert libc.syscall({number}, 8, ctypes.create_string_buffer(120)) == -1\n"
            "assert ctypes.get_errno() == errno.ENOSYS\n"
        )
        assert verdict.passed, verdict


def test_limits_cannot_be_raised(run):
    source = "import resource\n{}\nresource.setrlimit(resource.RLIMIT_{}, (2**40, 2**40))"
    for name in ("CPU", "AS", "FSIZE", "NOFILE", "CORE"):
        assert run(source.format("", name)).kind == "wrong"  # ValueError: not allowed to raise maximum limit


# The walls behind the first one, and what becomes of the processes.


@pytest.mark.skipif(not any(offered.namespaces for offered in OFFERED), reason="no namespaces here")
def test_namespaces_hold_what_passes_the_filter(monkeypatch):
    """With every system call allowed: a daemon dies with the program, nobody outside is seen, no network is there."""
    isolation = next(offered for offered in OFFERED if offered.namespaces)
    monkeypatch.setattr(sandbox_run.sandbox_filter, "assemble", lambda _: ALLOW_ALL)
    daemon = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(60)\n"
        "    os._exit(0)\n"
    )
    assert sandbox_run.run(daemon + "os.wait()", QUICK, isolation).passed
    assert sandbox_run.run(daemon + "time.sleep(60)", Limits(wall_seconds=0.5), isolation).kind == "timeout"
    verdict = sandbox_run.run(f"import os\nassert os.getpid() < 10\nos.kill({os.getpid()}, 0)", QUICK, isolation)
    assert "ProcessLookupError" in verdict.detail or "PermissionError" in verdict.detail
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert not sandbox_run.run(source, QUICK, isolation).passed


def test_processes_are_there_while_the_program_runs(temporary):
    """So that the fixture's "none is left" says something."""
    thread = threading.Thread(target=run_program, args=("import time\ntime.sleep(1)",))
    thread.start()
    most = 0
    while thread.is_alive():
        most = max(most, len(processes_of(temporary)))
        time.sleep(0.05)
    assert most >= 2


def test_an_interrupted_caller_leaves_nothing(monkeypatch):
    def interrupted(state):
        while sandbox_run._times(state.status.kept)[0] is None:
            state.status.drain()
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox_run, "_watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_program("import time\ntime.sleep(60)")


def test_who_waits_for_the_program_dies_with_the_caller(temporary):
    """A killed caller cannot clean up: the kernel ends what it had started."""
    script = "from evaluators.sandbox import run_program; run_program('import time; time.sleep(60)')"
    caller = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(temporary)})
    while len(processes_of(temporary)) < 2:
        assert caller.poll() is None
        time.sleep(0.02)
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 10
    while processes_of(temporary) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_of(temporary) == []
    for folder in temporary.iterdir():  # the one thing that is left
        shutil.rmtree(folder)
