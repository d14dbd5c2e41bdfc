import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.benchmarks import bench_memory as bench
from tests.benchmarks.peers.process_memory import peak_rss_bytes, status_bytes

ROOT = Path(__file__).resolve().parents[2]
SMALL = bench.Shape(blocks=2, hidden=64, intermediate=160, heads=4, kv_heads=2, head_dim=16, vocabulary=300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("memory") / "checkpoint"
    return directory, bench.write_checkpoint(directory, SMALL)


def test_the_shape_of_openpangu_7b():
    shapes = bench.tensor_shapes(bench.OPENPANGU_7B)
    block = {name.removeprefix("model.layers.33."): shape for name, shape in shapes.items() if ".33." in name}
    assert block == {
        "self_attn.q_proj.weight": (4096, 4096),
        "self_attn.q_proj.bias": (4096,),
        "self_attn.k_proj.weight": (1024, 4096),
        "self_attn.k_proj.bias": (1024,),
        "self_attn.v_proj.weight": (1024, 4096),
        "self_attn.v_proj.bias": (1024,),
        "self_attn.o_proj.weight": (4096, 4096),
        "self_attn.o_proj.bias": (4096,),
        "mlp.gate_proj.weight": (12800, 4096),
        "mlp.up_proj.weight": (12800, 4096),
        "mlp.down_proj.weight": (4096, 12800),
        "input_layernorm.weight": (4096,),
        "post_attention_layernorm.weight": (4096,),
    }
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (153376, 4096)
    assert 2 * bench.num_parameters(bench.OPENPANGU_7B) == pytest.approx(16.06e9, rel=0.01)
    files = bench.shards(bench.OPENPANGU_7B)
    assert len(files) == 36
    assert sorted(name for names in files.values() for name in names) == sorted(shapes)


def test_the_checkpoint_loads_and_runs(checkpoint):
    from orchestrator.models.checkpoint import check_checkpoint
    from orchestrator.models.loading import load_model

    directory, total = checkpoint
    check_checkpoint(directory, "test")
    model = load_model(directory)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert total == sum(parameter.nbytes for parameter in model.parameters()) == 2 * bench.num_parameters(SMALL)
    assert json.loads((directory / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == total
    weight = model.model.layers[1].mlp.down_proj.weight.float()
    assert weight.std().item() == pytest.approx(bench.STANDARD_DEVIATION, rel=0.05)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)
    assert (model.model.layers[0].input_layernorm.weight == 1).all()
    with torch.inference_mode():
        assert model(input_ids=torch.arange(32)[None]).logits.isfinite().all()


def test_the_checkpoint_is_the_same_every_time(checkpoint, tmp_path):
    told = []
    bench.write_checkpoint(tmp_path / "again", SMALL, progress=told.append)
    assert told == list(bench.shards(SMALL))
    for file in told:
        again, first = load_file(tmp_path / "again" / file), load_file(checkpoint[0] / file)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name], first[name]) for name in first)
    blocks = [load_file(checkpoint[0] / file) for file in told[1:3]]
    key = "model.layers.{}.mlp.up_proj.weight"
    assert not torch.equal(blocks[0][key.format(0)], blocks[1][key.format(1)])


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 5_000_000_000})
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda _: free)
    with pytest.raises(SystemExit, match=r"writes 20\.9 GB to .*, where 5\.0 GB are free: 15\.9 GB are missing"):
        bench.measure(ROOT, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


HOG = "x = bytearray(b'1') * {size}; import time; time.sleep(0.3)"


def test_private_memory_is_seen():
    little, much = (bench.watch([sys.executable, "-c", HOG.format(size=size)], ROOT) for size in (1, 200_000_000))
    assert much - little == pytest.approx(200e6, rel=0.1)


def test_a_process_that_fails_ends_the_benchmark():
    with pytest.raises(SystemExit, match="ended with status 3"):
        bench.watch([sys.executable, "-c", "raise SystemExit(3)"], ROOT)


def test_a_process_that_is_gone_has_no_sizes():
    assert status_bytes(2**22 + 1, "VmHWM") is None
    assert peak_rss_bytes() > 10_000_000


def test_the_peak_is_that_of_the_child(tmp_path):
    """Neither the parent's memory nor what the child has given back hides it."""
    script = tmp_path / "hog.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom types import SimpleNamespace\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.benchmarks import bench_memory as bench\n"
        "def hog(job, checkpoint, out):\n    x = bytearray(b'1') * 300_000_000\n    del x\n"
        "bench.ours = hog\n"
        "bench.child(SimpleNamespace(job='rtn', checkpoint=None, out=None, report=Path(sys.argv[1])))\n"
    )
    ballast = bytearray(b"1") * 600_000_000
    bench.watch([sys.executable, str(script), str(tmp_path / "report.json")], ROOT)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["peak_rss_bytes"] - report["start_rss_bytes"] == pytest.approx(300e6, rel=0.1)
    assert report["peak_rss_bytes"] < 1.2e9
    assert len(ballast) == 600_000_000


@pytest.mark.slow
def test_the_whole_benchmark_in_small(tmp_path):
    small = bench.Shape(blocks=3, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, vocabulary=1000)
    figures = bench.measure(ROOT, small, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert json.loads(json.dumps(figures))["shape"]["blocks"] == 3
    assert set(figures["runs"]) == set(bench.JOBS)
    for run in figures["runs"].values():
        assert run["peak_rss_bytes"] >= run["start_rss_bytes"] > 0
        assert run["peak_anonymous_bytes"] > 0
        assert run["seconds"] > 0
    # a W4 g128 artifact: 4 bits and 20 per group
    linears = 3 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512)
    assert figures["runs"]["rtn"]["files_bytes"] == pytest.approx(linears * (4 + 20 / 128) / 8, rel=0.05)
    assert figures["runs"]["gptq"]["files_bytes"] == 0
