"""Peak memory of one job."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path


def give_back_freed_memory() -> None:
    """Let the system have what this process has freed, and what nothing but cycles of references holds.

    glibc keeps freed blocks below 32 MB for later, in pieces that later blocks may not fit: a worker that put one
    artifact after another into a model of 2.3 GB peaked at 6.0 to 7.3 GB. Elsewhere than on glibc nothing is done.
    """
    gc.collect()  # a part of a second: for between artifacts, not for between batches
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory:
    """Measures the most memory used between entering and leaving, in bytes: of the device where there is one, else
    this process's resident set (Linux: the kernel's high-water mark, reset on entering). None where it is not known."""

    def __init__(self, torch_device: str) -> None:
        """Name the device."""
        self._device = torch_device
        self.peak_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        """Reset the mark."""
        if self._device == "cpu":
            try:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            except OSError:  # some containers forbid it: then the peak of one job is not known
                self._device = "unknown"
        else:
            import torch

            torch.get_device_module(self._device).reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        """Read the mark."""
        if self._device == "cpu":
            status = Path("/proc/self/status").read_text(encoding="ascii")
            found = re.search(r"VmHWM:\s+(\d+) kB", status)
            self.peak_bytes = int(found.group(1)) * 1024 if found else None
        elif self._device != "unknown":
            import torch

            # `torch.npu` counts as `torch.cuda` does; not run on hardware.
            self.peak_bytes = int(torch.get_device_module(self._device).max_memory_allocated())
