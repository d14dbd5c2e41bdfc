"""Statistics of float models on disk: computed once, whoever asks first, and never half there."""

import threading

import numpy as np
import pytest
import torch

from orchestrator.errors import BitatlasError
from orchestrator.shared_statistics import shared_statistics, statistics_key
from quantizers.statistics import InputRanges, InputStatistics

CPU = torch.device("cpu")
MODEL = {"digest": "abc", "dtype": "auto"}
WINDOWS = np.arange(8, dtype=np.int64).reshape(2, 4)


def stage(seed, hessian):
    low, high, mean = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    return InputStatistics(
        ranges=InputRanges(low_I=low, high_I=high, mean_abs_I=mean), hessian_II=torch.eye(4) * seed if hessian else None
    )


@pytest.mark.parametrize("hessian", [True, False])
def test_what_is_read_is_what_was_made(tmp_path, hessian):
    made = [[stage(4 * block + number, hessian) for number in range(4)] for block in range(2)]
    read = shared_statistics(tmp_path / "cache" / "key", lambda: iter(made), CPU)
    for index in (1, 0):
        assert len(read(index)) == 4
        for found, expected in zip(read(index), made[index], strict=True):
            for name in ("low_I", "high_I", "mean_abs_I"):
                assert torch.equal(getattr(found.ranges, name), getattr(expected.ranges, name))
            assert (found.hessian_II is None) == (not hessian)
            assert not hessian or torch.equal(found.hessian_II, expected.hessian_II)


def test_many_ask_and_one_computes(tmp_path):
    computed, started = [], threading.Barrier(4)

    def ask():
        started.wait()
        shared_statistics(tmp_path / "key", make, CPU)

    def make():
        computed.append(1)
        yield [stage(0, hessian=False)]

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed == [1]


def test_what_fails_half_way_leaves_nothing_and_can_be_tried_again(tmp_path):
    def broken():
        yield [stage(0, hessian=False)]
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        shared_statistics(tmp_path / "key", broken, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    assert shared_statistics(tmp_path / "key", lambda: iter([[stage(0, hessian=False)]]), CPU)(0)


def test_the_key_is_of_all_that_matters():
    keys = {
        statistics_key(MODEL, WINDOWS, hessians=False),
        statistics_key(MODEL, WINDOWS, hessians=True),
        statistics_key(MODEL | {"digest": "abd"}, WINDOWS, hessians=False),
        statistics_key(MODEL | {"dtype": "float32"}, WINDOWS, hessians=False),
        statistics_key(MODEL, WINDOWS + 1, hessians=False),
        statistics_key(MODEL, WINDOWS.reshape(4, 2), hessians=False),
    }
    assert len(keys) == 6
    assert statistics_key(MODEL, WINDOWS.copy(), hessians=False) in keys


@pytest.mark.parametrize("harm", ["empty", "truncated", "gone"])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, harm):
    read = shared_statistics(tmp_path / "key", lambda: iter([[stage(0, hessian=True)]]), CPU)
    file = tmp_path / "key" / "block-0000.safetensors"
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(b"" if harm == "empty" else file.read_bytes()[:-20])
    with pytest.raises(BitatlasError, match=r"block-0000\.safetensors cannot be read .*; delete .*key and run"):
        read(0)
