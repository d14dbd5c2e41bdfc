"""What a probe of the search costs, against loading, quantizing and evaluating for every trial; and what the base's
hidden states save. One process, one thread."""

import statistics
import tempfile
import time
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from tests.benchmarks.harness import SOURCE

BITS = (2, 3, 4, 5, 6, 8)
WINDOWS, LENGTH = 16, 256
CALIBRATION, CALIBRATION_LENGTH = 16, 512  # as the search's benchmark has it
PROBES, ALONE = 6, 48


def measure(root):
    from orchestrator.models.float_products import fast_products

    with fast_products("cpu"):  # as workers compute
        return _measured(root)


def _measured(root):
    import torch

    from evaluators.corpora import Corpus, calibration_windows
    from evaluators.divergence import Comparison, Recorder
    from evaluators.perplexity import perplexity, window_tokens
    from orchestrator.models.loading import load_model, load_tokenizer
    from orchestrator.models.source import resolve_model
    from orchestrator.scheme import parse_scheme
    from orchestrator.search.bank_files import variants_of
    from orchestrator.search.mixtures import Mixtures
    from orchestrator.search.probe import Probe
    from orchestrator.search.space import make_space
    from orchestrator.search.switches import random_allocation
    from quantizers.apply import StoredBlock, installed
    from quantizers.block_source import InMemory
    from quantizers.stream import linears_of, quantize_blocks

    del root
    torch.set_num_threads(1)
    console = Console()
    directory = resolve_model(SOURCE, "benchmark")
    tokenizer = load_tokenizer(directory)
    corpus = Corpus.parse("lambada")
    seen = CALIBRATION * CALIBRATION_LENGTH // LENGTH
    calibration = torch.tensor(
        calibration_windows(corpus, tokenizer, samples=CALIBRATION, sequence_length=CALIBRATION_LENGTH, seed=0)
    )
    windows = calibration_windows(corpus, tokenizer, samples=seen + WINDOWS, sequence_length=LENGTH, seed=0)[seen:]
    model = load_model(directory)
    # Probes are timed on an RTN bank: what a variant holds changes nothing of what it costs to put it in.
    bank = [parse_scheme({"method": "rtn", "weight_bits": bits, "group_size": 64}, "bank") for bits in BITS]
    space = make_space(linears_of(model), bank)
    with tempfile.TemporaryDirectory() as place:
        artifacts = {
            (scheme.weight_bits, 64): str(stored(scheme, model, Path(place) / str(scheme.weight_bits)))
            for scheme in bank
        }
        reference = []
        perplexity(model, windows, observe=Recorder(window_tokens(windows), lambda _, found: reference.append(found)))
        probe = Probe(Mixtures(model, space, variants_of(artifacts)), windows, reference.__getitem__)
        chance, budget = Random(0), space.budget(3.6, "budget")
        drawn = [random_allocation(space, budget, chance) for _ in range(PROBES)]
        probe.losses(drawn[0], range(2))  # warm
        seconds = [timed(probe.losses, allocation, range(WINDOWS)) for allocation in drawn]
        float_base = (None,) * len(space.groups)
        alone = [(chance.randrange(len(space.groups)), chance.randrange(len(BITS))) for _ in range(ALONE)]
        mixtures = [(*float_base[:place], index, *float_base[place + 1 :]) for place, index in alone]
        whole = sum(timed(probe.losses, mixture, range(2)) for mixture in mixtures)
        began = time.perf_counter()  # the base's own pass is part of what it costs
        for mixture in mixtures:
            probe.losses(mixture, range(2), base=float_base)
        reusing = time.perf_counter() - began
        probe.close()

    def naive(allocation):
        """Load, quantize by GPTQ, evaluate: the time after each."""
        fresh = load_model(directory)
        loaded = time.perf_counter()
        scheme = parse_scheme(
            space.entry(parse_scheme({"method": "gptq", "weight_bits": 3, "group_size": 64}, "x"), allocation), "x"
        )
        blocks = [
            StoredBlock(linears=block.linears)
            for block in quantize_blocks(InMemory(fresh), scheme.build(), calibration)
        ]
        quantized = time.perf_counter()
        comparison = Comparison(window_tokens(windows), reference.__getitem__)
        with installed(fresh, blocks):
            perplexity(fresh, windows, observe=comparison)
        return loaded, quantized, time.perf_counter()

    began = time.perf_counter()
    loaded, quantized, ended = naive(drawn[0])
    one = ended - began
    figures = {
        "naive_seconds": one,
        "naive_load_seconds": loaded - began,
        "naive_quantize_seconds": quantized - loaded,
        "naive_evaluate_seconds": ended - quantized,
        "probe_seconds": statistics.median(seconds),
        "probes_per_naive": one / statistics.median(seconds),
        "sensitivity_seconds": whole / ALONE,
        "sensitivity_seconds_with_reuse": reusing / ALONE,
        "reuse": whole / reusing,
        "windows": WINDOWS,
        "length": LENGTH,
    }
    table = Table(title=f"SmolLM2-135M, {WINDOWS} windows of {LENGTH} tokens, one thread", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}")
    console.print(table)
    return figures


def timed(what, *arguments):
    began = time.perf_counter()
    what(*arguments)
    return time.perf_counter() - began


def stored(scheme, model, directory):
    """An artifact of a scheme."""
    from orchestrator.artifacts import ArtifactWriter
    from quantizers.block_source import InMemory
    from quantizers.stream import quantize_blocks

    writer = ArtifactWriter(directory)
    for block in quantize_blocks(InMemory(model), scheme.build(), None):
        writer.add_block(block)
    return writer.finish(cell="bank").directory
