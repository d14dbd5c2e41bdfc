"""Requests on a pool whose workers fail, are lost and come back."""

import threading

import numpy as np
import pytest

from cluster.failures import Failure
from cluster.pool import Completion, WorkerInfo
from orchestrator.errors import BitatlasError
from orchestrator.search.crew import Crew, InterruptedSearchError
from orchestrator.search.space import Space
from orchestrator.search.worker import Request, Setting

SETTING = Setting(key="k", model={}, space=Space(()), artifacts={}, windows=np.zeros((1, 2), dtype=np.int64))
REQUESTS = [Request(mixture=(index,), windows=(0, 1)) for index in range(20)]


class ScriptedPool:
    """Workers answer at once, but for what `fail` says of (worker, payload, how many jobs it had before)."""

    def __init__(self, workers, fail=lambda worker, payload, count: None):
        self.workers = {name: WorkerInfo(name=name, device="cpu", process_id=1) for name in workers}
        self.all = dict(self.workers)
        self.fail, self.jobs, self.had = fail, [], dict.fromkeys(workers, 0)

    def submit(self, worker, payload):
        assert worker in self.workers
        assert worker not in {busy for busy, _ in self.jobs}
        self.jobs.append((worker, payload))

    def wait(self, seconds):
        done = []
        for worker, payload in self.jobs:
            failure = self.fail(worker, payload, self.had[worker])
            self.had[worker] += 1
            if failure and failure.kind == "worker_lost":
                del self.workers[worker]
            result = {"losses": [[(float(request.mixture[0]), 0.0)] * 2 for request in payload["requests"]]}
            done.append(Completion(worker=worker, result=None if failure else result, failure=failure, seconds=0.1))
        self.jobs = []
        if not self.workers:
            self.workers.update(self.all)
        return done

    def changes(self):
        return []


def test_answers_come_in_order_and_every_worker_works():
    pool, told = ScriptedPool(["a", "b", "c"]), []
    crew = Crew(pool, SETTING, stop=threading.Event(), told=told.append)
    found = crew.measure(REQUESTS, "x")
    assert [losses[0][0] for losses in found] == [float(index) for index in range(20)]
    assert sum(told) == 40
    assert all(pool.had.values())


def test_lost_workers_cost_nothing_but_time():
    lost = []

    def fail(worker, payload, count):
        if count == 1 and worker not in lost:
            lost.append(worker)
            return Failure(kind="worker_lost", message=f"worker {worker} was lost")
        return None

    found = Crew(ScriptedPool(["a", "b"], fail), SETTING, stop=threading.Event()).measure(REQUESTS, "x")
    assert sorted(lost) == ["a", "b"]
    assert [losses[0][0] for losses in found] == [float(index) for index in range(20)]


def test_a_request_that_always_fails_ends_the_search_with_a_sentence():
    def fail(worker, payload, count):
        poisoned = any(request.mixture == (7,) for request in payload["requests"])
        return Failure(kind="worker_lost", message=f"worker {worker} was lost") if poisoned else None

    with pytest.raises(BitatlasError, match=r"quarantined: brought down 3 workers.*run the same command again"):
        Crew(ScriptedPool(["a", "b"], fail), SETTING, stop=threading.Event()).measure(REQUESTS, "x")


def test_out_of_memory_is_tried_with_less():
    shares = []

    def fail(worker, payload, count):
        shares.append(payload["memory_share"])
        return Failure(kind="out_of_memory", message="no memory") if payload["memory_share"] == 1.0 else None

    Crew(ScriptedPool(["a"], fail), SETTING, stop=threading.Event()).measure(REQUESTS[:1], "x")
    assert shares == [1.0, 0.5]


def test_it_stops_when_told():
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedSearchError):
        Crew(ScriptedPool(["a"]), SETTING, stop=stop).measure(REQUESTS, "x")
