"""What planning costs at scale: 100,000 cells planned, scheduled and handed out to 32 workers. No peer, no Ray.

Jobs take heavy-tailed times (Pareto, shape 1.5) in a simulated clock. Beside the times stands the makespan over its
lower bound: an even share of all, or the longest chain.
"""

import heapq
import random
import time

from rich.console import Console

from tests.benchmarks.made_up import document, made_up, show

WORKERS = 32
MODELS = 10


def measure(root):
    from orchestrator.plan import make_plan
    from orchestrator.schedule import Schedule

    del root
    sweep, inputs = made_up(document(MODELS, seeds=40))
    started = time.perf_counter()
    plan = make_plan(sweep, inputs.identities)
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
    show(Console(), f"Planning for {WORKERS} workers", figures)
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
