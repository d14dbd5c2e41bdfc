"""A command's wall time, and the processor time of it with all its descendants: on a busy machine only the latter
says what it costs. Ray's processes are descendants of the driver that starts a local Ray."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

_EVERY_SECONDS = 0.2  # what a descendant computes between the last look at it and its end is not seen


def timed(
    command: Sequence[str], *, root: Path, log: Path, threads: int = 1, variables: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Run to the end, without an accelerator: `seconds` and `cpu_seconds`.

    Raises:
        CalledProcessError: it failed; why stands in `log`.
    """
    given = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    with log.open("a") as stream:
        began = time.perf_counter()
        process = _start(command, root, given | dict(variables or {}), stream)
        spent: dict[tuple[int, float], float] = {}
        # The wait for the process's end is what paces the looks, so that the end itself is seen at once.
        while process.poll() is None:
            _look(process.pid, spent)
            try:
                process.wait(_EVERY_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        seconds = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"seconds": seconds, "cpu_seconds": sum(spent.values())}


def _start(command: Sequence[str], root: Path, given: Mapping[str, str], stream: IO[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=root, env=os.environ | given, stdout=stream, stderr=stream)


def _look(process_id: int, spent: dict[tuple[int, float], float]) -> None:
    """Note what each process of the tree has computed so far."""
    try:
        top = psutil.Process(process_id)
        tree = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            times = process.cpu_times()
            spent[process.pid, process.create_time()] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
