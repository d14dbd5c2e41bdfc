"""The Ray job that this process is the driver of, if any: started by `ray job submit`, on the cluster it is to join."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Set by Ray's job supervisor for the command that it runs and for nothing else, workers and tasks included; its
# metadata name the submission. RAY_ADDRESS alone proves nothing: it may be left over in a person's shell.
_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_ADDRESS = "RAY_ADDRESS"
_SUBMISSION = "job_submission_id"
# Where Ray unpacks a job's working_dir: a copy, deleted some time after the job.
_COPIES = ("runtime_resources", "working_dir_files")


@dataclass(frozen=True, kw_only=True)
class SurroundingJob:
    """A submitted job, seen from inside.

    Args:
        address: HOST:PORT of its cluster.
        submission: its id, as `ray job list` shows it.
    """

    address: str
    submission: str


def surrounding_job(environment: Mapping[str, str] = os.environ) -> SurroundingJob | None:
    """The job around this process; None outside of one."""
    try:
        submission = json.loads(environment[_CONFIG])["metadata"][_SUBMISSION]
    except (KeyError, TypeError, ValueError):
        return None
    address = environment.get(_ADDRESS)
    return SurroundingJob(address=address, submission=str(submission)) if address else None


def is_in_a_copy(path: Path) -> bool:
    """Whether a path lies in a job's working_dir, which does not outlive the job."""
    parts = path.absolute().parts
    return any(parts[index : index + 2] == _COPIES for index in range(len(parts)))
