"""The inline pool keeps the contract: one job in flight, results as they come, failures as data."""

import time

import pytest

from cluster.pool import InlinePool, attempt
from evaluators.errors import EvaluationError

FACTORY = f"{__name__}:Double"


class Double:
    """A worker that doubles numbers and fails on request."""

    def __init__(self, *, device, threads, report):
        self.device, self.threads, self.report = device, threads, report

    def run(self, payload):
        self.report(f"doubling {payload['number']}")
        if "error" in payload:
            raise payload["error"]
        time.sleep(payload.get("seconds", 0))
        return {"double": 2 * payload["number"], "device": self.device.torch_device, "threads": self.threads}


@pytest.fixture
def pool():
    return InlinePool(FACTORY, threads=3)


def test_one_worker_with_a_device(pool):
    (name,) = pool.workers
    info = pool.workers[name]
    assert info.name == name == "cpu-0@inline"
    assert info.device


def test_a_job_s_result_comes_from_wait(pool):
    (name,) = pool.workers
    pool.submit(name, {"number": 21, "seconds": 0.05})
    (completion,) = pool.wait(1.0)
    assert completion.worker == name
    assert completion.result == {"double": 42, "device": "cpu", "threads": 3}
    assert completion.failure is None
    assert completion.seconds >= 0.05
    assert pool.activity() == {name: "doubling 21"}


def test_nothing_to_wait_for_waits_and_is_empty(pool):
    began = time.monotonic()
    assert pool.wait(0.05) == []
    assert time.monotonic() - began >= 0.05


def test_a_failure_is_a_completion_and_the_worker_goes_on(pool):
    (name,) = pool.workers
    pool.submit(name, {"number": 1, "error": EvaluationError("not that\none")})
    (completion,) = pool.wait(0)
    assert completion.result is None
    assert (completion.failure.kind, completion.failure.message) == ("refused", "not that")
    assert "Traceback" in completion.failure.detail
    pool.submit(name, {"number": 2})
    assert pool.wait(0)[0].result["double"] == 4
    pool.close()


def test_an_interrupt_is_no_failure(pool):
    (name,) = pool.workers
    pool.submit(name, {"number": 1, "error": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        pool.wait(0)


def test_a_worker_that_is_not_there_is_our_own_mistake(pool):
    with pytest.raises(AssertionError, match="no worker 'cpu-1@inline'"):
        pool.submit("cpu-1@inline", {"number": 1})


@pytest.mark.parametrize("factory", ["no_such_module:Worker", f"{__name__}:NoSuch"])
def test_a_factory_that_is_not_there(factory):
    with pytest.raises((ImportError, AttributeError)):
        InlinePool(factory)


def test_attempt_hands_back_plain_data():
    class Broken:
        def run(self, payload):
            raise ValueError(payload["why"])

    result, failure = attempt(Broken(), {"why": "because"})
    assert result is None
    assert failure.message == "ValueError: because"
