"""Every method with `preset: as_published` beside the code that its authors released, on the same model and tokens.

Perplexity of the whole model, and of each linear of the first block tr((W-Q) H (W-Q)^T) / tr(W H W^T) with H from the
float32 model's inputs, rescalings undone. Of methods that go linear by linear the same of every linear, with ours on
the inputs that the release's code sees there. The releases are no part of this repository: `--sources` is a folder of
their clones. Sides and settings run in processes of their own, as many at once as there are cores: nothing is timed.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.benchmarks.harness import HELD_OUT_LENGTH, HELD_OUT_WINDOWS, LENGTH, ONE_THREAD, SOURCE, WINDOWS
from tests.benchmarks.originals.layers import ALL_AT_ONCE, first_inputs, heard
from tests.benchmarks.originals.releases import RELEASES, check
from tests.benchmarks.originals.settings import SETTINGS

SEEDS = (0,)
SIDES = {"original": ("original",), "ours": ("ours",), "ours in float32": ("ours", "--float32")}


def measure(root, sources, only=(), seeds=SEEDS):
    from evaluators.corpora import Corpus, calibration_windows, evaluation_windows
    from orchestrator.models.loading import load_tokenizer
    from orchestrator.models.source import resolve_model

    sources = sources.resolve()
    check(sources)
    if unknown := set(only) - SETTINGS.keys():
        raise SystemExit(f"no settings {sorted(unknown)}; there are {list(SETTINGS)}")
    names = [name for name in SETTINGS if not only or name in only]
    directory = resolve_model(SOURCE, "benchmark")
    tokenizer = load_tokenizer(directory)
    held_out = evaluation_windows(
        Corpus.parse("boolq-passages"), tokenizer, sequence_length=HELD_OUT_LENGTH, max_windows=HELD_OUT_WINDOWS
    )
    console, figures = Console(), {}
    for seed in seeds:
        tokens = calibration_windows(
            Corpus.parse("lambada"), tokenizer, samples=WINDOWS, sequence_length=LENGTH, seed=seed
        )
        figures[seed] = measure_seed(root, console, names, sources, directory, tokens, held_out)
        show(console, figures[seed], f"the released code and ours, SmolLM2-135M, calibration seed {seed}")
    if len(figures) > 1:
        for name, ratio in mean_ratios(figures).items():
            console.print(f"{name}: perplexity, ours by the original's, mean of the seeds: {ratio:.4f}")
    return {"releases": {release.address: release.commit for release in RELEASES.values()}, "seeds": figures}


def measure_seed(root, console, names, sources, directory, tokens, held_out):
    """The figures of each setting in `names`, calibrated with `tokens`."""
    log = root / "outputs" / "benchmarks" / "originals.log"
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        files = {"--model": directory, "--tokens": scratch / "tokens.npy", "--held-out": scratch / "held_out.npy"}
        np.save(files["--tokens"], tokens)
        np.save(files["--held-out"], held_out)
        weights, hessians = first_block(directory, tokens)

        def run(name, label):
            out = scratch / f"{name} {label}".replace(" ", "-")
            side, *flags = SIDES[label]
            command = [sys.executable, "-m", "tests.benchmarks.originals.side", side, name, *flags, "--out", out]
            command += ["--sources", sources, *(part for pair in files.items() for part in pair)]
            with log.open("a") as lines:
                subprocess.run(command, check=True, cwd=root, env=os.environ | ONE_THREAD, stdout=lines, stderr=lines)
            console.print(f"{name}: {label} done")
            return read_side(out, weights, hessians)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pending = {(name, label): pool.submit(run, name, label) for name in names for label in SIDES}
            sides = {key: future.result() for key, future in pending.items()}
    return {name: compare(*(sides[name, label] for label in SIDES)) for name in names}


def mean_ratios(figures):
    """Of each setting with perplexities, the mean over seeds of ours divided by the original's."""
    first = next(iter(figures.values()))
    return {
        name: fmean(found[name]["ours"] / found[name]["perplexity"] for found in figures.values())
        for name in first
        if first[name]["perplexity"]
    }


def first_block(directory, tokens):
    """The float32 weights of the first block's linears and H = X X^T of their inputs, float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    layer = model.model.layers[0]
    linears = {name: layer.get_submodule(name) for name in ALL_AT_ONCE[0]}
    hessians = {name: torch.zeros(linear.in_features, linear.in_features).double() for name, linear in linears.items()}

    def listen(name, given, _):
        rows = given.flatten(0, -2)
        hessians[name] += (rows.T @ rows).double()

    with torch.no_grad():
        states, arguments = first_inputs(model, torch.from_numpy(tokens)[:, None])
        with heard(linears, listen):
            for state in states:
                layer(state, **arguments)
    return {name: linear.weight.detach().double() for name, linear in linears.items()}, hessians


def read_side(out, weights, hessians):
    """A side's `result.json`, with the relative output error of each linear of the first block."""
    from safetensors.torch import load_file

    from quantizers.linalg import quadratic_form

    errors = {}
    for name, quantized in load_file(out / "first.safetensors").items():
        difference, hessian = weights[name] - quantized.double(), hessians[name]
        errors[name] = (quadratic_form(difference, hessian) / quadratic_form(weights[name], hessian)).item()
    return json.loads((out / "result.json").read_text()) | {"errors": errors}


def compare(original, ours, exact):
    def ratios(side):
        return {name: side["errors"][name] / error for name, error in original["errors"].items()}

    figures = {"perplexity": original["perplexity"], "ours": ours["perplexity"]}
    figures |= {"error_ratios": ratios(ours), "float32_error_ratios": ratios(exact), "errors": original["errors"]}
    figures["in_step"] = original["in_step"]
    for label, side in (("choices_equal", ours), ("float32_choices_equal", exact)):
        # Those of the first block come first, and ours in float32 has no others.
        pairs = list(zip(original["choices"], side["choices"], strict=False))
        figures[label] = [sum(one == other for one, other in pairs), len(pairs)]
    return figures


def show(console, figures, title):
    table = Table(title=title)
    for heading in (
        "",
        "original",
        "ours",
        "ratio",
        "first block's errors",
        "in float32",
        "equal choices",
        "in float32",
    ):
        table.add_column(heading, justify="right")
    for name, found in figures.items():
        perplexities = ("", "", "")
        if found["perplexity"]:
            ratio = found["ours"] / found["perplexity"]
            perplexities = (f"{found['perplexity']:.3f}", f"{found['ours']:.3f}", f"{ratio:.4f}")
        spans = (
            f"{min(each.values()):.4f} to {max(each.values()):.4f}"
            for each in (found["error_ratios"], found["float32_error_ratios"])
        )
        counts = (
            "{} of {}".format(*found[label]) if found[label][1] else ""
            for label in ("choices_equal", "float32_choices_equal")
        )
        table.add_row(name, *perplexities, *spans, *counts)
    console.print(table)
    show_in_step(console, figures)


def show_in_step(console, figures):
    table = Table(title="ours on the inputs that the released code sees, float32: errors by the original's")
    for heading in ("", "linears", "mean", "least to largest", "within 2%", "weights equal"):
        table.add_column(heading, justify="right")
    for name, found in figures.items():
        if found["in_step"]:
            ratios = [each["ratio"] for each in found["in_step"]]
            near = sum(abs(ratio - 1) <= 0.02 for ratio in ratios)
            span = f"{min(ratios):.4f} to {max(ratios):.4f}"
            equal = fmean(each["equal"] for each in found["in_step"])
            table.add_row(name, str(len(ratios)), f"{fmean(ratios):.4f}", span, str(near), f"{equal:.2%}")
    console.print(table)
