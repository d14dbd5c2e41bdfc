"""Peak memory of quantizing a 7B checkpoint, block by block: a synthetic one in the shape of openPangu-Embedded-7B.

A random Llama with attention biases (34 blocks, 16 GB in bfloat16) is written to disk, quantized in processes of their
own, and removed. Only memory and time mean anything: the weights are noise.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.peers.process_memory import peak_rss_bytes, status_bytes

SEED = 0
STANDARD_DEVIATION = 0.02  # of weights and biases, as models are initialized
GPTQ_BLOCKS, GPTQ_WINDOWS, GPTQ_LENGTH = 2, 8, 512
JOBS = {"rtn": "RTN, all blocks, to an artifact", "gptq": f"GPTQ, {GPTQ_BLOCKS} blocks"}
# Of the checkpoint: a W4 g128 artifact is 0.27 of its linears.
ARTIFACT_FRACTION = 0.3
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
POLL_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with biases on q, k, v and o, in bfloat16."""

    blocks: int = 34
    hidden: int = 4096
    intermediate: int = 12800
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 153376
    tied: bool = False


OPENPANGU_7B = Shape()


def ours(job, checkpoint, out):
    """Quantize a checkpoint on disk; `out` does not exist yet and is removed by the caller."""
    import itertools

    import numpy as np
    import torch

    from orchestrator.artifacts import ArtifactWriter
    from orchestrator.models.streaming import StreamedModel
    from quantizers.grid import Grid
    from quantizers.methods import method_class
    from quantizers.stream import quantize_blocks

    source = StreamedModel(checkpoint, "auto", "cpu")
    method = method_class(job)(grid=Grid(bits=4, group_size=128))
    if job == "rtn":
        writer = ArtifactWriter(out)
        for block in quantize_blocks(source, method, None):
            writer.add_block(block)
        writer.finish()
    else:
        vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        tokens = np.random.default_rng(SEED).integers(0, vocabulary, (GPTQ_WINDOWS, GPTQ_LENGTH))
        for _ in itertools.islice(quantize_blocks(source, method, torch.tensor(tokens)), GPTQ_BLOCKS):
            pass


def measure(root, shape=OPENPANGU_7B, directory=None):
    """Write the checkpoint, run every job, remove everything.

    Args:
        directory: where there is room; `outputs/benchmarks` by default (a temporary file system may be memory).
    """
    console = Console()
    home = directory or root / "outputs" / "benchmarks"
    home.mkdir(parents=True, exist_ok=True)
    check_room(home, shape)
    with tempfile.TemporaryDirectory(dir=home, prefix=".memory-") as temporary:
        checkpoint = Path(temporary) / "checkpoint"
        started = time.perf_counter()
        checkpoint_bytes = write_checkpoint(checkpoint, shape, progress=lambda name: console.print(f"wrote {name}"))
        figures = {
            "shape": asdict(shape),
            "checkpoint_bytes": checkpoint_bytes,
            "writing_seconds": time.perf_counter() - started,
            "calibration": {"blocks": GPTQ_BLOCKS, "windows": GPTQ_WINDOWS, "window_tokens": GPTQ_LENGTH},
            "runs": {},
        }
        for job in JOBS:
            console.print(f"{job} ...")
            figures["runs"][job] = run_job(root, job, checkpoint, Path(temporary) / job)
    for run in figures["runs"].values():
        run["peak_fraction_of_checkpoint"] = run["peak_rss_bytes"] / checkpoint_bytes
    show(console, figures)
    return figures


def check_room(home, shape):
    """Raise unless checkpoint and artifact fit on the disk.

    Raises:
        SystemExit: says what is missing.
    """
    needed = math.ceil(num_parameters(shape) * 2 * (1 + ARTIFACT_FRACTION))
    free = shutil.disk_usage(home).free
    if free < needed:
        raise SystemExit(
            f"the memory benchmark writes {needed / 1e9:.1f} GB to {home}, where {free / 1e9:.1f} GB are free: "
            f"{(needed - free) / 1e9:.1f} GB are missing; free them or name another place: "
            "python -m tests.benchmarks.bench_memory --directory DIR"
        )


def configuration(shape):
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=shape.blocks,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        attention_bias=True,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32768,
        dtype="bfloat16",
    )


def tensor_shapes(shape):
    """Name -> shape of every tensor, as transformers builds the model; takes no memory."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(configuration(shape))
    left_out = {"lm_head.weight"} if shape.tied else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in left_out}


def num_parameters(shape):
    return sum(math.prod(dimensions) for dimensions in tensor_shapes(shape).values())


def shards(shape):
    """Names by file: one for each block, and one each for the embeddings and for norm and head."""
    parts = {}
    for name in tensor_shapes(shape):
        words = name.split(".")
        part = int(words[2]) + 1 if words[1] == "layers" else 0 if words[1] == "embed_tokens" else shape.blocks + 1
        parts.setdefault(part, []).append(name)
    count = len(parts)
    return {f"model-{part + 1:05d}-of-{count:05d}.safetensors": parts[part] for part in sorted(parts)}


def write_checkpoint(directory, shape, progress=lambda name: None):
    """Write a random checkpoint, one shard in memory at a time; the same every time.

    Weights and biases are normal; the weights of norms are ones, so that activations stay of ordinary size.

    Returns:
        bytes of all tensors.
    """
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    shapes = tensor_shapes(shape)
    weight_map, total = {}, 0
    for index, (file, names) in enumerate(shards(shape).items()):
        generator = torch.Generator().manual_seed(SEED + index)
        tensors = {}
        for name in names:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
            if name.endswith("norm.weight"):
                tensor.fill_(1)
            else:
                tensor.normal_(std=STANDARD_DEVIATION, generator=generator)
            tensors[name] = tensor
            total += tensor.nbytes
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        progress(file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    configuration(shape).save_pretrained(directory)
    return total


def run_job(root, job, checkpoint, out):
    """Run one job in a process of its own and measure it.

    Returns:
        `seconds` of the job; `peak_rss_bytes`, VmHWM at its end, memory-mapped weights included;
        `start_rss_bytes`, VmHWM before it began (Python and torch, a part of the peak);
        `peak_anonymous_bytes`, the most that was private to it, sampled while it ran; `files_bytes` it wrote.
    """
    report = checkpoint.parent / f"{job}.json"
    arguments = ["child", job, str(checkpoint), str(out), str(report)]
    peak_anonymous_bytes = watch([sys.executable, "-m", "tests.benchmarks.bench_memory", *arguments], root)
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if out.exists() else 0
    shutil.rmtree(out, ignore_errors=True)
    return json.loads(report.read_text()) | {
        "peak_anonymous_bytes": peak_anonymous_bytes,
        "files_bytes": written,
    }


def watch(command, root):
    """Run a command to its end; the largest RssAnon that was seen."""
    peak = 0
    with subprocess.Popen(command, cwd=root, env=os.environ | ONE_THREAD) as process:
        while process.poll() is None:
            peak = max(peak, status_bytes(process.pid, "RssAnon") or 0)
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[1:5])} ended with status {process.returncode}")
    return peak


def child(args):
    """The measured process. It reads its own peak."""
    import torch
    import transformers  # noqa: F401 - a part of the start, not of the job

    torch.set_num_threads(1)
    start = peak_rss_bytes()
    started = time.perf_counter()
    ours(args.job, args.checkpoint, args.out)
    seconds = time.perf_counter() - started
    result = {"seconds": seconds, "start_rss_bytes": start, "peak_rss_bytes": peak_rss_bytes()}
    args.report.write_text(json.dumps(result))


def show(console, figures):
    size = figures["checkpoint_bytes"]
    table = Table(
        title=f"Peak memory, W4 g128, checkpoint of {size / 1e9:.2f} GB, {figures['shape']['blocks']} blocks, 1 thread"
    )
    for heading in ("", "peak GB", "of checkpoint", "private GB", "at start GB", "wall s", "written GB"):
        table.add_column(heading, justify="right" if heading else "left")
    for job, run in figures["runs"].items():
        table.add_row(
            JOBS[job],
            f"{run['peak_rss_bytes'] / 1e9:.2f}",
            f"{run['peak_fraction_of_checkpoint']:.1%}",
            f"{run['peak_anonymous_bytes'] / 1e9:.2f}",
            f"{run['start_rss_bytes'] / 1e9:.2f}",
            f"{run['seconds']:.1f}",
            f"{run['files_bytes'] / 1e9:.2f}",
        )
    console.print(table)


def main():
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_memory", description=__doc__)
    parser.add_argument("--directory", type=Path, help="where to write the checkpoint for the while")
    parser.add_argument("--blocks", type=int, default=OPENPANGU_7B.blocks, help="decoder blocks, to try it out")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers()
    part = commands.add_parser("child", help="(what `measure` starts)")
    part.add_argument("job", choices=JOBS)
    for name in ("checkpoint", "out", "report"):
        part.add_argument(name, type=Path)
    part.set_defaults(run=child)
    args = parser.parse_args()
    if args.run:
        args.run(args)
        return
    figures = measure(root, Shape(blocks=args.blocks), args.directory)
    name = "memory" if args.blocks == OPENPANGU_7B.blocks else f"memory-{args.blocks}-blocks"
    result = root / "outputs" / "benchmarks" / f"{name}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(figures, indent=1))
    print(f"wrote {result}")


if __name__ == "__main__":
    main()
