"""The world as it is here; torch is not loaded again for each test."""

import pytest

from cluster.errors import ClusterError
from cluster.machine import Machine
from cluster.survey import NodeReport
from orchestrator.doctor import gather as gathering
from orchestrator.doctor.gather import gather
from orchestrator.errors import BitatlasError

MACHINE = Machine(name="here", python="3.12.3", cores=2, torch="2.13.0")
NOTHING = {"out": None, "address": None, "workers": None}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(gathering, "look_around", lambda: MACHINE)
    monkeypatch.setattr(gathering, "surrounding_job", lambda: None)


@pytest.fixture
def surveyed(monkeypatch):
    """What a made-up cluster of one node was asked: addresses and witnesses, with whether they were seen then."""
    asked = []

    def survey(address, witness=None):
        asked.append((address, None if witness is None else witness.is_seen))
        return (NodeReport(name="n", sees_witness=None if witness is None else witness.is_seen),)

    monkeypatch.setattr("cluster.survey.survey", survey)
    return asked


def test_without_arguments_it_is_this_machine_alone():
    world = gather(None, **NOTHING)
    assert (world.machine, world.cluster, world.out, world.needs) == (MACHINE, None, None, ())
    assert world.packages["ray"]
    assert world.packaged == {"the packaged model": True, "the packaged data": True}
    assert {place.what for place in world.places} == {"disk", "cache"}
    assert all(place.free_bytes > 0 for place in world.places)
    assert gather(None, **NOTHING | {"address": "local"}).cluster is None


def test_the_directory_is_left_as_it_was(tmp_path, surveyed):
    out = tmp_path / "deep" / "out"
    world = gather(None, **NOTHING | {"out": out, "address": "10.0.0.1:6379"})
    assert surveyed == [("10.0.0.1:6379", True)]
    assert world.cluster.nodes[0].sees_witness
    assert world.out.free_bytes > 0
    assert not world.out.trouble
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path, surveyed):
    (tmp_path / "file").write_text("")
    world = gather(None, **NOTHING | {"out": tmp_path / "file" / "out", "address": "10.0.0.1:6379"})
    assert world.out.trouble.startswith(f"cannot write into {tmp_path / 'file' / 'out'}")
    assert surveyed == [("10.0.0.1:6379", None)]  # all the same


def test_a_directory_in_a_job_s_copy(tmp_path):
    out = tmp_path / "runtime_resources" / "working_dir_files" / "x" / "out"
    assert "which Ray deletes after the job" in gather(None, **NOTHING | {"out": out}).out.trouble


def test_the_cluster_of_the_job_that_this_is(monkeypatch, surveyed):
    job = type("Job", (), {"address": "10.0.0.7:6379"})()
    monkeypatch.setattr(gathering, "surrounding_job", lambda: job)
    assert gather(None, **NOTHING).cluster.address == "10.0.0.7:6379"
    assert surveyed == [("10.0.0.7:6379", None)]


def test_a_cluster_that_does_not_answer(monkeypatch):
    def survey(*_):
        raise ClusterError("nobody answers at --address x:1")

    monkeypatch.setattr("cluster.survey.survey", survey)
    world = gather(None, **NOTHING | {"address": "x:1"})
    assert (world.cluster.nodes, world.cluster.trouble) == ((), "nobody answers at --address x:1")


@pytest.fixture
def sweep_file(tmp_path, make_document):
    import yaml

    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(make_document(workers={"device": "cpu", "count": 3, "strict": False})))
    return file


def test_a_sweep_says_what_it_asks_for(sweep_file):
    world = gather(sweep_file, **NOTHING)
    assert (world.asked.device, world.asked.count, world.asked.strict) == ("cpu", 3, False)
    assert world.needs[0].what == "model tiny"
    assert gather(sweep_file, **NOTHING | {"workers": 7}).asked.count == 7
    with pytest.raises(BitatlasError, match="does not exist"):
        gather(sweep_file.with_name("other.yaml"), **NOTHING)


def test_a_sweep_cannot_be_read_where_torch_does_not_load(sweep_file, monkeypatch):
    broken = Machine(name="here", python="3.12.3", cores=2, torch_error=("RuntimeError: no",))
    monkeypatch.setattr(gathering, "look_around", lambda: broken)
    (need,) = gather(sweep_file, **NOTHING).needs
    assert need.found == "not looked at: torch does not load"
