"""Activation outliers: how much of what RTN loses SmoothQuant and AWQ win back.

SmolLM2's own activations are mild. This makes a copy that computes the same, but in which some channels of every norm's
output are many times larger, as in large models: a power of two in the norm's weight, taken back in the columns that
read it, so that not even bfloat16 rounds differently. Perplexity is on text that calibration did not see.
"""

import json

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.benchmarks.harness import HELD_OUT_LENGTH, HELD_OUT_WINDOWS, LENGTH, SOURCE, WINDOWS
from tests.benchmarks.ours import ours, ours_installed
from tests.outliers import make_outliers

SEED = 0
CHANNELS, FACTOR = 16, 64
PER_CHANNEL_W8A8 = {"weight_bits": 8, "activation_bits": 8, "convention": "sq-sym"}
GROUPED_W4 = {"weight_bits": 4, "group_size": 64, "convention": "awq-asym"}
SCHEMES = {
    "RTN W8A8": {"method": "rtn", **PER_CHANNEL_W8A8},
    "SmoothQuant W8A8": {"method": "smoothquant", **PER_CHANNEL_W8A8},
    "RTN W4 g64": {"method": "rtn", **GROUPED_W4},
    "AWQ W4 g64": {"method": "awq", **GROUPED_W4},
}
RECOVERED = {"SmoothQuant W8A8": "RTN W8A8", "AWQ W4 g64": "RTN W4 g64"}


def measure(root):
    import torch

    from evaluators.corpora import Corpus, calibration_windows, evaluation_windows
    from evaluators.perplexity import perplexity
    from orchestrator.models.loading import load_model, load_tokenizer
    from orchestrator.models.source import resolve_model

    del root
    torch.set_num_threads(1)
    console = Console()
    directory = resolve_model(SOURCE, "benchmark")
    tokenizer = load_tokenizer(directory)
    held_out = evaluation_windows(
        Corpus.parse("boolq-passages"), tokenizer, sequence_length=HELD_OUT_LENGTH, max_windows=HELD_OUT_WINDOWS
    )
    windows = torch.tensor(
        calibration_windows(Corpus.parse("lambada"), tokenizer, samples=WINDOWS, sequence_length=LENGTH, seed=SEED)
    )
    models = {"as it is": load_model(directory), "with outliers": load_model(directory)}
    make_outliers(models["with outliers"], CHANNELS, FACTOR, SEED)
    figures = {"channels": CHANNELS, "factor": FACTOR, "schemes": SCHEMES, "perplexity": {}}
    figures["largest_logit_change"] = largest_logit_change(*models.values(), held_out[:2])
    for name, model in models.items():
        found = figures["perplexity"][name] = {"fp": perplexity(model, held_out).perplexity}
        for label, scheme in SCHEMES.items():
            console.print(f"{name}: {label} ...")
            with ours_installed(model, ours(scheme, model, windows)):
                found[label] = perplexity(model, held_out).perplexity
    figures["recovered"] = recovered(figures["perplexity"]["with outliers"])
    show(console, figures)
    return figures


def largest_logit_change(model, other, windows):
    """Relative to the largest logit."""
    import torch

    tokens = torch.tensor(np.asarray(windows))
    with torch.inference_mode():
        logits, others = (each(input_ids=tokens, use_cache=False).logits.float() for each in (model, other))
    return ((logits - others).abs().max() / logits.abs().max()).item()


def recovered(found):
    """Of the log-perplexity that RTN loses, the share that each method wins back."""
    lost = {label: np.log(value / found["fp"]) for label, value in found.items()}
    return {label: float(1 - lost[label] / lost[baseline]) for label, baseline in RECOVERED.items()}


def show(console, figures):
    copy = f"{figures['channels']} channels {figures['factor']} times larger"
    table = Table(title=f"SmolLM2-135M, {WINDOWS} x {LENGTH} tokens; {copy}")
    table.add_column("perplexity")
    for name in figures["perplexity"]:
        table.add_column(name, justify="right")
    for label in ("fp", *SCHEMES):
        table.add_row(label, *(f"{found[label]:.2f}" for found in figures["perplexity"].values()))
    console.print(table)
    console.print(f"largest change of an fp logit: {figures['largest_logit_change']:.1e} of the largest")
    console.print(f"recovered of what RTN loses: {json.dumps(figures['recovered'])}")
