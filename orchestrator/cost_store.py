"""What jobs took on this node's devices, kept for the next sweep: one small JSON file in the node's cache.

It only makes estimates better, so nothing about it is ever an error: each trouble is a line of warning.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator.cost import LEAST_KEPT_WORK, Observation, Observations
from orchestrator.work import VERSION

_KEPT = 64  # jobs per device and kind of work, the latest ones
_LOCK_SECONDS = 5


def observations_file(cache: Path) -> Path:
    """Where they are, under the node's cache."""
    return cache / "observed-rates.json"


def read_observations(path: Path) -> tuple[Observations, str | None]:
    """What earlier sweeps saw, and a warning where the file cannot be used; nothing of an older way to count work."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            return Observations(), None
        seen = {
            str(device): {
                str(kind): {str(job): _rate(rate) for job, rate in jobs.items()} for kind, jobs in kinds.items()
            }
            for device, kinds in document["devices"].items()
        }
    except FileNotFoundError:
        return Observations(), None
    except OSError as error:
        return Observations(), f"{path} cannot be read ({error.strerror or error}); estimates do without it"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Observations(), f"{path} is damaged and not used for estimates; the next finished run replaces it"
    return Observations(seen), None


def _rate(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no rate")
    return float(value)


def add_observations(path: Path, new: Iterable[Observation]) -> str | None:
    """Merge what a run saw into the file, written beside and renamed; a warning where that fails.

    Jobs of few operations are left out: what they took would mislead the estimate of a larger model.
    """
    new = [item for item in new if item.work >= LEAST_KEPT_WORK]
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_SECONDS):
            merged = read_observations(path)[0].plus(new)
            devices = {
                device: {kind: dict(list(jobs.items())[-_KEPT:]) for kind, jobs in kinds.items()}
                for device, kinds in merged.seen.items()
            }
            scratch.write_text(json.dumps({"version": VERSION, "devices": devices}, indent=1), encoding="utf-8")
            scratch.replace(path)
    except Timeout:
        return f"{path} is held by another process; what this run took is not kept for later estimates"
    except OSError as error:
        with suppress(OSError):  # it may be the directory that is no directory
            scratch.unlink()
        return (
            f"{path} cannot be written ({error.strerror or error}); what this run took is not kept for later estimates"
        )
    return None
