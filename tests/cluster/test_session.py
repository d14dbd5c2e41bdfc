"""Addresses and counts are checked before Ray is asked. No test here starts Ray."""

import socket
import time

import pytest

from cluster import session
from cluster.devices import KINDS
from cluster.errors import ClusterError
from cluster.session import ray_session


def test_nobody_at_the_address_is_said_at_once():
    with socket.socket() as taken:  # bound and not listening: nobody answers, and nobody else can take it
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        began = time.monotonic()
        with (
            pytest.raises(ClusterError) as caught,
            ray_session(device="cpu", count=1, threads=1, address=f"127.0.0.1:{port}"),
        ):
            pass
    assert time.monotonic() - began < 15  # importing ray included
    assert f"nobody answers at --address 127.0.0.1:{port} (Connection refused)" in str(caught.value)
    assert "start one there with `ray start --head`, or leave --address out" in str(caught.value)


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":6379", "localhost:http", "", "10.0.0.1:-1"])
def test_a_malformed_address(address):
    with (
        pytest.raises(ClusterError, match=r"is not HOST:PORT, such as 10.0.0.1:6379"),
        ray_session(device="cpu", count=1, threads=1, address=address),
    ):
        pass


@pytest.mark.parametrize("address", ["localhost:99999", "localhost:²"])
def test_a_port_that_is_none(address):
    with pytest.raises(ClusterError, match="is not HOST:PORT"):
        session._check_answers(address)


def test_an_address_that_answers_is_let_through():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        session._check_answers(f"127.0.0.1:{server.getsockname()[1]}")
    for known_to_ray in ("auto", "local", "ray://head:10001"):
        session._check_answers(known_to_ray)


def test_more_cpu_workers_than_cores():
    with (
        pytest.raises(
            ClusterError, match=r"1000 CPU workers of 2 threads need 2000 cores and this machine has \d+; lower"
        ),
        ray_session(device="cpu", count=1000, threads=2),
    ):
        pass


@pytest.mark.parametrize(
    ("resources", "kind"),
    [
        ({"CPU": 8.0, "NPU": 2.0, "GPU": 1.0}, "npu"),
        ({"CPU": 8.0, "GPU": 1.0}, "cuda"),
        ({"CPU": 8.0}, "cpu"),
        ({"CPU": 8.0, "GPU": 0.0}, "cpu"),
    ],
)
def test_auto_prefers_npus_then_gpus_and_never_simulates(resources, kind):
    assert session._settle("auto", resources) is KINDS[kind]


def test_a_device_the_cluster_lacks_is_refused():
    with pytest.raises(ClusterError) as caught:
        session._settle("npu", {"CPU": 8.0, "GPU": 2.0})
    assert "workers.device = 'npu', but this Ray cluster has no NPU (it has 2 GPU, 8 CPU); use device: auto" in str(
        caught.value
    )


def test_one_worker_per_device_and_threads_per_core():
    resources = {"CPU": 8.0, "NPU": 4.0}
    assert session._count(KINDS["npu"], "auto", 2, 1, resources) == 4
    assert session._count(KINDS["cpu"], "auto", 3, 1, resources) == 2
    assert session._count(KINDS["cpu"], 2, 3, 1, resources) == 2
    with pytest.raises(ClusterError, match=r"workers.count = 3, but this Ray cluster has room for 2 cpu workers"):
        session._count(KINDS["cpu"], 3, 3, 1, resources)
    assert session._count(KINDS["npu"], "auto", 1, 2, resources) == 8
    with pytest.raises(ClusterError, match="per_device = 2 is for accelerators"):
        session._count(KINDS["cpu"], "auto", 1, 2, resources)
    with pytest.raises(ClusterError, match="9 threads per worker do not fit the cluster's 8 cores"):
        session._count(KINDS["cpu"], "auto", 9, 1, resources)
