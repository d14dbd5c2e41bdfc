"""What a sweep shares, and what that is worth: seven methods at three settings each, two workers of one thread.

From the events of the real sweep (`bitatlas run`, real Ray): each model is loaded once per worker, each artifact made
once, each set of statistics of the float model computed once. Its wall time stands against the same driver with one
worker in one process (`InlinePool`): the first blocks of SmolLM2 and little calibration, so that 21 cells take
minutes. On the grid's twelve cells that llm-compressor can do too, whole model and more calibration, it stands against
a shell loop of llm-compressor and lm-eval (`shell_loop.py`). Every side starts with an empty cache, but for the
converted model, and its own start is in its time.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from tests.benchmarks.bench_chaos import bitatlas
from tests.benchmarks.harness import SOURCE
from tests.benchmarks.peers.environment import ensure
from tests.benchmarks.shell_loop import Cell, Loop, write_definitions
from tests.benchmarks.timed import timed

WORKERS = 2
LIMIT = 25  # documents
CALIBRATION = {"corpus": "lambada", "samples": 16, "sequence_length": 512, "seed": 0}
GRID_BLOCKS = 6  # of 30
GRID_CALIBRATION = {"corpus": "lambada", "samples": 8, "sequence_length": 256, "seed": 0}
PERPLEXITY = {"corpus": "boolq-passages", "sequence_length": 512, "max_windows": 2}
# BiLLM is of one bit alone: three settings of it. Searches of it and of SliM-LLM are cut short, as in `bitatlas demo`.
GRID = [
    {"method": ["billm"], "weight_bits": [1], "options": {"max_salient": [2, 4, 8]}},
    {"method": ["rtn", "gptq", "gptaq", "awq"], "weight_bits": [4, 3, 2], "group_size": 64},
    {"method": ["smoothquant"], "weight_bits": [8, 4, 3], "activation_bits": 8},
    {
        "method": ["slim_llm"],
        "weight_bits": [4, 3, 2],
        "group_size": 64,
        "options": {"search_steps": 10, "allocation_tokens": 1024},
    },
]
PEERS = ("rtn", "gptq", "awq", "smoothquant")
BOTH = {  # the cells of the grid that llm-compressor can do
    f"{method} W{bits}": Cell(
        scheme=entry | {"method": method, "weight_bits": bits},
        peer=f"llmcompressor_{method}.py",
        peer_flags=("--bits", str(bits)),
    )
    for entry in GRID
    for method in entry["method"]
    for bits in entry["weight_bits"]
    if method in PEERS
}
SHARED = ("model_loaded", "statistics_computed", "statistics_read", "artifact_made")  # events
KINDS = ("seconds", "cpu_seconds")
STEPS = ("quantize", "evaluate")
THREADS_PROBE = "gptq W4"  # the cell by which the loop's and the single process's number of threads is chosen


def measure(root):
    from evaluators.corpora import Corpus, calibration_windows, evaluation_windows
    from orchestrator.models.loading import load_tokenizer
    from orchestrator.models.source import resolve_model

    python, console = ensure(root), Console(width=120)
    model = resolve_model(SOURCE, "benchmark")
    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        tokens = calibration_windows(
            Corpus.parse(CALIBRATION["corpus"]),
            tokenizer,
            samples=CALIBRATION["samples"],
            sequence_length=CALIBRATION["sequence_length"],
            seed=CALIBRATION["seed"],
        )
        np.save(scratch / "tokens.npy", tokens)
        windows = evaluation_windows(
            Corpus.parse(PERPLEXITY["corpus"]),
            tokenizer,
            sequence_length=PERPLEXITY["sequence_length"],
            max_windows=PERPLEXITY["max_windows"],
        )
        write_definitions(scratch / "definitions", tokenizer, windows)
        log = root / "outputs" / "benchmarks" / "sharing.log"
        loop = Loop(
            root=root,
            python=python,
            model=model,
            tokens=scratch / "tokens.npy",
            definitions=scratch / "definitions",
            limit=LIMIT,
            log=log,
        )
        sides = Sides(root, scratch, model, log)
        first_blocks(model, scratch / "model")
        figures = {"load_before": os.getloadavg()}
        console.print("the shell loop ...")
        figures["loop"] = shell_loop(loop, scratch)
        console.print(f"{len(BOTH)} cells by {WORKERS} workers ...")
        figures["same_cells"] = sides.ours("both", document("both", [cell.scheme for cell in BOTH.values()]))
        console.print(f"the grid by {WORKERS} workers ...")
        figures["grid"] = sides.ours("grid", small("grid", GRID, scratch))
        console.print("the grid by one process ...")
        figures["inline"] = sides.inline("grid", small("probe", [BOTH[THREADS_PROBE].scheme], scratch))
        figures["load_after"] = os.getloadavg()
    conclude(figures)
    show(console, figures)
    return figures


def shell_loop(loop, scratch):
    """Every cell of both, one after the other, with the number of threads that is faster for each kind of process."""
    # Outside of the loop's time; it leaves lm-eval's data prepared, too.
    evaluating = faster({n: loop.evaluate(loop.model, scratch / f"fp-{n}", n)[0] for n in (1, 2)})
    probe = BOTH[THREADS_PROBE]
    quantizing = faster({n: loop.quantize(probe, scratch / f"probe-{n}", n) for n in (1, 2)})
    cells = {}
    for number, (name, cell) in enumerate(BOTH.items()):
        if cell is probe:  # which is this very process
            out, quantize = scratch / f"probe-{quantizing['threads']}", quantizing["probes"][str(quantizing["threads"])]
        else:
            out = scratch / f"peer-{number}"
            quantize = loop.quantize(cell, out, quantizing["threads"])
        evaluate, found = loop.evaluate(out, scratch / f"peer-results-{number}", evaluating["threads"])
        cells[name] = {"quantize": quantize, "evaluate": evaluate} | found
    took = {kind: sum(cell[step][kind] for cell in cells.values() for step in STEPS) for kind in KINDS}
    return took | {"cells": cells, "quantizing": quantizing, "evaluating": evaluating}


def faster(probes):
    """The number of threads with the least wall time, of those that were tried."""
    return {
        "threads": min(probes, key=lambda threads: probes[threads]["seconds"]),
        "probes": {str(threads): took for threads, took in probes.items()},
    }


class Sides:
    """Ours, with Ray and without."""

    def __init__(self, root, scratch, model, log):
        self._root, self._scratch, self._model, self._log = root, scratch, model, log

    def ours(self, name, sweep):
        """`bitatlas run` from its start to its end: seconds, where they went, what was shared and what it found."""
        file = self._scratch / f"{name}.yaml"
        file.write_text(yaml.safe_dump(sweep))
        out = self._scratch / f"{name}-ray"
        began = time.time()
        took = self._timed(f"{name}-ray", bitatlas(self._root, ["run", str(file), "--out", str(out), "--no-report"]))
        plan = planned(file)
        return (
            {"cells": sum(cell.scheme is not None for cell in plan.cells), "jobs": len(plan.jobs)}
            | took
            | {"where": where(events(out), began, took["seconds"]), "counts": counts(events(out), plan)}
            | {"found": found(out)}
        )

    def inline(self, name, of_one_cell):
        """The same sweep in one process, after its number of threads was chosen by a sweep of one cell."""
        probe = self._scratch / "probe.yaml"
        probe.write_text(yaml.safe_dump(of_one_cell))
        chosen = faster({n: self._inline(probe, f"probe-{n}", n) for n in (1, 2)})
        took = self._inline(self._scratch / f"{name}.yaml", name, chosen["threads"])
        counted = counts(events(self._scratch / f"{name}-inline"), planned(self._scratch / f"{name}.yaml"))
        return took | {"counts": counted} | chosen

    def _inline(self, file, name, threads):
        command = [sys.executable, "-m", "tests.benchmarks.ours", "sweep", "--file", str(file)]
        command += ["--threads", str(threads), "--out", str(self._scratch / f"{name}-inline")]
        return self._timed(f"{name}-inline", command, threads)

    def _timed(self, name, command, threads=1):
        """Times of a command with a cache of its own, in which nothing is but the converted model."""
        cache = self._scratch / f"cache-{name}"
        (cache / "bitatlas").mkdir(parents=True)
        (cache / "bitatlas" / "models").symlink_to(self._model.parent)
        # Ray starts its workers at niceness 15: beside other work they would get less than the loop's processes do.
        variables = {"XDG_CACHE_HOME": str(cache), "RAY_worker_niceness": "0"}
        return timed(command, root=self._root, log=self._log, threads=threads, variables=variables)


def document(name, grid):
    return {
        "name": name,
        "models": [{"name": "smollm2-135m", "source": SOURCE}],
        "grid": grid,
        "calibration": CALIBRATION,
        "evaluation": {"perplexity": [PERPLEXITY], "tasks": [{"name": "arc_easy", "limit": LIMIT, "num_fewshot": 0}]},
        "workers": {"device": "cpu", "count": WORKERS, "threads": 1},
    }


def first_blocks(model, out):
    """A checkpoint of the model's first blocks."""
    from orchestrator.models.loading import load_model, load_tokenizer

    whole = load_model(model)
    whole.model.layers = whole.model.layers[:GRID_BLOCKS]
    whole.config.num_hidden_layers = GRID_BLOCKS
    whole.save_pretrained(out)
    load_tokenizer(model).save_pretrained(out)


def small(name, grid, scratch):
    """A sweep over the first blocks."""
    models = [{"name": "first-blocks", "source": str(scratch / "model")}]
    return document(name, grid) | {"models": models, "calibration": GRID_CALIBRATION}


def planned(file):
    from orchestrator.config import read_sweep
    from orchestrator.inputs import prepare
    from orchestrator.plan import make_plan

    sweep = read_sweep(file)
    return make_plan(sweep, prepare(sweep, str(file)).identities)


def events(out):
    from orchestrator.schema import EVENTS
    from orchestrator.store import read_table

    return read_table(out, EVENTS).to_pylist()


def found(out):
    """Cell -> its perplexity and accuracy."""
    from orchestrator.schema import RESULTS
    from orchestrator.store import read_table

    rows = read_table(out, RESULTS, ["cell_id", "metric", "value"]).to_pylist()
    cells = {row["cell_id"]: {} for row in rows}
    for row in rows:
        if row["metric"] in {"perplexity", "acc"}:
            cells[row["cell_id"]][row["metric"]] = row["value"]
    return cells


def counts(rows, plan):
    """How often what can be shared was made, from the events; `is_once`: once each, and nothing is missing.

    Returns:
        `times`: what is shared -> for each of them, how often it was made.
    """
    from quantizers.stream import needs_shared, shares_hessians

    jobs = {job.id: job for job in plan.jobs}

    def statistics_of(cell):
        """What tells statistics apart: model, calibration, whether Hessians are among them."""
        return cell.model, cell.calibration.key, shares_hessians(cell.scheme.build())

    happened = {name: [(row, jobs[row["job_id"]]) for row in rows if row["event"] == name] for name in SHARED}
    evaluated = [(row, jobs[row["job_id"]]) for row in rows if row["event"] == "finished"]
    quantized = [cell for cell in plan.cells if cell.scheme]
    sharing = [cell for cell in quantized if cell.calibration and needs_shared(cell.scheme.build())]
    made = {
        "loads per worker and model": [(row["worker"], job.cell.model) for row, job in happened["model_loaded"]],
        "artifacts per cell": [job.cell.id for _, job in happened["artifact_made"]],
        "computations per statistics": [statistics_of(job.cell) for _, job in happened["statistics_computed"]],
    }
    wanted = {
        "loads per worker and model": {(row["worker"], job.cell.model) for row, job in evaluated if job.evaluation},
        "artifacts per cell": {cell.id for cell in quantized},
        "computations per statistics": {statistics_of(cell) for cell in sharing},
    }
    return {
        "times": {name: sorted(Counter(each).values()) for name, each in made.items()},
        "is_once": all(len(each) == len(set(each)) and set(each) == wanted[name] for name, each in made.items()),
        "events": {name: len(each) for name, each in happened.items()},
        "seconds": {name: sum(row["seconds"] for row, _ in each) for name, each in happened.items()},
        "cells_with_shared_statistics": len(sharing),
    }


def where(rows, began, seconds):
    """Where a sweep's wall time went: until the first job, workers at jobs and without one, after the last job."""
    started = [row["at"].timestamp() for row in rows if row["event"] == "started"]
    ended = [row for row in rows if row["event"] in {"finished", "reused"}]
    first, last = min(started), max(row["at"].timestamp() for row in ended)
    busy = sum(row["seconds"] for row in ended)
    return {
        "before_the_first_job": first - began,
        "worker_seconds_at_jobs": busy,
        "worker_seconds_without_a_job": WORKERS * (last - first) - busy,
        "after_the_last_job": began + seconds - last,
    }


def conclude(figures):
    """The ratios."""
    loop, same, grid, inline = (figures[name] for name in ("loop", "same_cells", "grid", "inline"))
    figures["sides"] = {
        name: {kind: side[kind] for kind in KINDS} | {"cells": cells, "cells_per_hour": 3600 * cells / side["seconds"]}
        for name, side, cells in (
            ("loop, the cells of both", loop, len(loop["cells"])),
            ("ours, the cells of both", same, same["cells"]),
            ("ours, the grid", grid, grid["cells"]),
            ("ours, the grid in one process", inline, grid["cells"]),
        )
    }
    for kind in KINDS:
        figures[f"loop_times_ours_{kind}"] = loop[kind] / same[kind]
        figures[f"one_process_times_ours_{kind}"] = inline[kind] / grid[kind]


def show(console, figures):
    loop = figures["loop"]
    threads = f"{loop['quantizing']['threads']} threads, then {loop['evaluating']['threads']}"
    table = Table(title=f"the shell loop ({threads}): wall seconds, and of the processor")
    for heading in ("cell", "llm-compressor", "CPU", "lm-eval", "CPU", "perplexity", "ARC-e"):
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    for name, cell in loop["cells"].items():
        times = (f"{cell[step][kind]:.1f}" for step in STEPS for kind in KINDS)
        table.add_row(name, *times, f"{cell['perplexity']:.3f}", f"{cell['accuracy']:.3f}")
    console.print(table)
    table = Table(title=f"SmolLM2-135M, {WORKERS} workers of one thread, start and end included")
    for heading in ("", "cells", "wall s", "CPU s", "cells per hour"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, side in figures["sides"].items():
        times = (f"{side[kind]:.1f}" for kind in KINDS)
        table.add_row(name, str(side["cells"]), *times, f"{side['cells_per_hour']:.0f}")
    console.print(table)
    for name in ("same_cells", "grid"):
        took = ", ".join(f"{what.replace('_', ' ')} {took:.1f}" for what, took in figures[name]["where"].items())
        console.print(f"{name.replace('_', ' ')}: {took}", highlight=False)
    for name in ("same_cells", "grid", "inline"):
        console.print(f"{name.replace('_', ' ')}: {figures[name]['counts']}", highlight=False)
    for against in ("loop", "one_process"):
        ratios = (f"{figures[f'{against}_times_ours_{kind}']:.2f}" for kind in KINDS)
        console.print(f"{against} / ours, wall and processor: {', '.join(ratios)}", highlight=False)
    if not all(figures[name]["counts"]["is_once"] for name in ("same_cells", "grid", "inline")):
        raise SystemExit("something was made more than once, or nothing tells")
