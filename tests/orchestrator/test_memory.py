"""The peak of a job: seen, and forgotten by the next."""

import mmap

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
