"""What planning costs at scale: 100,000 cells planned, scheduled and handed out to 32 workers. No peer, no Ray.

Jobs take heavy-tailed times (Pareto, shape 1.5) in a simulated clock. Beside the times stands the makespan over its
lower bound: an even share of all, or the longest chain.
"""

import heapq
import random
import time

from rich.console import Console
from rich.table import Table

WORKERS = 32
MODELS = 10
DOCUMENT = {
    "name": "large",
    "models": [{"name": f"m{index}", "source": f"far/m{index}"} for index in range(MODELS)],
    "grid": [
        {
            "method": "gptq",
            "weight_bits": [1, 2, 3, 4, 5, 6, 7, 8],
            "group_size": [32, 64, 128, "per_channel"],
            "options": {"damping": [0.01, 0.02, 0.05, 0.1], "act_order": [True, False]},
        }
    ],
    "calibration": [{"corpus": "lambada", "samples": 8, "sequence_length": 128, "seed": seed} for seed in range(40)],
    "evaluation": {"perplexity": [{"corpus": "boolq-passages", "sequence_length": 256}]},
}


def measure(root):
    from orchestrator.config import parse_sweep
    from orchestrator.plan import Identities, make_plan
    from orchestrator.schedule import Schedule

    del root
    sweep = parse_sweep(DOCUMENT, "large.yaml")
    evaluation, models = sweep.evaluation.perplexity[0], [model.name for model in sweep.models]
    identities = Identities(
        models={model: f"weights of {model}" for model in models},
        calibrations={(model, item.key): item.key for model in models for item in sweep.calibration},
        evaluations={(model, evaluation.key): "tokens" for model in models},
    )
    started = time.perf_counter()
    plan = make_plan(sweep, identities)
    planned = time.perf_counter() - started
    draw = random.Random(0)
    seconds = {job.id: draw.paretovariate(1.5) for job in plan.jobs}
    started = time.perf_counter()
    schedule = Schedule(plan.jobs, seconds=seconds)
    scheduled = time.perf_counter() - started
    started = time.perf_counter()
    makespan = run(schedule, seconds)
    handed_out = time.perf_counter() - started
    chains = (seconds[job.id] + (seconds[job.needs] if job.needs else 0.0) for job in plan.jobs)
    figures = {
        "cells": len(plan.cells),
        "jobs": len(plan.jobs),
        "plan_seconds": planned,
        "schedule_seconds": scheduled,
        "milliseconds_per_job": 1000 * handed_out / len(plan.jobs),
        "makespan_over_lower_bound": makespan / max(sum(seconds.values()) / WORKERS, *chains),
    }
    show(Console(width=120), figures)
    return figures


def run(schedule, seconds):
    """Simulated seconds until all is done."""
    now, ends, idle = 0.0, [], [f"npu-{index:02}" for index in range(WORKERS)]
    while not schedule.done:
        waiting = []
        for worker in idle:
            job = schedule.next_for(worker)
            if job is None:
                waiting.append(worker)
            else:
                heapq.heappush(ends, (now + seconds[job.id], worker))
        now, worker = heapq.heappop(ends)
        schedule.finish(worker)
        idle = [*waiting, worker]
    return now


def show(console, figures):
    table = Table(title=f"Planning for {WORKERS} workers")
    for name in figures:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row(*(f"{value:,}" if isinstance(value, int) else f"{value:.3f}" for value in figures.values()))
    console.print(table)
