"""A running cluster is asked node by node; clocks are compared without trusting the way."""

import pytest

from cluster.errors import ClusterError
from cluster.survey import clock_off, survey
from cluster.witness import Witness


@pytest.mark.parametrize(
    ("told", "off"),
    [(100.0, 0.0), (101.5, 0.0), (102.0, 0.0), (112.0, 10.0), (95.0, -5.0)],
)
def test_a_clock_is_off_by_what_the_way_cannot_explain(told, off):
    assert clock_off(told, 100.0, 102.0) == off


def test_nobody_answers():
    with pytest.raises(ClusterError, match="not HOST:PORT"):
        survey("nowhere")


@pytest.fixture(scope="module")
def address():
    """A node with a core, and one with made-up NPUs and none."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "dashboard_port": 0}
    )
    made.add_node(num_cpus=0, resources={"NPU": 4})
    made.wait_for_nodes()
    yield made.address
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_node_tells_of_itself(address, tmp_path):
    file = tmp_path / "witness"
    file.write_text("token")
    nodes = survey(address, Witness(path=str(file), token="token"))
    assert len(nodes) == 2
    assert sorted(node.resources.get("NPU", 0) for node in nodes) == [0, 4]
    assert len({node.name for node in nodes}) == 2
    for node in nodes:
        assert (node.silence, node.sees_witness, node.clock_off_seconds) == ("", True, 0.0)
        assert node.machine.torch.startswith("2.")
