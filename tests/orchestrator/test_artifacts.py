"""Artifacts: what is written is what is read, bit for bit, and nothing unfinished has a name."""

import json
import math
import subprocess
import sys
import threading

import pytest
import torch

from orchestrator.artifacts import ArtifactWriter, find_artifact, remove_unfinished
from orchestrator.errors import BitatlasError
from orchestrator.scheme import parse_scheme
from quantizers.block_source import InMemory
from quantizers.stream import quantize_blocks

SCHEMES = [
    {"method": "rtn", "weight_bits": 4, "group_size": 32},
    {"method": "rtn", "weight_bits": 1, "group_size": 16},
    {"method": "rtn", "weight_bits": 3, "symmetric": True, "scale_dtype": "bfloat16"},
    {"method": "rtn", "weight_bits": 5, "group_size": 48, "tail_group": True},
    {"method": "gptq", "weight_bits": 2, "group_size": 16, "options": {"act_order": True, "static_groups": False}},
    {"method": "billm", "weight_bits": 1},
    {"method": "slim_llm", "weight_bits": 2, "group_size": 16},
    {"method": "rtn", "weight_bits": 8, "activation_bits": 8, "activation_granularity": "per_tensor"},
    {"method": "rtn", "weight_bits": 4, "activation_bits": 4, "activation_symmetric": False},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_checkpoint):
    from orchestrator.models.loading import load_model

    return load_model(make_checkpoint(tmp_path_factory.mktemp("artifacts") / "model"))


@pytest.fixture(scope="module")
def blocks(model):
    return list(quantize_blocks(InMemory(model), parse_scheme(SCHEMES[0], "x").build(), None))


def write(directory, blocks, **facts):
    writer = ArtifactWriter(directory)
    for block in blocks:
        writer.add_block(block)
    return writer.finish(**({"cell": "c", "seconds": 1.0} | facts))


@pytest.mark.parametrize("fields", SCHEMES, ids=lambda fields: f"{fields['method']}{fields['weight_bits']}")
def test_every_part_comes_back_bit_for_bit(model, tmp_path, fields):
    windows = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    made = list(quantize_blocks(InMemory(model), parse_scheme(fields, "x").build(), windows))
    write(tmp_path / "key", made)
    artifact = find_artifact(tmp_path / "key")
    read = {linear.name: linear for block in artifact.blocks() for linear in block.linears}
    written = {linear.name: linear for block in made for linear in block.linears}
    assert list(read) == list(written)
    for name, linear in read.items():
        weight, expected = linear.weight, written[name].weight
        assert weight.encoding == expected.encoding
        assert weight.spec() == expected.spec()
        assert torch.equal(weight.decode(), expected.decode())
        assert all(torch.equal(part, expected.pack()[key]) for key, part in weight.pack().items())
        for place in ("inputs", "outputs"):
            ours, theirs = getattr(linear, place), getattr(written[name], place)
            assert (ours and ours.spec()) == (theirs and theirs.spec())
        assert artifact.manifest["linears"][name]["output_error"] == written[name].output_error
    assert artifact.stored_bytes == sum(linear.stored_bytes for linear in written.values())
    assert artifact.num_weights == sum(math.prod(linear.weight.shape) for linear in written.values())


def test_the_stored_bytes_are_those_on_disk(blocks, tmp_path):
    from safetensors import safe_open

    artifact = write(tmp_path / "key", blocks)
    on_disk = 0
    for file in artifact.manifest["files"]:
        with safe_open(tmp_path / "key" / file, framework="pt") as opened:
            on_disk += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118 (no iterator)
    assert artifact.stored_bytes == on_disk


def test_nothing_has_a_name_before_it_is_finished(blocks, tmp_path):
    writer = ArtifactWriter(tmp_path / "artifacts" / "key")
    writer.add_block(blocks[0])
    assert find_artifact(tmp_path / "artifacts" / "key") is None
    assert not list((tmp_path / "artifacts").glob("[!.]*"))
    writer.add_block(blocks[1])
    artifact = writer.finish(cell="c", model={"source": "s"}, seconds=2.5)
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == ["key"]
    assert find_artifact(tmp_path / "artifacts" / "key") == artifact
    assert (artifact.manifest["cell"], artifact.manifest["seconds"]) == ("c", 2.5)


def test_what_is_discarded_leaves_nothing(blocks, tmp_path):
    writer = ArtifactWriter(tmp_path / "key")
    writer.add_block(blocks[0])
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_scratch_of_killed_workers_is_removed_and_finished_work_kept(blocks, tmp_path):
    write(tmp_path / "key", blocks)
    ArtifactWriter(tmp_path / "other").add_block(blocks[0])
    assert len(list(tmp_path.iterdir())) == 2
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    remove_unfinished(tmp_path / "nowhere")


def test_two_workers_that_finish_the_same_key(blocks, tmp_path):
    writers = [ArtifactWriter(tmp_path / "key") for _ in range(4)]
    for writer in writers:
        for block in blocks:
            writer.add_block(block)
    finished = []
    threads = [
        threading.Thread(target=lambda w=writer: finished.append(w.finish(cell="c", seconds=1.0))) for writer in writers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finished) == 4
    assert {artifact.directory for artifact in finished} == {tmp_path / "key"}
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert sum(len(block.linears) for block in finished[0].blocks()) == 14


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_file_that_was_changed_is_refused_by_name(blocks, tmp_path, harm):
    artifact = write(tmp_path / "key", blocks)
    file = tmp_path / "key" / "block-0001.safetensors"
    content = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    else:
        content[-1] ^= 1
        file.write_bytes(content if harm == "flip" else content[:-10])
    with pytest.raises(BitatlasError, match=r"block-0001.safetensors is missing or was changed .*; delete .*key and"):
        list(artifact.blocks())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3"])
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "artifact.json").write_bytes(content)
    with pytest.raises(BitatlasError, match=r"artifact.json is not readable .*; delete .*key and run again"):
        find_artifact(tmp_path / "key")


def test_the_manifest_is_plain_json(blocks, tmp_path):
    write(tmp_path / "key", blocks)
    manifest = json.loads((tmp_path / "key" / "artifact.json").read_text())
    assert manifest["format"] == "bitatlas-artifact/2"
    assert list(manifest["files"]) == ["block-0000.safetensors", "block-0001.safetensors"]
    linear = manifest["linears"]["model.layers.1.mlp.down_proj"]
    assert (linear["out_features"], linear["in_features"]) == (64, 128)
    assert linear["spec"]["grid"]["bits"] == 4
    assert linear["output_error"] is None


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from cluster.failures import classify
from orchestrator.artifacts import ArtifactWriter
from quantizers.grid import Grid
from quantizers.rtn import round_to_nearest
from quantizers.stream import QuantizedBlock, QuantizedLinear
torch.set_num_threads(1)
weight = round_to_nearest(torch.randn(256, 256), Grid(bits=8))
linear = QuantizedLinear(name="a", weight=weight, weight_error=0, output_error=None, damping=None, seconds=0)
writer = ArtifactWriter(Path(sys.argv[1]) / "key")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    writer.add_block(QuantizedBlock(linears=[linear]))
except Exception as error:
    print(classify(error).kind)
writer.discard()
"""


def test_a_full_disk_is_told_apart_from_a_broken_job(tmp_path):
    ran = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=False)
    assert ran.stdout == "disk\n", ran.stderr
    assert not list(tmp_path.iterdir())
