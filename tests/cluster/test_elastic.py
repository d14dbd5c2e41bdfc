"""RayPool on a real cluster whose nodes join and leave."""

import os
import signal
import time
from contextlib import closing

import pytest

from cluster.errors import ClusterError
from cluster.ray_pool import RayPool
from cluster.session import ray_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def made():
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "dashboard_port": 0}
    )
    made.add_node(num_cpus=2, resources={"NPU": 1})
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def pool(made):
    with (
        ray_session(device="simulated-npu", count="auto", threads=1, address=made.address) as session,
        closing(RayPool(session, "tests.cluster.test_ray_pool:EchoWorker")) as pool,
    ):
        assert not session.is_local
        yield pool


def until(condition, pool, seconds=90):
    """Tend the pool until something is so; what came back meanwhile."""
    completions, deadline = [], time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        completions += pool.wait(0.2)
    return completions


def test_a_node_that_joins_brings_its_workers_and_one_that_leaves_loses_nothing(made, pool):
    (first,) = pool.workers
    pool.changes()
    node = made.add_node(num_cpus=2, resources={"NPU": 2})
    until(lambda: len(pool.workers) == 3, pool)
    joined = [change.worker.name for change in pool.changes() if change.reason is None]
    assert sorted(joined) == sorted(set(pool.workers) - {first})
    assert len({name.partition("@")[2] for name in pool.workers}) == 2  # two hosts, though they share an address

    busy, idle = joined
    pool.submit(first, {"sleep": 5.0, "echo": "stays"})
    pool.submit(busy, {"sleep": 120.0})
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    done = until(lambda: len(pool.workers) == 1 and pool._workers[first].job is None, pool)
    completions = {completion.worker: completion for completion in done}
    assert completions[first].result["echo"] == "stays"
    assert completions[busy].failure.kind == "node_lost"
    assert "with its node" in completions[busy].failure.message
    assert {(change.worker.name, change.reason.kind) for change in pool.changes()} == {
        (busy, "node_lost"),
        (idle, "node_lost"),
    }
    made.remove_node(node, allow_graceful=False)
    pool.submit(first, {"echo": "goes on"})
    assert until(lambda: pool._workers[first].job is None, pool)[0].result["echo"] == "goes on"


def test_a_limit_holds_however_many_nodes_join(made):
    with (
        ray_session(device="simulated-npu", count=1, threads=1, address=made.address) as session,
        closing(RayPool(session, "tests.cluster.test_ray_pool:EchoWorker")) as pool,
    ):
        node = made.add_node(num_cpus=2, resources={"NPU": 2})
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            pool.wait(0.2)
        assert len(pool.workers) == 1
        assert not pool._starting
    made.remove_node(node)


def test_without_any_worker_left_the_pool_says_so(made, pool, monkeypatch):
    monkeypatch.setattr("cluster.ray_pool._GIVE_UP_SECONDS", 2.0)
    monkeypatch.setattr(pool, "_place", lambda: None)  # nothing comes back
    (worker,) = pool.workers
    os.kill(pool.workers[worker].process_id, signal.SIGKILL)
    with pytest.raises(ClusterError, match="no worker is left and none has come back: the cluster has lost them all"):
        until(lambda: False, pool)
