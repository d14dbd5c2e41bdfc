"""What jobs took, kept between sweeps: merged, bounded, and never a reason to stop."""

import json

import pytest

from orchestrator.cost import Observation, Observations
from orchestrator.cost_store import add_observations, observations_file, read_observations
from orchestrator.work import VERSION


@pytest.fixture
def file(tmp_path):
    return observations_file(tmp_path / "cache")


def one(rate, *, device="card", kind="perplexity", job="a"):
    return Observation(device=device, kind=kind, job_id=job, rate=rate)


def test_nothing_kept_yet(file):
    assert read_observations(file) == (Observations(), None)


def test_merged_by_device_and_kind(file):
    assert add_observations(file, [one(1.0), one(2.0, job="b")]) is None
    assert add_observations(file, [one(3.0), one(4.0, device="other"), one(5.0, kind="task piqa")]) is None
    kept, warning = read_observations(file)
    assert warning is None
    assert kept.seen == {
        "card": {"perplexity": {"b": 2.0, "a": 3.0}, "task piqa": {"a": 5.0}},
        "other": {"perplexity": {"a": 4.0}},
    }
    assert not list(file.parent.glob("*.tmp"))


def test_jobs_of_few_operations_are_not_kept(file):
    """They tell of starts: a tiny model's rates once made days of a larger model's hours."""
    tiny = Observation(device="card", kind="perplexity", job_id="tiny", rate=1e-7, work=1e9)
    large = Observation(device="card", kind="perplexity", job_id="large", rate=1e-11, work=1e12)
    assert add_observations(file, [tiny, large]) is None
    assert read_observations(file)[0].seen == {"card": {"perplexity": {"large": 1e-11}}}


def test_the_latest_jobs_stay(file):
    add_observations(file, [one(1.0, job=f"old {i}") for i in range(60)])
    add_observations(file, [one(2.0, job=f"new {i}") for i in range(10)])
    names = list(read_observations(file)[0].seen["card"]["perplexity"])
    assert (len(names), names[0], names[-1]) == (64, "old 6", "new 9")


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"null",
        json.dumps({"version": VERSION, "devices": []}).encode(),
        json.dumps({"version": VERSION, "devices": {"card": {"perplexity": {"a": -1.0}}}}).encode(),
        json.dumps({"version": VERSION, "devices": {"card": {"perplexity": {"a": "1"}}}}).encode(),
        json.dumps({"version": VERSION, "devices": {"card": {"perplexity": {"a": float("nan")}}}}).encode(),
    ],
)
def test_damage_is_a_warning_and_is_mended(file, damage):
    file.parent.mkdir()
    file.write_bytes(damage)
    kept, warning = read_observations(file)
    assert kept == Observations()
    assert "is damaged and not used" in warning
    assert add_observations(file, [one(1.0)]) is None
    assert read_observations(file) == (Observations({"card": {"perplexity": {"a": 1.0}}}), None)


def test_work_that_was_counted_otherwise_is_left_out_without_a_word(file):
    file.parent.mkdir()
    file.write_text(json.dumps({"version": VERSION + 1, "devices": {"card": {"perplexity": {"a": 1.0}}}}))
    assert read_observations(file) == (Observations(), None)


def test_a_place_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    file = observations_file(tmp_path / "cache")
    assert "cannot be written" in add_observations(file, [one(1.0)])
    directory = tmp_path / "observed"
    directory.mkdir()
    assert "cannot be read" in read_observations(directory)[1]
    assert "cannot be written" in add_observations(directory, [one(1.0)])
    assert not list(tmp_path.glob(".*.tmp"))
