"""The file by which workers tell whether they see the output directory."""

import os

import pytest

from cluster.witness import Witness
from orchestrator.claim import claim_output
from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout
from orchestrator.witness import is_witness, left_witness, remove_other_witnesses


def test_it_is_seen_while_it_is_there_and_leaves_nothing(tmp_path):
    root = tmp_path / "deep" / "out"
    with left_witness(root) as witness:
        assert witness.is_seen
        (file,) = root.iterdir()
        assert is_witness(file)
        file.write_text("another machine's")
        assert not witness.is_seen
        file.write_bytes(b"\xff")
        assert not witness.is_seen
    assert not witness.is_seen
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_that_name_elsewhere_is_not_it(tmp_path):
    with left_witness(tmp_path / "out") as witness:
        assert not Witness(path=witness.path, token="0" * 32).is_seen
        assert not Witness(path=str(tmp_path / "nowhere"), token=witness.token).is_seen


def test_what_came_into_the_directory_stays(tmp_path):
    with left_witness(tmp_path / "out"):
        (tmp_path / "out" / "sweep.yaml").touch()
    assert os.listdir(tmp_path / "out") == ["sweep.yaml"]


def test_what_a_killed_driver_left_is_no_obstacle_and_is_removed(tmp_path, make_sweep):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".witness-00000000").touch()
    claim_output(Layout(out), make_sweep())
    with left_witness(out) as witness:
        remove_other_witnesses(witness)
        assert witness.is_seen
        assert len(os.listdir(out)) == 1
    assert os.listdir(out) == []


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(BitatlasError, match=r"cannot write into .*file/out \(.*\); choose another --out"),
        left_witness(tmp_path / "file" / "out"),
    ):
        pass
