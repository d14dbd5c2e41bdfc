"""What a worker says of where it measured, and what it lets go of when memory is out."""

import pytest

from cluster.devices import Claim
from orchestrator.worker import Worker

PAYLOAD = {"kind": "evaluate", "id": "j", "cache": None, "sees_output": True, "artifact": None}


@pytest.fixture
def worker():
    device = Claim(torch_device="cpu", name="a processor", software={"torch": "2.13.0"}, cpu_fallback=False)
    return Worker(device=device, threads=1, report=lambda _: None)


def test_an_outcome_tells_where_it_was_measured(worker, monkeypatch):
    monkeypatch.setattr(worker, "_evaluate", lambda _: {"reused": False})
    outcome = worker.run(PAYLOAD)
    assert (outcome["device"], outcome["software"]) == ("a processor", {"torch": "2.13.0"})
    assert outcome["cpu_fallback"] is False


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (RuntimeError("NPU out of memory. Tried to allocate 1.00 GiB"), False),
        (MemoryError(), False),
        (RuntimeError("shapes do not match"), True),
    ],
)
def test_the_model_goes_when_memory_is_out(worker, monkeypatch, error, kept):
    def fail(_):
        raise error

    monkeypatch.setattr(worker, "_evaluate", fail)
    worker._model, worker._digest = object(), "d"
    with pytest.raises(type(error)):
        worker.run(PAYLOAD)
    assert (worker._model is not None, worker._digest is not None) == (kept, kept)
