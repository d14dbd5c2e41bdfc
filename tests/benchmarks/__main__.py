"""`make bench`: each benchmark measures ratios in one run and writes outputs/benchmarks/*.json."""

import argparse
import importlib
import json
from pathlib import Path

# Each against another implementation in one run.
QUANTIZATION = {
    "gptq": "GPTQ W4 g64 against llm-compressor: perplexity and wall time",
    "awq": "AWQ W4 g64 against llm-compressor: perplexity and wall time",
    "smoothquant": "SmoothQuant W8A8 against llm-compressor: perplexity and wall time",
}
EVALUATION = {
    "tasks": "log-likelihood tasks against lm-eval's HFLM at its best batch size: wall time, tokens, rate",
    "generation": "texts on GSM8K against lm-eval's HFLM at its best batch size: the same texts, wall time",
}
# Not run unless named: they are checks or measure no peer, and memory writes 16 GB.
OTHERS = {
    "schedule": "planning 100,000 cells and handing out their jobs to 32 workers: seconds, and the makespan",
    "cluster": "4 simulated nodes of 8 NPUs, real Ray and driver, jobs asleep: how busy workers are kept",
    "chaos": "a sweep on two simulated nodes under 30 random kills: the tables of an undisturbed run",
    "resume": "resuming a sweep with 100,000 finished jobs until its first job: seconds of each step, peak memory",
    "sharing": "21 cells on 2 workers: what is made once; against one process, and llm-compressor + lm-eval in a loop",
    "agreement": "log-likelihoods and metrics item by item against lm-eval's HFLM",
    "outliers": "what SmoothQuant and AWQ recover on a copy of the model with activation outliers",
    "profile": "where the time of GPTQ, AWQ and SmoothQuant goes, against the peak of matrix products",
    "openpangu": "a sweep on a random checkpoint of openPangu 1B's shape: time, peak memory, and what the plan said",
    "search": "mixed bits by search against the best uniform cell, the knapsack, TPE and chance, on held-out text",
    "search_speed": "a probe of the search against quantizing for every trial, and what prefix reuse saves",
    "originals": "every method as published against its authors' released code: perplexity, first block's errors",
    "memory": "peak memory of quantizing a synthetic 7B checkpoint block by block",
}
BENCHMARKS = QUANTIZATION | EVALUATION | OTHERS
SEEDED = {*QUANTIZATION, "search"}


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items()))
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="calibration seeds of gptq, awq, smoothquant (three by default), search and originals (one)",
    )
    parser.add_argument(
        "--sources", type=Path, help="for originals: a folder of clones; what is missing is told with its command"
    )
    parser.add_argument("--settings", nargs="+", default=(), help="of originals: some of its settings alone")
    args = parser.parse_args()
    names = args.names or [*QUANTIZATION, *EVALUATION]
    if "originals" in names and args.sources is None:
        parser.error("originals needs --sources, a folder of the releases' clones")
    seeds = {"seeds": args.seeds} if args.seeds else {}
    options = dict.fromkeys(SEEDED, seeds)
    options["originals"] = seeds | {"sources": args.sources, "only": args.settings}
    root = Path(__file__).resolve().parents[2]
    results = root / "outputs" / "benchmarks"
    results.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
        measure = importlib.import_module(f"tests.benchmarks.bench_{name}").measure
        figures = measure(root, **options.get(name, {}))
        (results / f"{name}.json").write_text(json.dumps(figures, indent=1))
        print(f"wrote {results / name}.json")


if __name__ == "__main__":
    main()
