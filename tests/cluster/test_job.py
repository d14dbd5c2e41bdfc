"""Inside a submitted Ray job, or not."""

import json
from pathlib import Path

import pytest

from cluster import session
from cluster.errors import ClusterError
from cluster.job import SurroundingJob, is_in_a_copy, surrounding_job
from cluster.session import ray_session

CONFIG = json.dumps({"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1", "job_name": "raysubmit_1"}})
INSIDE = {"RAY_JOB_CONFIG_JSON_ENV_VAR": CONFIG, "RAY_ADDRESS": "10.0.0.1:6379"}


def test_inside():
    assert surrounding_job(INSIDE) == SurroundingJob(address="10.0.0.1:6379", submission="raysubmit_1")


@pytest.mark.parametrize(
    "changes",
    [
        {"RAY_JOB_CONFIG_JSON_ENV_VAR": None},  # an address left over in a shell
        {"RAY_ADDRESS": None},
        {"RAY_ADDRESS": ""},
        {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{"},
        {"RAY_JOB_CONFIG_JSON_ENV_VAR": "[]"},
        {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {}}'},
        {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {}}'},
    ],
)
def test_outside(changes):
    environment = {name: value for name, value in (INSIDE | changes).items() if value is not None}
    assert surrounding_job(environment) is None


def test_the_variables_are_ray_s():
    from ray._private import ray_constants
    from ray._private.runtime_env import constants

    assert set(INSIDE) == {constants.RAY_JOB_CONFIG_JSON_ENV_VAR, ray_constants.RAY_ADDRESS_ENVIRONMENT_VARIABLE}


@pytest.mark.parametrize(
    ("inside", "address", "asked"), [(True, None, "10.0.0.1:6379"), (True, "other:1", "other:1"), (False, None, None)]
)
def test_a_session_joins_the_cluster_of_its_job_unless_told_otherwise(monkeypatch, inside, address, asked):
    for name, value in INSIDE.items():
        monkeypatch.setenv(name, value)
    if not inside:
        monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    seen = []

    def connect(device, count, threads, per_device, address):
        seen.append(address)
        raise ClusterError("far enough")

    monkeypatch.setattr(session, "_connect", connect)
    with (
        pytest.raises(ClusterError, match="far enough"),
        ray_session(device="cpu", count=1, threads=1, address=address),
    ):
        pass
    assert seen == [asked]


def test_a_job_s_copy_of_its_directory_is_told_from_other_places(tmp_path, monkeypatch):
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    assert is_in_a_copy(copy / "outputs" / "study")
    assert not is_in_a_copy(tmp_path / "session_1" / "working_dir_files" / "study")
    assert not is_in_a_copy(Path("outputs/study"))
    monkeypatch.chdir(copy)
    assert is_in_a_copy(Path("outputs/study"))
