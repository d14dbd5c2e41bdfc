"""A sweep of real jobs on a simulated two-node cluster while workers, raylets and the driver are killed at random.

`kill -9`, 30 times, with a seed; a dead driver is started again at once, a dead node comes back seconds later. In the
end the tables must equal those of an undisturbed run: no row lost, none twice.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from tests.benchmarks.bench_cluster import cluster

NODES, NPUS = 2, 2
KILLS = 30
SEED = 0
PAUSE_SECONDS = (3.0, 11.0)  # between kills
WORKER, RAYLET, DRIVER = "worker", "raylet", "driver"
WEIGHTS = {WORKER: 6, RAYLET: 2, DRIVER: 2}
AWAY_SECONDS = 4.0  # of a node
# What may differ between two runs of the same work.
CIRCUMSTANCES = {"quantize_seconds", "evaluate_seconds", "peak_memory_bytes", "worker", "device", "started_at"}
CIRCUMSTANCES |= {"finished_at", "seconds"}
LIMIT_SECONDS = 2400


def measure(root):
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
        sweep = write_sweep(scratch)
        calm = ["run", str(sweep), "--no-report", "--out", str(scratch / "calm")]
        with cluster(NODES, NPUS) as made:
            began = time.perf_counter()
            subprocess.run(bitatlas(root, [*calm, "--address", made.address]), check=True, stdout=subprocess.DEVNULL)
            calm_seconds = time.perf_counter() - began
            began = time.perf_counter()
            kills = disturbed(root, sweep, scratch / "chaos", made)
            chaos_seconds = time.perf_counter() - began
        figures = compared(scratch / "calm", scratch / "chaos")
    figures |= {"kills": dict(kills), "undisturbed_seconds": calm_seconds, "seconds": chaos_seconds}
    show(Console(width=120), figures)
    if figures["differences"]:
        raise SystemExit("the tables differ")
    if sum(kills.values()) < KILLS:
        raise SystemExit(f"the sweep ended after {sum(kills.values())} of {KILLS} kills; shorten PAUSE_SECONDS")
    return figures


def bitatlas(root, arguments):
    return [sys.executable, "-c", "from orchestrator.cli import main; main()", *arguments]


def write_sweep(directory):
    """A random model with SmolLM2's tokenizer, which quantizes in a second, and real data."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from orchestrator.models.loading import load_tokenizer
    from orchestrator.models.source import resolve_model
    from tests.benchmarks.harness import SOURCE

    tokenizer = load_tokenizer(resolve_model(SOURCE, "benchmark"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    document = {
        "name": "chaos",
        "models": [{"name": "tiny", "source": str(directory / "model")}],
        "grid": [
            {"method": ["rtn", "gptq", "awq"], "weight_bits": [8, 4, 3, 2], "group_size": 32},
            {"method": "smoothquant", "weight_bits": 8, "activation_bits": 8, "group_size": 32},
        ],
        "calibration": {"corpus": "lambada", "samples": 16, "sequence_length": 128},
        "evaluation": {
            "perplexity": [{"corpus": "boolq-passages", "sequence_length": 256, "max_windows": 16}],
            "tasks": [
                {"name": "arc_easy", "limit": 60, "num_fewshot": 0, "slices": 2},
                {"name": "piqa", "limit": 60, "num_fewshot": 0},
            ],
        },
        "workers": {"device": "simulated-npu"},
    }
    file = directory / "chaos.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def disturbed(root, sweep, out, made):
    """Run the sweep to its end, killing on the way; what was killed how often."""
    chance, kills, log = random.Random(SEED), Counter(), out.with_suffix(".log")
    command = bitatlas(root, ["run", str(sweep), "--no-report", "--out", str(out), "--address", made.address])
    away: dict[float, None] = {}  # when a node comes back

    def start():
        with log.open("a") as stream:
            return subprocess.Popen(command, stdout=stream, stderr=stream)

    driver, deadline = start(), time.monotonic() + LIMIT_SECONDS
    next_kill = time.monotonic() + 15  # the driver has to come up
    while True:
        time.sleep(0.2)
        now = time.monotonic()
        if now > deadline:
            driver.kill()
            raise SystemExit(f"not done after {LIMIT_SECONDS} s:\n{log.read_text()[-3000:]}")
        for due in [due for due in away if due < now]:
            del away[due]
            made.add_node(num_cpus=NPUS, resources={"NPU": NPUS}, object_store_memory=80 * 2**20)
        if (status := driver.poll()) is not None:
            if status == 0:
                return kills
            driver = start()  # killed, or jobs failed: the same command again
        if kills.total() >= KILLS or now < next_kill:
            continue
        next_kill = now + chance.uniform(*PAUSE_SECONDS)
        kind = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if kill(kind, chance, driver, made):
            kills[kind] += 1
            if kind == RAYLET:
                away[now + AWAY_SECONDS] = None


def kill(kind, chance, driver, made):
    """`kill -9` one of a kind; whether there was one."""
    if kind == DRIVER:
        driver.kill()
        return True
    nodes = list(made.worker_nodes)
    if not nodes:
        return False
    if kind == RAYLET:
        node = chance.choice(nodes)
        os.kill(raylet_of(node), signal.SIGKILL)
        made.remove_node(node, allow_graceful=False)
        return True
    workers = [
        child.pid
        for node in nodes
        for child in psutil.Process(raylet_of(node)).children()
        if "ray::" in " ".join(child.cmdline()) and "Agent" not in " ".join(child.cmdline())
    ]
    if not workers:
        return False
    os.kill(chance.choice(sorted(workers)), signal.SIGKILL)
    return True


def raylet_of(node):
    return node.all_processes["raylet"][0].process.pid


def compared(calm, chaos):
    """Rows of both runs, and how many are in one alone."""
    from orchestrator.schema import EVENTS, ITEMS, LAYERS, RESULTS, SLICES
    from orchestrator.store import read_table

    figures, differences = {"rows": {}}, 0
    for table in (RESULTS, ITEMS, LAYERS, SLICES):
        keep = [column for column in table.columns if column not in CIRCUMSTANCES]
        counts = [
            Counter(repr(row) for row in read_table(out, table).select(keep).to_pylist()) for out in (calm, chaos)
        ]
        figures["rows"][table.name] = counts[1].total()
        differences += ((counts[0] - counts[1]) + (counts[1] - counts[0])).total()
    events = read_table(chaos, EVENTS).to_pylist()
    figures["events"] = dict(Counter(event["event"] for event in events))
    figures["retried"] = dict(Counter(event["error_kind"] for event in events if event["event"] == "retried"))
    figures["differences"] = differences
    return figures


def show(console, figures):
    table = Table(title=f"{sum(figures['kills'].values())} kills, {NODES} nodes of {NPUS} simulated NPUs")
    table.add_column("")
    table.add_column("")
    for name, value in figures.items():
        told = (
            ", ".join(f"{key} {count}" for key, count in value.items()) if isinstance(value, dict) else f"{value:.0f}"
        )
        table.add_row(name.replace("_", " "), told)
    console.print(table)
