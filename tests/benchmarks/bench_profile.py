"""Where the time of quantizing goes, against this machine's measured peak of matrix products.

torch.profiler around the first blocks of SmolLM2-135M, one thread, on an idle machine.
"""

import math
import time

from rich.console import Console
from rich.table import Table

from tests.benchmarks.harness import LENGTH, SOURCE, WINDOWS
from tests.benchmarks.ours import ours

BLOCKS = 3
SCHEMES = {
    "GPTQ W4 g64": {"method": "gptq", "weight_bits": 4, "group_size": 64},
    "AWQ W4 g64": {"method": "awq", "weight_bits": 4, "group_size": 64},
    "SmoothQuant W8A8": {"method": "smoothquant", "weight_bits": 8, "activation_bits": 8},
}
# Kernels by what they are for; the first prefix that fits. Everything else is elementwise.
KINDS = {
    "bfloat16 products": ("bfloat16",),
    "float32 products": ("float32",),
    "attention": ("aten::_scaled_dot_product",),
    "factorization": ("aten::linalg_cholesky_ex", "aten::linalg_solve_triangular", "aten::triangular_solve"),
    "matrix-vector": ("aten::addmv",),
}
# Where the factors stand among a product's arguments.
PRODUCTS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}
PEAK_SHAPE = (4096, 576, 1536)  # tokens, in, out of the largest linears
REPEATS = 9


def measure(root):
    import torch

    from evaluators.corpora import Corpus, calibration_windows
    from orchestrator.models.loading import load_model, load_tokenizer
    from orchestrator.models.source import resolve_model

    del root
    torch.set_num_threads(1)
    directory = resolve_model(SOURCE, "benchmark")
    windows = calibration_windows(
        Corpus.parse("lambada"), load_tokenizer(directory), samples=WINDOWS, sequence_length=LENGTH, seed=0
    )
    model = load_model(directory)
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    figures = {"peak_gflops": {name: peak(getattr(torch, name)) for name in ("float32", "bfloat16")}, "runs": {}}
    for label, scheme in SCHEMES.items():
        figures["runs"][label] = profiled(scheme, model, torch.tensor(windows))
    show(Console(), figures)
    return figures


def peak(dtype):
    """The best of some products of the shape of the largest linears, in GFLOP/s."""
    import torch

    tokens, inputs, outputs = PEAK_SHAPE
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(tokens, inputs, generator=generator).to(dtype)
    right = torch.randn(inputs, outputs, generator=generator).to(dtype)
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * tokens * inputs * outputs / best / 1e9


def profiled(scheme, model, windows):
    """Seconds per block and kind of kernel, and the rate of the products."""
    from torch.profiler import ProfilerActivity, profile

    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        ours(scheme, model, windows)
    wall = time.perf_counter() - started
    seconds, flops = dict.fromkeys([*KINDS, "elementwise and other"], 0.0), dict.fromkeys(KINDS, 0.0)
    for event in profiler.events():
        kind = kind_of(event)
        seconds[kind] += event.self_cpu_time_total / 1e6
        if event.name in PRODUCTS:
            left, right = (event.input_shapes[place] for place in PRODUCTS[event.name])
            flops[kind] += 2 * math.prod(left) * right[-1]
    return {
        "seconds_per_block": wall / BLOCKS,
        "share": {kind: value / sum(seconds.values()) for kind, value in seconds.items()},
        "gflops": {kind: count / seconds[kind] / 1e9 for kind, count in flops.items() if count},
    }


def kind_of(event):
    name = event.name
    if name in PRODUCTS:
        name = "bfloat16" if "c10::BFloat16" in event.input_dtypes else "float32"
    return next((kind for kind, names in KINDS.items() if name.startswith(names)), "elementwise and other")


def show(console, figures):
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in figures["peak_gflops"].items())
    table = Table(title=f"Share of the time of {BLOCKS} blocks, {WINDOWS} x {LENGTH} tokens; peak GFLOP/s: {peaks}")
    table.add_column("")
    for label in figures["runs"]:
        table.add_column(label, justify="right")
    for kind in next(iter(figures["runs"].values()))["share"]:
        cells = []
        for run in figures["runs"].values():
            rate = run["gflops"].get(kind)
            cells.append(f"{run['share'][kind]:.0%}" + (f" at {rate:.0f}" if rate else ""))
        table.add_row(kind, *cells)
    table.add_row("seconds per block", *(f"{run['seconds_per_block']:.2f}" for run in figures["runs"].values()))
    console.print(table)
