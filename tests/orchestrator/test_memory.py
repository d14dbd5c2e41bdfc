"""The peak of a job: seen, and forgotten by the next."""

import mmap
import subprocess
import sys

import pytest

from orchestrator.memory import PeakMemory

MB = 1_000_000


def test_an_allocation_that_is_gone_again_is_seen():
    with PeakMemory("cpu") as before:
        pass
    # Straight from the kernel: an allocator may have 50 MB to spare.
    with PeakMemory("cpu") as during, mmap.mmap(-1, 50 * MB) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
    with PeakMemory("cpu") as after:
        pass
    assert during.peak_bytes - before.peak_bytes == pytest.approx(50 * MB, abs=10 * MB)
    assert after.peak_bytes < during.peak_bytes - 25 * MB


def test_an_exception_leaves_the_measurement():
    memory = PeakMemory("cpu")
    with pytest.raises(ValueError, match="mine"), memory:
        raise ValueError("mine")
    assert memory.peak_bytes > MB


FRAGMENTED = """
import ctypes, re
from pathlib import Path
import torch
from orchestrator.memory import give_back_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024

torch.ones(6_000_000)  # 24 MB, freed at once: from now on glibc serves smaller blocks from its heap
blocks = [torch.ones(250_000) for _ in range(300)]
del blocks[::2]  # every other one: the heap cannot shrink from its end
before = resident()
give_back_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_freed_blocks_between_others_go_back_to_the_system():
    command = [sys.executable, "-c", FRAGMENTED]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(outcome.stdout) > 0.8 * 150 * 1e6
