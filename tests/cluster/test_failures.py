"""What an exception stands for, and whether to try again."""

import errno

import pytest

from cluster.errors import ClusterError
from cluster.failures import POLICIES, Attempts, Failure, classify
from evaluators.errors import DataError, EvaluationError
from orchestrator.errors import BitatlasError, DamagedFileError
from quantizers.errors import NumericalError, QuantizationError


def named(name, base=Exception):
    return type(name, (base,), {})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (named("ActorDiedError")("gone"), "worker_lost"),
        (named("ActorDiedError", named("RayActorError"))("gone"), "worker_lost"),
        (named("Mine", named("WorkerCrashedError"))("gone"), "worker_lost"),
        (named("NodeDiedError")("gone"), "node_lost"),
        (named("ActorDiedError")("The actor died because its node has died. Node Id: 3df1"), "node_lost"),
        (named("ActorDiedError")("Worker exit type: NODE_OUT_OF_MEMORY"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (named("OutOfMemoryError", RuntimeError)("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("NPU out of memory. Tried to allocate 260.00 MiB (NPU 0; 28.50 GiB total)"), "out_of_memory"),
        (RuntimeError("Malloc pin memory failed, host out of memory, size: 1"), "out_of_memory"),
        (ValueError("NPU out of memory"), "error"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (OSError(errno.EROFS, "Read-only file system"), "disk"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "disk"),
        (OSError(errno.EFBIG, "File too large"), "disk"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "error"),
        (QuantizationError("no"), "refused"),
        (EvaluationError("no"), "refused"),
        (BitatlasError("no"), "refused"),
        (NumericalError("not positive definite"), "numerical"),
        (named("LinAlgError", RuntimeError)("singular"), "numerical"),
        (DataError("no data"), "data"),
        (DamagedFileError("changed"), "damaged"),
        (ClusterError("no"), "error"),
        (ValueError("no"), "error"),
        (RuntimeError("expected m1 and m2 to have the same dtype"), "error"),
    ],
)
def test_kinds(error, kind):
    assert classify(error).kind == kind
    assert kind in POLICIES


def test_torch_s_and_ray_s_own_exceptions():
    import ray.exceptions
    import torch

    assert classify(torch.OutOfMemoryError("no memory")).kind == "out_of_memory"
    assert classify(ray.exceptions.WorkerCrashedError()).kind == "worker_lost"
    assert classify(ray.exceptions.ActorDiedError()).kind == "worker_lost"
    assert classify(ray.exceptions.OutOfMemoryError("no memory")).kind == "out_of_memory"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("first\nsecond"), "ValueError: first"),
        (ValueError("  \n first"), "ValueError: first"),
        (ValueError(), "ValueError: ValueError"),
        (QuantizationError("group_size = 7 does not divide"), "group_size = 7 does not divide"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_message_is_one_line(error, message):
    assert classify(error, "detail").message == message
    assert classify(error, "detail").detail == "detail"


def fail(attempts, kind, worker="w0", message="m"):
    failure = Failure(kind=kind, message=message)
    attempts.add(failure, worker)
    return failure


@pytest.mark.parametrize(
    ("kind", "tries"),
    [
        ("worker_lost", 3),
        ("node_lost", 20),
        ("stuck", 2),
        ("out_of_memory", 3),
        ("damaged", 3),
        ("data", 2),
        ("disk", 1),
        ("numerical", 1),
        ("refused", 1),
        ("error", 1),
    ],
)
def test_how_often_a_job_is_tried(kind, tries):
    attempts, tried = Attempts(), 1
    while attempts.retry(fail(attempts, kind)):
        tried += 1
    assert tried == tries
    assert POLICIES[kind].stops_sweep == (kind == "disk")


def test_each_kind_is_counted_for_itself():
    attempts = Attempts()
    for _ in range(5):
        assert attempts.retry(fail(attempts, "node_lost"))
    assert attempts.retry(fail(attempts, "worker_lost"))
    assert attempts.retry(fail(attempts, "worker_lost"))
    assert not attempts.retry(fail(attempts, "worker_lost"))


def test_a_job_that_kills_three_workers_is_quarantined():
    attempts = Attempts()
    for worker in ("w0", "w1", "w2"):
        failure = fail(attempts, "worker_lost", worker, f"worker {worker} was lost")
    final = attempts.final(failure)
    assert (final.kind, final.message) == ("quarantined", "brought down 3 workers, the last one so: worker w2 was lost")


def test_what_failed_for_good_says_how_often_it_was_tried():
    attempts = Attempts()
    assert attempts.final(fail(attempts, "error")).message == "m"
    fail(attempts, "out_of_memory")
    final = attempts.final(fail(attempts, "out_of_memory"))
    assert (final.kind, final.message) == ("out_of_memory", "m (tried 2 times)")


def test_out_of_memory_takes_less_at_a_time_then_goes_elsewhere():
    attempts = Attempts()
    assert attempts.memory_share() == 1
    first = fail(attempts, "out_of_memory", "w0")
    assert (attempts.memory_share(), attempts.avoid(first)) == (0.5, frozenset())
    second = fail(attempts, "out_of_memory", "w1")
    assert (attempts.memory_share(), attempts.avoid(second)) == (0.25, {"w0", "w1"})
    lost = fail(attempts, "worker_lost", "w2")
    assert (attempts.memory_share(), attempts.avoid(lost)) == (0.25, frozenset())
