"""What a resumed driver does before its first job is handed out, with 100,000 jobs finished. No peer, no Ray.

The store is written by the real one, in 2,000 batches, and resumed twice: as a driver that was killed leaves it, with
batches put together while it ran and the latest as they are; and all put together, as a run that ended does. Each is
resumed in a process of its own, in which the plan is made first; the peak of its memory holds plan and imports. Beside
the seconds stands the processor's time, which other work on the machine changes less.
"""

import json
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from tests.benchmarks.made_up import document, made_up
from tests.benchmarks.peers.process_memory import peak_rss_bytes

MODELS = 5
FINISHED = 100_000
JOBS_PER_BATCH = 50
_STEPS = ("open the store", "job states", "finished jobs", "forget", "slices", "estimates", "schedule", "remaining")


def measure(root):
    directory = root / "outputs" / "benchmarks" / "resume"
    shutil.rmtree(directory, ignore_errors=True)
    figures = {}
    for form, command in (("parts", "build"), ("compacted", "compact")):
        built = _in_a_process(command, directory)
        figures[form] = built | {
            "resume": _in_a_process("resume", directory),
            "status": _in_a_process("status", directory),
        }
    shutil.rmtree(directory)
    show(Console(width=120), figures)
    return figures


def _in_a_process(command, directory):
    ran = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_resume", command, directory],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(ran.stdout)


def sweep_of():
    """A sweep, its inputs and its plan."""
    from orchestrator.plan import make_plan

    sweep, inputs = made_up(document(MODELS, seeds=40))
    return sweep, inputs, make_plan(sweep, inputs.identities)


def rows_of(job, inputs, store):
    """Events of a finished job, and what it measured: a value and four windows, or four layers."""
    from cluster.pool import WorkerInfo
    from orchestrator.rows import outcome_rows

    outcome = {
        "layers": [],
        "metrics": [],
        "items": [],
        "protocol": {"sequence_length": 256, "windows": 16},
        "seconds": 40.0,
        "peak_memory_bytes": 1 << 30,
        "quantize_seconds": 40.0,
        "stored_bytes": 1 << 26,
        "published_bits_per_weight": None,
    }
    if job.kind == "quantize":
        sizes = {"out_features": 576, "in_features": 1536, "bits_per_weight": 4.25, "stored_bytes": 1 << 18}
        outcome["layers"] = [{"layer": f"model.layers.{block}.mlp.up", **sizes} for block in range(4)]
    else:
        value = 10 + hash(job.id) % 1000 / 999
        metric = {"metric": "perplexity", "value": value, "stderr": 0.1, "n": 4080, "higher_is_better": False}
        outcome["metrics"] = [metric]
        scores = [value / (index + 1) for index in range(4)]
        outcome["items"] = [
            {"doc_id": index, "metric": "nll", "value": score, "log_likelihoods": [-score], "target": None}
            for index, score in enumerate(scores)
        ]
    began = store.now()
    worker = WorkerInfo(name="npu-0@host", device="910B", process_id=1)
    rows = outcome_rows(
        "large", job, outcome, model=inputs.models[job.cell.model], worker=worker, started_at=began, finished_at=began
    )
    event = {
        "sweep": "large",
        "session": store.session,
        "job_id": job.id,
        "cell_id": job.cell.id,
        "job": job.label,
        "attempt": 1,
        "worker": worker.name,
        "device": worker.device,
    }
    started = event | {"event": "started", "at": began}
    finished = event | {"event": "finished", "status": "ok", "seconds": 40.0, "at": store.now()}
    return {"events": [started, finished], **rows}


def build(directory):
    """Commit what a driver would have, without an end of its session."""
    from orchestrator.config import resolved
    from orchestrator.layout import Layout
    from orchestrator.store import Store

    sweep, inputs, plan = sweep_of()
    layout = Layout(directory)
    began = time.perf_counter()
    with Store(layout) as store:
        layout.sweep.write_text(resolved(sweep), encoding="utf-8")
        begun = {"event": "session_started", "session": store.session, "jobs": len(plan.jobs), "at": store.now()}
        store.commit({"events": [begun]})
        for first in range(0, FINISHED, JOBS_PER_BATCH):
            batch = {}
            for job in plan.jobs[first : min(first + JOBS_PER_BATCH, FINISHED)]:
                for table, rows in rows_of(job, inputs, store).items():
                    batch.setdefault(table, []).extend(rows)
            store.commit(batch)
            assert store.tidy() is None
    return {"jobs": len(plan.jobs), "finished": FINISHED, "build_seconds": time.perf_counter() - began} | _size(
        directory
    )


def compact(directory):
    from orchestrator.layout import Layout
    from orchestrator.store import Store

    with Store(Layout(directory)) as store:
        began = time.perf_counter()
        assert store.compact() is None
        seconds = time.perf_counter() - began
    return {"compact_seconds": seconds, "peak_megabytes": _peak()} | _size(directory)


def _size(directory):
    files = list(directory.rglob("*.parquet"))
    return {"parts": len(files), "megabytes": sum(file.stat().st_size for file in files) / 1e6}


def _peak():
    return peak_rss_bytes() / 2**20


class FirstJob(BaseException):
    """The driver hands out its first job."""


class NoPool:
    """Takes no job."""

    activity = dict

    def __init__(self):
        from cluster.pool import WorkerInfo

        self.workers = {
            f"npu-{index}@host": WorkerInfo(name=f"npu-{index}@host", device="910B", process_id=1) for index in range(8)
        }

    def changes(self):
        return []

    def submit(self, worker, payload):
        raise FirstJob


def resume(directory):
    """Seconds of each step of a driver until the first job."""
    import pyarrow.parquet  # noqa: F401  # reading models and data has imported both by then
    import torch  # noqa: F401

    from orchestrator import sweep as sweep_module
    from orchestrator.history import History
    from orchestrator.layout import Layout
    from orchestrator.store import Store
    from orchestrator.sweep import Driver
    from orchestrator.view import QuietView

    sweep, inputs, plan = sweep_of()
    before, layout, seconds = _peak(), Layout(directory), {}
    began, processor = time.perf_counter(), time.process_time()
    with ExitStack() as stack:
        for owner, name, step in (
            (Store, "__enter__", "open the store"),
            (History, "states", "job states"),
            (sweep_module, "finished_jobs", "finished jobs"),
            (Store, "forget", "forget"),
            (Driver, "_forget_merged_slices", "slices"),
            (Driver, "_estimates", "estimates"),
            (sweep_module, "Schedule", "schedule"),
            (sweep_module, "Remaining", "remaining"),
        ):
            stack.enter_context(_timed(owner, name, step, seconds))
        try:
            with Store(layout) as store:
                driver = Driver(sweep=sweep, plan=plan, inputs=inputs, layout=layout, store=store, pool=NoPool())
                driver.run(QuietView())
        except FirstJob:
            pass
    took = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - processor}
    return took | {"steps": seconds, "megabytes_with_plan": before, "peak_megabytes": _peak()}


@contextmanager
def _timed(owner, name, step, seconds):
    do = getattr(owner, name)

    def timed(*arguments, **options):
        began = time.perf_counter()
        try:
            return do(*arguments, **options)
        finally:
            seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - began

    with patch.object(owner, name, timed):
        yield


def status(directory):
    from orchestrator.status import read_progress

    began, processor = time.perf_counter(), time.process_time()
    done = read_progress(directory).done
    took = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - processor}
    assert done == FINISHED
    return took | {"peak_megabytes": _peak()}


def show(console, figures):
    table = Table(title=f"A driver resumed with {FINISHED:,} jobs finished, until its first job")
    table.add_column("seconds")
    for form, found in figures.items():
        table.add_column(f"{form}: {found['parts']:,} files, {found['megabytes']:.1f} MB", justify="right")
    resumed = [found["resume"] for found in figures.values()]
    for step in _STEPS:
        table.add_row(step, *(f"{took['steps'].get(step, 0.0):.2f}" for took in resumed))
    table.add_row("all", *(f"{took['seconds']:.2f}" for took in resumed))
    table.add_row("of the processor", *(f"{took['processor_seconds']:.2f}" for took in resumed))
    table.add_row("peak MB, the plan's among them", *(f"{took['peak_megabytes']:.0f}" for took in resumed))
    table.add_row("bitatlas status", *(f"{found['status']['seconds']:.2f}" for found in figures.values()))
    console.print(table)


if __name__ == "__main__":
    commands = {"build": build, "compact": compact, "resume": resume, "status": status}
    print(json.dumps(commands[sys.argv[1]](Path(sys.argv[2]))))
