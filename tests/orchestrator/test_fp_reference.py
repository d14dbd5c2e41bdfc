"""What the unquantized model finds likely, on disk: recorded once, whoever asks first, and never half there."""

import threading

import numpy as np
import pytest
import torch

from evaluators.divergence import TopTokens
from orchestrator.errors import BitatlasError
from orchestrator.fp_reference import fp_reference, reference_key

MODEL = {"digest": "abc", "dtype": "auto"}
WINDOWS = np.arange(8, dtype=np.int64).reshape(2, 4)


def kept(seed):
    generator = torch.Generator().manual_seed(seed)
    return TopTokens(
        ids_NK=torch.randint(0, 99, (3, 5), generator=generator, dtype=torch.int32),
        log_probabilities_NK=torch.randn(3, 5, generator=generator),
        rest_N=torch.tensor([-1.0, -torch.inf, torch.nan]),
        best_N=torch.randint(0, 99, (3,), generator=generator, dtype=torch.int32),
    )


class Recording:
    """Writes two windows and counts how often it was asked to."""

    def __init__(self):
        self.times = 0

    def __call__(self, write):
        self.times += 1
        for window in range(2):
            write(window, kept(window))


def silent(_):
    """Takes a line of progress."""


def same(one, other):
    return all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(one.parts, other.parts, strict=True))


def test_what_is_read_is_what_was_recorded(tmp_path):
    record = Recording()
    for _ in range(2):
        read = fp_reference(tmp_path / "cache" / "key", 2, record, silent)
        for window in (1, 0):
            assert same(read(window), kept(window))
            assert [part.dtype for part in read(window).parts] == [part.dtype for part in kept(0).parts]
    assert record.times == 1


def test_many_ask_and_one_records(tmp_path):
    record, together = Recording(), threading.Barrier(4)

    def ask():
        together.wait()
        fp_reference(tmp_path / "key", 2, record, silent)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert record.times == 1


def test_what_fails_half_way_leaves_nothing_and_can_be_tried_again(tmp_path):
    def broken(write):
        write(0, kept(0))
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fp_reference(tmp_path / "key", 2, broken, silent)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []
    assert same(fp_reference(tmp_path / "key", 2, Recording(), silent)(1), kept(1))


def harmed(file, how):
    if how == "gone":
        file.unlink()
    elif how == "flipped":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(b"" if how == "empty" else file.read_bytes()[:-20])


@pytest.mark.parametrize("how", ["empty", "truncated", "flipped", "gone"])
def test_what_is_damaged_is_set_aside_and_recorded_again(tmp_path, how):
    record, told = Recording(), []
    fp_reference(tmp_path / "key", 2, record, silent)
    harmed(tmp_path / "key" / "window-00001.safetensors", how)
    read = fp_reference(tmp_path / "key", 2, record, told.append)
    assert record.times == 2
    assert same(read(1), kept(1))
    (aside,) = tmp_path.glob("key.damaged-*")
    assert (aside / "window-00000.safetensors").exists()
    assert f"{tmp_path / 'key'} is damaged, so it was set aside as {aside.name} and is recorded again" in told


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
def test_damage_while_it_is_used_is_named_with_the_remedy(tmp_path, how):
    read = fp_reference(tmp_path / "key", 2, Recording(), silent)
    harmed(tmp_path / "key" / "window-00001.safetensors", how)
    assert same(read(0), kept(0))
    with pytest.raises(BitatlasError, match=r"window-00001\.safetensors, .* cannot be read .*; run the same command"):
        read(1)


def test_the_key_is_of_all_that_matters():
    def key(model=MODEL, windows=WINDOWS, *, top_k=512, device="cpu"):
        return reference_key(model, windows, top_k=top_k, device=device)

    keys = {
        key(),
        key(top_k=511),
        key(device="npu"),
        key(MODEL | {"digest": "abd"}),
        key(MODEL | {"dtype": "float32"}),
        key(windows=WINDOWS + 1),
        key(windows=WINDOWS.reshape(4, 2)),
    }
    assert len(keys) == 7
    assert key(windows=WINDOWS.copy()) in keys
