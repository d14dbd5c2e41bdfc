"""The metrics actor on a real local Ray; and that its slowness and its death disturb nobody."""

import os
import signal
import time
import urllib.request

import pytest

from cluster.errors import ClusterError
from cluster.metrics import Snapshot
from cluster.metrics_actor import MetricsSink
from cluster.session import ray_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def session():
    with ray_session(device="cpu", count=1, threads=1) as session:
        assert session.joined is None
        yield session


@pytest.fixture
def make_sink(session):
    sinks = []

    def make(name):
        sinks.append(MetricsSink(name))
        return sinks[-1]

    yield make
    for sink in sinks:
        sink.close()


def snapshot(sweep, number):
    return Snapshot(
        gauges={"bitatlas_jobs": {(sweep, "running"): number}},
        counters={"bitatlas_retries": {(sweep, "error"): number}},
        observed={"bitatlas_stage_seconds": [((sweep, "arc_easy"), float(number))]},
    )


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def actor_process(name):
    """Once it runs."""
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address  # there may be other Rays on this machine

    def alive():
        actors = list_actors(address, detail=True)
        return [actor.pid for actor in actors if (actor.name, actor.state) == (name, "ALIVE")]

    wait_until(alive)
    return alive()[0]


def at_the_endpoint(name, sweep):
    import ray

    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    ours = [line for line in lines if line.startswith(f"ray_{name}{{") and f'sweep="{sweep}"' in line]
    return [float(line.rpartition(" ")[2]) for line in ours]


def test_a_snapshot_is_at_the_endpoint(make_sink):
    sink = make_sink("metrics a")
    assert sink.send(snapshot("a", 3))
    wait_until(lambda: sink.send(snapshot("a", 5)))
    wait_until(lambda: at_the_endpoint("bitatlas_retries_total", "a") == [5.0])
    assert at_the_endpoint("bitatlas_jobs", "a") == [5.0]


def test_sending_never_waits_and_loses_nothing(make_sink):
    sink = make_sink("metrics b")
    process = actor_process("metrics b")
    os.kill(process, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert [sink.send(snapshot("b", number)) for number in (1, 2, 3)] == [True, False, False]
        assert time.monotonic() - began < 1
    finally:
        os.kill(process, signal.SIGCONT)
    wait_until(lambda: sink.send(Snapshot()))
    wait_until(lambda: at_the_endpoint("bitatlas_stage_seconds_count", "b") == [3.0])
    assert at_the_endpoint("bitatlas_stage_seconds_sum", "b")[0] > 0


def test_killed_it_comes_back_and_is_told_all_that_was_counted(make_sink):
    sink = make_sink("metrics c")
    first = actor_process("metrics c")
    assert sink.send(snapshot("c", 7))
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: sink.send(snapshot("c", 8)) and actor_process("metrics c") != first)
    wait_until(lambda: sink.send(snapshot("c", 9)))
    wait_until(lambda: at_the_endpoint("bitatlas_retries_total", "c")[-1:] == [9.0])


def test_gone_for_good_it_disturbs_nobody(make_sink):
    sink = make_sink("metrics d")
    actor_process("metrics d")
    sink.close()
    for number in range(3):
        sink.send(snapshot("d", number))
        time.sleep(0.2)
    sink.close()


def test_a_name_that_is_taken_is_told(make_sink):
    make_sink("metrics e")
    actor_process("metrics e")
    with pytest.raises(ClusterError, match="metrics are not exported"):
        make_sink("metrics e")
