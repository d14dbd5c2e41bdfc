"""Where workers live and how they are called."""

import pytest

from cluster.devices import KINDS
from cluster.placement import Node, name_hosts, places


def node(name, address="10.0.0.1", **resources):
    return Node(id=name, address=address, resources={"CPU": 64.0} | resources)


def names(nodes, kind="npu", **options):
    return [place.name for place in places(nodes, name_hosts(nodes, {}), KINDS[kind], **options)]


def test_a_place_per_device_on_nodes_of_any_size():
    nodes = [node("a", NPU=2.0), node("b", "10.0.0.2"), node("c", "10.0.0.3", NPU=1.0)]
    assert names(nodes) == ["npu-0@10.0.0.1", "npu-1@10.0.0.1", "npu-0@10.0.0.3"]
    assert [place.node_id for place in places(nodes, name_hosts(nodes, {}), KINDS["npu"])] == ["a", "a", "c"]


def test_a_limit_takes_the_first():
    assert names([node("a", NPU=2.0), node("b", "10.0.0.2", NPU=2.0)], limit=3) == [
        "npu-0@10.0.0.1",
        "npu-1@10.0.0.1",
        "npu-0@10.0.0.2",
    ]


def test_workers_that_share_a_device():
    assert names([node("a", GPU=2.0)], "cuda", per_device=2) == [
        f"cuda-{slot}@10.0.0.1" for slot in ("0.0", "0.1", "1.0", "1.1")
    ]


@pytest.mark.parametrize(("threads", "count"), [(1, 5), (2, 2), (6, 0)])
def test_cores_go_to_cpu_workers_by_their_threads(threads, count):
    assert len(names([node("a", CPU=5.0)], "cpu", threads=threads)) == count


def test_a_worker_needs_its_cores_beside_its_device():
    assert len(names([node("a", NPU=8.0, CPU=6.0)], threads=2)) == 3


def test_nodes_with_one_address_are_told_apart_and_keep_their_names():
    first, second = node("abcdefgh", NPU=1.0), node("ijklmnop", NPU=1.0)
    hosts = name_hosts([first, second], {})
    assert hosts == {"abcdefgh": "10.0.0.1", "ijklmnop": "10.0.0.1-ijklmn"}
    assert name_hosts([second], hosts) == {"ijklmnop": "10.0.0.1-ijklmn"}
    third = node("qrstuvwx", NPU=1.0)  # the first one, started again
    assert name_hosts([third, second], hosts) == {"ijklmnop": "10.0.0.1-ijklmn", "qrstuvwx": "10.0.0.1"}
