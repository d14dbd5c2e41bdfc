"""RayPool on a real local Ray, with a worker that knows nothing of quantization."""

import os
import time

import pytest

from cluster.errors import ClusterError
from cluster.ray_pool import RayPool
from cluster.session import ray_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


class EchoWorker:
    """Does what the payload says."""

    def __init__(self, *, device, threads, report):
        self.device, self.threads, self.report = device, threads, report

    def run(self, payload):
        if "sleep" in payload:
            self.report(f"sleeping {payload['sleep']}")
            time.sleep(payload["sleep"])
        if "raise" in payload:
            raise payload["raise"]
        if "die" in payload:
            os._exit(9)
        return {"ids": self.device.ids, "torch_device": self.device.torch_device, "threads": self.threads,
                "echo": payload.get("echo"), "omp": os.environ.get("OMP_NUM_THREADS")}  # fmt: skip


def complete(pool, count=1, seconds=60):
    completions, deadline = [], time.monotonic() + seconds
    while len(completions) < count:
        assert time.monotonic() < deadline
        completions += pool.wait(1.0)
        pool.activity()
    return completions


@pytest.fixture(scope="module")
def pool():
    with ray_session(device="simulated-npu", count=2, threads=1) as session:
        assert session.kind.simulated
        assert "127.0.0.1" in session.dashboard
        pool = RayPool(session, "tests.cluster.test_ray_pool:EchoWorker")
        yield pool
        pool.close()


def test_each_worker_owns_one_npu(pool):
    workers = sorted(pool.workers)
    assert [worker.partition("@")[0] for worker in workers] == ["simulated-npu-0", "simulated-npu-1"]
    for worker in workers:
        pool.submit(worker, {"echo": worker})
    results = {completion.worker: completion.result for completion in complete(pool, 2)}
    assert {result["ids"] for result in results.values()} == {("0",), ("1",)}
    assert all(result["echo"] == worker for worker, result in results.items())
    assert {(result["torch_device"], result["threads"], result["omp"]) for result in results.values()} == {
        ("cpu", 1, "1")
    }


def test_an_exception_becomes_a_failure(pool):
    worker = min(pool.workers)
    pool.submit(worker, {"raise": MemoryError("no room")})
    (completion,) = complete(pool)
    assert completion.failure.kind == "out_of_memory"
    assert completion.failure.message == "no room"
    assert "Traceback" in completion.failure.detail


def test_activity_is_seen_while_a_job_runs(pool):
    worker = min(pool.workers)
    pool.submit(worker, {"sleep": 4.0})
    seen, ended = set(), []
    while not ended:
        ended = pool.wait(0.2)
        seen.add(pool.activity().get(worker, ""))
    assert "sleeping 4.0" in seen


def test_a_lost_worker_is_replaced_and_takes_jobs_again(pool):
    worker = min(pool.workers)
    before = pool.workers[worker].process_id
    pool.submit(worker, {"die": True})
    (completion,) = complete(pool)
    assert completion.failure.kind == "worker_lost"
    assert str(before) in completion.failure.message
    assert pool.workers[worker].process_id != before
    pool.submit(worker, {"echo": 7})
    assert complete(pool)[0].result["echo"] == 7


def test_more_workers_than_devices_is_refused(pool):
    """On the Ray that the fixture started."""
    import ray

    from cluster import session

    with pytest.raises(ClusterError, match="has room for 2"):
        session._count(session.KINDS["simulated-npu"], 3, 1, ray.cluster_resources())
    with pytest.raises(ClusterError, match="no GPU"):
        session._settle("cuda", ray.cluster_resources())


def test_actors_are_named_by_device(pool):
    """Last: the first worker was lost and replaced."""
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address  # there may be other Rays on this machine
    actors = {actor.name: actor for actor in list_actors(address, detail=True) if actor.class_name == "_Actor"}
    assert set(actors) == {"simulated-npu-0", "simulated-npu-0 (2)", "simulated-npu-1"}
    assert {actor.repr_name for actor in actors.values()} == set(pool.workers)
    assert actors["simulated-npu-0"].state == "DEAD"
