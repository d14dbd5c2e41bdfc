"""What sweeps share in a directory: found by content, never believed when damaged, written once by whoever is first."""

import json
import math
import os
import shutil
import threading

import pytest
import torch

from orchestrator import shared_cache
from orchestrator.artifacts import ArtifactWriter, find_artifact
from orchestrator.errors import BitatlasError
from orchestrator.scheme import parse_scheme
from orchestrator.shared_cache import SharedCache, usable_cache
from quantizers.block_source import InMemory
from quantizers.stream import quantize_blocks

KEY = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def blocks(tmp_path_factory, make_checkpoint):
    from orchestrator.models.loading import load_model

    model = load_model(make_checkpoint(tmp_path_factory.mktemp("cached") / "model"))
    method = parse_scheme({"method": "rtn", "weight_bits": 4, "group_size": 32}, "x").build()
    return list(quantize_blocks(InMemory(model), method, None))


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def cache(tmp_path, warnings):
    return SharedCache(tmp_path / "cache", warnings.append)


@pytest.fixture
def made(tmp_path, blocks):
    """An artifact in the output of one sweep."""
    writer = ArtifactWriter(tmp_path / "one" / "artifacts" / KEY)
    for block in blocks:
        writer.add_block(block)
    return writer.finish(cell="one.cell", model={"source": "here"}, seconds=1.0)


def decoded(artifact):
    return [linear.weight.decode() for block in artifact.blocks() for linear in block.linears]


def take(cache, tmp_path, out="two"):
    return cache.take_artifact(tmp_path / out / "artifacts" / KEY, cell="two.cell", model={"source": "there"})


def test_an_artifact_is_the_same_and_speaks_of_its_new_sweep(cache, made, tmp_path, warnings):
    assert take(cache, tmp_path) is None
    cache.put_artifact(made)
    taken = take(cache, tmp_path)
    assert all(map(torch.equal, decoded(taken), decoded(made)))
    assert taken.manifest == made.manifest | {"cell": "two.cell", "model": {"source": "there"}}
    assert find_artifact(taken.directory) == taken
    assert sorted(os.listdir(taken.directory)) == sorted(os.listdir(made.directory))
    assert os.listdir(tmp_path / "two" / "artifacts") == [KEY]
    for file in made.manifest["files"]:
        assert (taken.directory / file).samefile(made.directory / file)  # no second copy on the disk
    assert warnings == []


def test_without_hard_links_it_is_copied(cache, made, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(shared_cache.Path, "hardlink_to", no_links)
    cache.put_artifact(made)
    shutil.rmtree(made.directory)
    assert len(decoded(take(cache, tmp_path))) == 14


@pytest.mark.parametrize("harm", ["flipped", "gone", "manifest", "no digest"])
def test_a_damaged_artifact_is_not_taken(cache, made, tmp_path, warnings, harm):
    cache.put_artifact(made)
    cached = tmp_path / "cache" / "artifacts" / KEY
    file = cached / {"manifest": "artifact.json", "no digest": "artifact.json.sha256"}.get(
        harm, "block-0001.safetensors"
    )
    if harm in {"gone", "no digest"}:
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        where = content.rindex(b"1") if harm == "manifest" else -1  # it is still JSON
        content[where] ^= 2
        file.unlink()  # the sweep's own stays as it is
        file.write_bytes(content)
    assert take(cache, tmp_path) is None
    assert not cached.exists()
    assert len(list((tmp_path / "cache" / "set_aside" / "artifacts").glob(f"*/{KEY}"))) == 1
    (warning,) = warnings
    assert "set aside" in warning
    assert not list((tmp_path / "two").rglob("*.*"))

    cache.put_artifact(made)
    assert len(decoded(take(cache, tmp_path))) == 14


def test_many_put_and_take_at_once(cache, made, tmp_path, warnings):
    start, taken = threading.Barrier(8), []

    def work(index):
        start.wait()
        cache.put_artifact(made)
        taken.append(take(cache, tmp_path, f"out{index % 3}"))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(decoded(artifact)) for artifact in taken] == [14] * 8
    assert os.listdir(tmp_path / "cache" / "artifacts") == [KEY]
    assert warnings == []


def test_what_cannot_be_kept_is_told(made, tmp_path, warnings):
    (tmp_path / "cache").touch()
    cache = SharedCache(tmp_path / "cache", warnings.append)
    cache.put_artifact(made)
    cache.put_outcome("a1", "cpu", {})
    assert ["cannot be written (Not a directory)" in warning for warning in warnings] == [True, True]


OUTCOME = {
    "metrics": [{"value": math.nan, "stderr": math.inf}, {"value": -math.inf, "stderr": 0.1 + 0.2}],
    "items": [{"log_likelihoods": [-1e-300, math.nan], "answer": "ü\ud800\n"}],
    "device": "a card",
    "seconds": 1 / 3,
}


def test_an_outcome_comes_back_bit_for_bit(cache, tmp_path, warnings):
    assert cache.outcome("a1", "cpu") is None
    cache.put_outcome("a1", "cpu", OUTCOME | {"facts": [{"event": "model_loaded"}], "troubles": ["x"]})
    assert json.dumps(cache.outcome("a1", "cpu"), sort_keys=True) == json.dumps(OUTCOME, sort_keys=True)
    assert cache.outcome("a1", "npu") is None
    assert cache.outcome("a2", "cpu") is None
    assert os.listdir(tmp_path / "cache" / "outcomes") == ["a1.cpu.json"]
    assert warnings == []


@pytest.mark.parametrize("harm", ["empty", "truncated", "flipped", "no object", "no sha256"])
def test_a_damaged_outcome_is_not_believed(cache, tmp_path, warnings, harm):
    cache.put_outcome("a1", "cpu", OUTCOME)
    file = tmp_path / "cache" / "outcomes" / "a1.cpu.json"
    text = file.read_text()
    harmed = {
        "empty": "",
        "truncated": text[:-10],
        "flipped": text.replace("0.3333333333333333", "0.3333333333333334"),
        "no object": "[1]",
        "no sha256": json.dumps({"format": "bitatlas-outcome/1", "outcome": {}}),
    }[harm]
    assert harmed != text
    file.write_text(harmed)
    assert cache.outcome("a1", "cpu") is None
    (warning,) = warnings
    assert "is damaged" in warning
    assert [path.read_text() for path in (tmp_path / "cache" / "set_aside").rglob("*.json")] == [harmed]
    assert cache.outcome("a1", "cpu") is None
    assert len(warnings) == 1


def test_another_format_counts_for_nothing(cache, tmp_path, warnings):
    cache.put_outcome("a1", "cpu", OUTCOME)
    file = tmp_path / "cache" / "outcomes" / "a1.cpu.json"
    file.write_text(file.read_text().replace("outcome/1", "outcome/0"))
    assert cache.outcome("a1", "cpu") is None
    assert (warnings, file.exists()) == ([], True)


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/deeper"):
        with pytest.raises(BitatlasError, match=r"--cache .* cannot be written \(.*\); give a directory that can, or"):
            usable_cache(tmp_path / place, tmp_path / "out")
    for place in ("out", "out/cache"):
        with pytest.raises(BitatlasError, match="lies in the sweep's output"):
            usable_cache(tmp_path / place, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["file"]
    assert usable_cache(tmp_path / "new" / "cache", tmp_path / "out").is_dir()
