"""RayPool on a real local Ray, with a worker that knows nothing of quantization."""

import os
import signal
import time
from dataclasses import replace

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
        for _ in range(payload.get("steps", 1) if "sleep" in payload else 0):
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


def await_worker(pool, worker, seconds=60):
    deadline = time.monotonic() + seconds
    while worker not in pool.workers:
        assert time.monotonic() < deadline
        assert pool.wait(0.2) == []


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
    pool.changes()
    pool.submit(worker, {"die": True})
    (completion,) = complete(pool)
    assert completion.failure.kind == "worker_lost"
    assert str(before) in completion.failure.message
    await_worker(pool, worker)
    left, joined = pool.changes()
    assert (left.worker.process_id, left.reason.kind) == (before, "worker_lost")
    assert joined.reason is None
    assert pool.workers[worker].process_id == joined.worker.process_id != before
    pool.submit(worker, {"echo": 7})
    assert complete(pool)[0].result["echo"] == 7


def test_an_idle_worker_that_dies_is_replaced(pool):
    worker = min(pool.workers)
    pool.changes()
    os.kill(pool.workers[worker].process_id, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not (changes := pool.changes()):
        assert time.monotonic() < deadline
        assert pool.wait(0.2) == []
    assert changes[0].reason.kind == "worker_lost"
    await_worker(pool, worker)


def test_a_worker_that_hangs_is_ended(pool, monkeypatch):
    """Stopped altogether, so that it answers to nothing, not even to Ray."""
    monkeypatch.setattr(pool, "_stuck_seconds", 3.0)
    worker = min(pool.workers)
    process = pool.workers[worker].process_id
    pool.submit(worker, {"sleep": 60.0})
    os.kill(process, signal.SIGSTOP)
    (completion,) = complete(pool)
    assert completion.failure.kind == "stuck"
    assert "no progress for 3 s" in completion.failure.message
    await_worker(pool, worker)
    deadline = time.monotonic() + 30
    while alive(process):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_job_that_reports_progress_does_not_hang(pool, monkeypatch):
    monkeypatch.setattr(pool, "_stuck_seconds", 3.0)
    worker = min(pool.workers)
    pool.submit(worker, {"steps": 12, "sleep": 0.5})
    assert complete(pool)[0].failure is None


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_does_not_start_again_is_told_and_tried_on(pool, monkeypatch):
    broken = replace(pool._recipe, factory="tests.cluster.test_ray_pool:NoSuchWorker")
    worker = min(pool.workers)
    pool.changes()
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_recipe", broken)
        os.kill(pool.workers[worker].process_id, signal.SIGKILL)
        changes, deadline = [], time.monotonic() + 60
        while len(changes) < 2:
            assert time.monotonic() < deadline
            assert pool.wait(0.2) == []
            changes += pool.changes()
    assert f"worker {worker} did not start: " in changes[1].reason.message
    assert "NoSuchWorker" in changes[1].reason.message
    await_worker(pool, worker)


def test_more_workers_than_devices_is_refused(pool):
    """On the Ray that the fixture started."""
    import ray

    from cluster import session

    with pytest.raises(ClusterError, match="has room for 2"):
        session._count(session.KINDS["simulated-npu"], 3, 1, 1, ray.cluster_resources())
    with pytest.raises(ClusterError, match="no GPU"):
        session._settle("cuda", ray.cluster_resources())


def test_actors_are_named_by_device(pool):
    import ray

    assert set(ray.util.list_named_actors()) == set(pool.workers)
