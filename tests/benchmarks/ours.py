"""Our side of a comparison, each command a process of its own: quantize, evaluate a dense checkpoint, or run a sweep
without Ray."""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from tests.benchmarks.peers.process_memory import peak_rss_bytes


def ours(scheme, model, windows):
    """Quantize a model in memory.

    Args:
        scheme: a grid entry of a sweep file.
    Returns:
        the quantized blocks, all of them made.
    """
    from orchestrator.models.float_products import fast_products
    from orchestrator.scheme import parse_scheme
    from quantizers.block_source import InMemory
    from quantizers.stream import quantize_blocks

    method = parse_scheme(scheme, "benchmark").build()
    with fast_products("cpu"):  # as a worker does
        return list(quantize_blocks(InMemory(model), method, windows))


def ours_installed(model, blocks):
    """The model with the quantized blocks in it, activations included, as a context."""
    from quantizers.apply import installed

    return installed(model, blocks)


def quantize(args):
    """Quantize, evaluate (where asked to, in this process), write the dense checkpoint and last `result.json`."""
    import torch

    from orchestrator.models.loading import load_model

    torch.set_num_threads(1)
    model = load_model(args.model)
    windows = torch.tensor(np.load(args.tokens))
    wall, cpu = time.perf_counter(), time.process_time()
    blocks = ours(json.loads(args.scheme), model, windows)
    result = {
        "quantization_seconds": time.perf_counter() - wall,
        "quantization_cpu_seconds": time.process_time() - cpu,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    with ours_installed(model, blocks):
        if args.held_out:
            result["perplexity"] = _perplexity(model, args.held_out)
        model.save_pretrained(args.out)
    (args.out / "result.json").write_text(json.dumps(result))


def perplexity(args):
    """Evaluate a dense checkpoint."""
    import torch

    from orchestrator.models.loading import load_model

    torch.set_num_threads(1)
    print(_perplexity(load_model(args.model), args.held_out))


def _perplexity(model, held_out):
    from evaluators.perplexity import perplexity as measure
    from orchestrator.models.float_products import fast_products

    with fast_products("cpu"):
        return measure(model, np.load(held_out)).perplexity


def sweep(args):
    """Run a sweep in this process: the driver of `bitatlas run`, and one worker that does a job after the other."""
    from cluster.pool import InlinePool
    from orchestrator.config import read_sweep
    from orchestrator.inputs import prepare
    from orchestrator.layout import Layout
    from orchestrator.plan import make_plan
    from orchestrator.store import Store
    from orchestrator.sweep import Driver
    from orchestrator.view import QuietView
    from orchestrator.worker import FACTORY

    asked, layout = read_sweep(args.file), Layout(args.out)
    inputs = prepare(asked, str(args.file))
    plan, pool = make_plan(asked, inputs.identities), InlinePool(FACTORY, args.threads)
    with Store(layout) as store:
        driver = Driver(sweep=asked, plan=plan, inputs=inputs, layout=layout, store=store, pool=pool)
        summary = driver.run(QuietView())
    if summary.finished != len(plan.jobs):
        raise SystemExit(f"{summary.failures}")


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ours", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("quantize")
    run.add_argument("--scheme", required=True, help="a grid entry of a sweep file, as JSON")
    run.add_argument("--model", type=Path, required=True)
    run.add_argument("--tokens", type=Path, required=True, help="int64 .npy of shape [windows, tokens]")
    run.add_argument("--held-out", type=Path, help="int64 .npy as well: measure perplexity on it, as quantized")
    run.add_argument("--out", type=Path, required=True)
    run.set_defaults(run=quantize)
    evaluate = commands.add_parser("perplexity")
    evaluate.add_argument("--model", type=Path, required=True)
    evaluate.add_argument("--held-out", type=Path, required=True)
    evaluate.set_defaults(run=perplexity)
    inline = commands.add_parser("sweep")
    inline.add_argument("--file", type=Path, required=True, help="a sweep file")
    inline.add_argument("--threads", type=int, default=1)
    inline.add_argument("--out", type=Path, required=True)
    inline.set_defaults(run=sweep)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
