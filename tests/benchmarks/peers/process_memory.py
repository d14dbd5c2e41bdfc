"""A process's memory as Linux counts it; for the peers' Pythons too, so it imports nothing but the standard library."""

from __future__ import annotations

from pathlib import Path


def status_bytes(pid: int | str, field: str) -> int | None:
    """A size from /proc/PID/status, in bytes; None where it is not there (the process has just ended)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None


def peak_rss_bytes() -> int | None:
    """The largest resident set of this process, VmHWM: ru_maxrss would hold the parent's from before exec."""
    return status_bytes("self", "VmHWM")
