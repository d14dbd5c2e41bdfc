"""A whole sweep on a checkpoint of openPangu-Embedded-1B's real shape, with random weights: time and peak memory of
every job beside what `bitatlas plan` says of them.

26 blocks, vocabulary 153,376, tied, in several files, with a configuration of type PanguEmbedded as published; the
tokenizer is the tests' small one. One worker of one thread. Only time and memory mean anything.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from tests.benchmarks.bench_memory import ONE_THREAD, Shape, write_checkpoint

OPENPANGU_1B = Shape(blocks=26, hidden=1536, intermediate=6144, heads=12, kv_heads=6, tied=True)
TOKENIZER = Path(__file__).parents[1] / "assets" / "openpangu-tiny"
GRID = [
    {"method": "rtn", "weight_bits": [8, 4], "group_size": 128},
    {"method": "gptq", "weight_bits": 4, "group_size": 128},
]


def measure(root, shape=OPENPANGU_1B):
    home = root / "outputs" / "benchmarks"
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".openpangu-") as temporary:
        scratch = Path(temporary)
        size = write_checkpoint(scratch / "model", shape)
        as_published(scratch / "model", shape)
        sweep = scratch / "sweep.yaml"
        sweep.write_text(yaml.safe_dump(document(scratch / "model")))
        foreseen = planned(sweep)
        command = ["run", str(sweep), "--out", str(scratch / "out"), "--no-report"]
        began = time.perf_counter()
        subprocess.run(bitatlas(command), check=True, cwd=root, env=environment(scratch), stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        figures = {"checkpoint_bytes": size, "seconds": seconds, "jobs": compared(scratch / "out", foreseen)}
        figures["perplexities"] = perplexities(scratch / "out")
    show(Console(width=140), figures)
    return figures


def as_published(directory, shape):
    """openPangu's own configuration and tokenizer files in place of Llama's."""
    config = json.loads((TOKENIZER / "config.json").read_text()) | {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": shape.tied,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").unlink(missing_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory / name)


def document(model):
    return {
        "name": "openpangu-1b-shape",
        "models": [{"name": "openpangu-1b-random", "source": str(model)}],
        "grid": GRID,
        "calibration": {"corpus": "lambada", "samples": 4, "sequence_length": 512, "seed": 0},
        "evaluation": {"perplexity": [{"corpus": "boolq-passages", "sequence_length": 1024, "max_windows": 2}]},
        "workers": {"device": "cpu", "count": 1, "threads": 1},
    }


def bitatlas(arguments):
    return [sys.executable, "-c", "from orchestrator.cli import main; main()", *arguments]


def environment(scratch):
    return os.environ | ONE_THREAD | {"XDG_CACHE_HOME": str(scratch / "cache")}


def planned(sweep):
    """What the plan foresees: job id -> seconds (of a machine that was never measured) and peak bytes."""
    from orchestrator.config import read_sweep
    from orchestrator.footprint import peaks
    from orchestrator.forecast import devices_of, forecast
    from orchestrator.inputs import prepare
    from orchestrator.plan import make_plan

    asked = read_sweep(sweep)
    inputs = prepare(asked, str(sweep))
    plan, devices = make_plan(asked, inputs.identities), devices_of(asked.workers)
    seconds = forecast(plan.jobs, inputs, devices, events=[], kept=None).seconds
    bytes_of = peaks(plan.jobs, inputs, devices.kind)
    return {job.id: {"job": job.label, "seconds": seconds[job.id], "peak": bytes_of[job.id]} for job in plan.jobs}


def compared(out, foreseen):
    import pyarrow.parquet as pq

    events = pq.read_table(out / "events").to_pylist()
    return [
        foreseen[event["job_id"]] | {"took": event["seconds"], "peaked": event["peak_memory_bytes"]}
        for event in events
        if event["event"] == "finished"
    ]


def perplexities(out):
    import pyarrow.parquet as pq

    rows = pq.read_table(out / "results").to_pylist()
    return {row["cell_id"]: row["value"] for row in rows if row["metric"] == "perplexity"}


def show(console, figures):
    table = Table(title=f"checkpoint {figures['checkpoint_bytes'] / 1e9:.2f} GB, {figures['seconds']:.0f} s in all")
    for heading in ("job", "s", "s planned", "peak GB", "planned GB", "planned / peak"):
        table.add_column(heading, justify="right" if heading != "job" else "left")
    for job in figures["jobs"]:
        table.add_row(
            job["job"],
            f"{job['took']:.1f}",
            f"{job['seconds']:.1f}",
            f"{job['peaked'] / 1e9:.2f}",
            f"{job['peak'] / 1e9:.2f}",
            f"{job['peak'] / job['peaked']:.2f}",
        )
    console.print(table)
