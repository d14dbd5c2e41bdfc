"""Is it a usable checkpoint, and which one is it."""

import json
import os
import shutil

import pytest

from orchestrator.errors import BitatlasError
from orchestrator.models.checkpoint import check_checkpoint, checkpoint_digest, weight_files


@pytest.fixture(scope="module")
def original(tmp_path_factory, make_checkpoint):
    return make_checkpoint(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def sharded_original(tmp_path_factory, make_checkpoint):
    return make_checkpoint(tmp_path_factory.mktemp("sharded") / "model", shard_size="50KB")


@pytest.fixture
def checkpoint(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def sharded(sharded_original, tmp_path):
    return shutil.copytree(sharded_original, tmp_path / "sharded")


def refusal(directory):
    with pytest.raises(BitatlasError) as caught:
        check_checkpoint(directory, "x")
    assert str(caught.value).startswith(f"x = '{directory}'")
    return str(caught.value)


def test_whole_checkpoints_are_accepted(checkpoint, sharded):
    check_checkpoint(checkpoint, "x")
    check_checkpoint(sharded, "x")
    assert [file.name for file in weight_files(checkpoint)] == ["model.safetensors"]
    assert len(weight_files(sharded)) > 1
    assert all(file.exists() for file in weight_files(sharded))


def test_no_config(checkpoint):
    (checkpoint / "config.json").unlink()
    assert "holds no config.json: it is no checkpoint" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "config.json is not valid JSON"),
        (b'{"model_type": ', "config.json is not valid JSON"),
        (b"\xff\xfe", "config.json is not valid JSON"),
        (b"[]", "config.json is not a JSON object"),
        (b"{}", "config.json has no model_type"),
    ],
)
def test_a_broken_config(checkpoint, content, words):
    (checkpoint / "config.json").write_bytes(content)
    assert words in refusal(checkpoint)


def test_no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "holds no weights: no *.safetensors file" in refusal(checkpoint)


def test_pickled_weights_are_not_opened(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert (
        "holds only pickled weights (pytorch_model.bin), which can run code when opened; convert them to safetensors"
        in refusal(checkpoint)
    )


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_truncated_file(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors is truncated or corrupt" in refusal(checkpoint)


def test_a_text_file_that_calls_itself_safetensors(checkpoint):
    (checkpoint / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "model.safetensors is truncated or corrupt" in refusal(checkpoint)


def test_a_missing_shard(sharded):
    gone = weight_files(sharded)[1]
    gone.unlink()
    assert f"model.safetensors.index.json names {gone.name}, which is missing; copy" in refusal(sharded)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"{}", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}'])
def test_a_broken_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_bytes(content)
    assert "model.safetensors.index.json is no index of weights" in refusal(sharded)


def test_an_empty_index(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "holds no weights" in refusal(sharded)


def test_equal_contents_have_equal_digests(original, checkpoint, tmp_path):
    assert checkpoint_digest(original, tmp_path / "cache") == checkpoint_digest(checkpoint, tmp_path / "other")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_any_byte_changes_the_digest(checkpoint, tmp_path, name):
    before = checkpoint_digest(checkpoint, tmp_path / "cache")
    file = checkpoint / name
    for position in (-1, 200):
        content = bytearray(file.read_bytes())
        content[position] ^= 1
        file.write_bytes(content)
        after = checkpoint_digest(checkpoint, tmp_path / "cache")
        assert after != before
        before = after


def test_a_tokenizer_is_part_of_the_digest_and_a_readme_is_not(checkpoint, tmp_path):
    before = checkpoint_digest(checkpoint, tmp_path / "cache")
    (checkpoint / "README.md").write_text("words")
    assert checkpoint_digest(checkpoint, tmp_path / "cache") == before
    (checkpoint / "tokenizer.json").write_text("{}")
    assert checkpoint_digest(checkpoint, tmp_path / "cache") != before


def test_a_digest_is_remembered_and_the_file_not_read_again(checkpoint, tmp_path):
    cache = tmp_path / "cache"
    before = checkpoint_digest(checkpoint, cache)
    remembered = sorted((cache / "digests").iterdir())
    assert len(remembered) == 2
    for file in remembered:  # were a file read again, its true digest would come back
        file.write_text("0" * 64)
    assert checkpoint_digest(checkpoint, cache) != before
    config = checkpoint / "config.json"
    json.loads(config.read_text())
    os.utime(config, ns=(0, 0))  # another modification time: read again
    checkpoint_digest(checkpoint, cache)
    assert len(list((cache / "digests").iterdir())) == 3
