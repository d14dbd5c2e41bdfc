"""A rendering is written whole or not at all, and never over what a person changed."""

import errno
import json
from pathlib import Path

import pytest
import yaml

from orchestrator.deployment import MARKER, render_cluster
from orchestrator.errors import BitatlasError

HOSTS = {
    "name": "atlas",
    "shared_directory": "/shared",
    "bare_metal": {"ssh_user": "me", "nodes": [{"address": "10.0.0.1", "npus": 8}]},
}
UP = "bare-metal/ray-up.yaml"


@pytest.fixture
def render(tmp_path):
    """Render a description, with changes, into `to`."""

    def run(to=None, **changes):
        file = tmp_path / "cluster.yaml"
        file.write_text(yaml.safe_dump(HOSTS | changes))
        return render_cluster(file, to or tmp_path / "to")

    return run


def contents(directory):
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def left(tmp_path):
    """Names of what is beside the description."""
    return lambda: sorted(path.name for path in tmp_path.iterdir() if path.name != "cluster.yaml")


def test_it_is_written_with_parents_and_ordinary_permissions(render, tmp_path, left):
    to = tmp_path / "a" / "b"
    names = render(to)
    assert names == ("STEPS.md", UP, "bare-metal/prometheus.yml")
    assert set(contents(to)) == {*names, MARKER}
    assert set(json.loads((to / MARKER).read_text())["files"]) == set(names)
    assert (to.stat().st_mode & 0o777, (to / UP).stat().st_mode & 0o777) == (0o755, 0o644)
    assert left() == ["a"]


def test_rendering_again_brings_the_new_and_removes_the_old(render, tmp_path, left):
    render()
    first = contents(tmp_path / "to")
    render()
    assert contents(tmp_path / "to") == first
    render(monitoring=False, name="other")
    again = contents(tmp_path / "to")
    assert set(first) - set(again) == {"bare-metal/prometheus.yml"}
    assert "cluster_name: other" in again[UP]
    assert left() == ["to"]


def test_an_empty_directory_will_do(render, tmp_path):
    (tmp_path / "to" / "empty").mkdir(parents=True)
    render()
    assert UP in contents(tmp_path / "to")


def test_a_link_stays_a_link(render, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "to").symlink_to("real")
    render()
    render(name="other")
    assert (tmp_path / "to").is_symlink()
    assert "cluster_name: other" in contents(tmp_path / "real")[UP]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda to: (to / UP).write_text("mine"),
            r"ray-up.yaml was changed since it was rendered; put the change into",
        ),
        (lambda to: (to / "notes").touch(), r"holds notes, which no rendering wrote; move it away"),
        (lambda to: (to / "link").symlink_to("nowhere"), r"holds link, which no rendering wrote"),
        (lambda to: (to / MARKER).unlink(), r"holds something else than a rendering; give a new or empty directory"),
        (lambda to: (to / MARKER).write_text("[]"), r"holds something else than a rendering"),
        (lambda to: (to / MARKER).write_text('{"by": "x", "files": {}}'), r"holds something else than a rendering"),
    ],
)
def test_what_a_person_did_is_not_overwritten(render, tmp_path, left, spoil, sentence):
    render()
    spoil(tmp_path / "to")
    before = contents(tmp_path / "to")
    with pytest.raises(BitatlasError, match=sentence):
        render(name="other")
    assert contents(tmp_path / "to") == before
    assert left() == ["to"]


def test_what_cannot_be_read_is_not_overwritten(render, tmp_path, monkeypatch):
    render()

    def unreadable(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    with pytest.raises(BitatlasError, match=r"--to .*to cannot be read \(Permission denied\)"):
        render()


def test_a_removed_file_is_written_again(render, tmp_path):
    render()
    (tmp_path / "to" / UP).unlink()
    render()
    assert UP in contents(tmp_path / "to")


def test_a_file_in_the_way(render, tmp_path):
    (tmp_path / "to").write_text("x")
    with pytest.raises(BitatlasError, match=r"--to .*to is a file; give a directory"):
        render()
    with pytest.raises(BitatlasError, match=r"cannot write .*/to/in \((Not a directory|File exists)\)"):
        render(tmp_path / "to" / "in")
    assert (tmp_path / "to").read_text() == "x"


def test_a_disk_that_fills_leaves_what_was_there(render, tmp_path, left, monkeypatch):
    render()
    before = contents(tmp_path / "to")
    rename = Path.rename

    def full(path, target):
        if path.name == "new":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(BitatlasError, match=r"cannot write .*to \(No space left on device\)"):
        render(name="other")
    assert contents(tmp_path / "to") == before
    assert left() == ["to"]
