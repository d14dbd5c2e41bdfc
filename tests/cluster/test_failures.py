"""What an exception stands for, and whether to try again."""

import errno

import pytest

from cluster.errors import ClusterError
from cluster.failures import ATTEMPTS, Failure, classify
from evaluators.errors import EvaluationError
from orchestrator.errors import BitatlasError
from quantizers.errors import QuantizationError


def named(name, base=Exception):
    return type(name, (base,), {})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (named("ActorDiedError")("gone"), "worker_lost"),
        (named("ActorDiedError", named("RayActorError"))("gone"), "worker_lost"),
        (named("Mine", named("WorkerCrashedError"))("gone"), "worker_lost"),
        (named("NodeDiedError")("gone"), "worker_lost"),
        (MemoryError(), "out_of_memory"),
        (named("OutOfMemoryError", RuntimeError)("CUDA out of memory"), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (OSError(errno.EROFS, "Read-only file system"), "disk"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "disk"),
        (OSError(errno.EFBIG, "File too large"), "disk"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "error"),
        (QuantizationError("no"), "refused"),
        (EvaluationError("no"), "refused"),
        (BitatlasError("no"), "refused"),
        (ClusterError("no"), "error"),
        (ValueError("no"), "error"),
        (RuntimeError("expected m1 and m2 to have the same dtype"), "error"),
    ],
)
def test_kinds(error, kind):
    assert classify(error).kind == kind
    assert kind in ATTEMPTS


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


@pytest.mark.parametrize(
    ("kind", "attempts"), [("worker_lost", 3), ("out_of_memory", 2), ("disk", 1), ("refused", 1), ("error", 1)]
)
def test_how_often_a_job_is_tried(kind, attempts):
    failure = Failure(kind=kind, message="m")
    tried = 1
    while failure.retry(tried):
        tried += 1
    assert tried == attempts
    assert failure.stops_sweep == (kind == "disk")
