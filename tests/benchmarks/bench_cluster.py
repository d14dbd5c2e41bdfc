"""How busy a simulated cluster is kept: 4 nodes of 8 NPUs on this machine, real Ray, the real driver and store.

Jobs only sleep, for heavy-tailed times (Pareto, shape 1.5) that the driver has as estimates, so that what is measured
is the schedule, the pool and the driver: how much of the makespan the workers are busy, the makespan over its lower
bound (an even share of all, or the longest chain), and the driver's own time per job.
"""

import logging
import os
import random
import resource
import tempfile
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

from rich.console import Console

from tests.benchmarks.made_up import document, made_up, show

NODES, NPUS = 4, 8
WORKERS = NODES * NPUS
MEAN_SECONDS = 6.0
LONGEST_SECONDS = 60.0


class Sleeper:
    """A worker that sleeps as long as a job is said to take."""

    def __init__(self, *, device, threads, report):
        del device, threads
        self._report = report

    def run(self, payload):
        self._report("asleep")
        seconds = seconds_of(payload["label"])
        time.sleep(seconds)
        shared = {"reused": False, "seconds": seconds, "peak_memory_bytes": None, "stored_bytes": None}
        return shared | {
            "quantize_seconds": None,
            "published_bits_per_weight": None,
            "layers": [],
            "metrics": [],
            "items": [],
            "protocol": {},
        }


def seconds_of(label):
    """Heavy-tailed, and the same in every process."""
    drawn = random.Random(label).paretovariate(1.5)
    return min(MEAN_SECONDS / 3 * drawn, LONGEST_SECONDS)


@contextmanager
def cluster(nodes, npus):
    """Nodes of simulated NPUs beside a head without; its address."""
    import ray
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "dashboard_port": 0}
    )
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=npus, resources={"NPU": npus}, object_store_memory=80 * 2**20)
        made.wait_for_nodes()
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def measure(root):
    from cluster.ray_pool import RayPool
    from cluster.session import ray_session

    del root
    with (
        cluster(NODES, NPUS) as made,
        tempfile.TemporaryDirectory() as directory,
        ray_session(device="simulated-npu", count="auto", threads=1, address=made.address) as session,
        closing(RayPool(session, "tests.benchmarks.bench_cluster:Sleeper")) as pool,
    ):
        figures = sweep(pool, Path(directory) / "out")
    show(Console(), f"{NODES} simulated nodes of {NPUS} NPUs, jobs asleep", figures)
    return figures


def sweep(pool, out):
    from orchestrator.layout import Layout
    from orchestrator.plan import make_plan
    from orchestrator.schema import EVENTS
    from orchestrator.store import Store, read_table
    from orchestrator.sweep import Driver
    from orchestrator.view import QuietView

    dampings = (0.01, 0.02, 0.05, 0.1, 0.2)
    asked, inputs = made_up(document(4, damping=dampings, act_order=[True], workers={"device": "simulated-npu"}))
    plan = make_plan(asked, inputs.identities)
    seconds = {job.id: seconds_of(job.label) for job in plan.jobs}
    assert len(pool.workers) == WORKERS

    class Asleep(Driver):
        """Estimates are the very times."""

        def _estimates(self):
            super()._estimates()
            return seconds

    layout = Layout(out)
    with Store(layout) as store, Watched(pool) as watched:
        driver = Asleep(sweep=asked, plan=plan, inputs=inputs, layout=layout, store=store, pool=watched)
        began, cpu = time.perf_counter(), time.thread_time()
        summary = driver.run(QuietView())
        makespan, spent = time.perf_counter() - began, time.thread_time() - cpu
    assert (summary.finished, summary.failed) == (len(plan.jobs), 0)
    assert read_table(out, EVENTS).num_rows >= 2 * len(plan.jobs)
    total = sum(seconds.values())
    chains = (seconds[job.id] + (seconds[job.needs] if job.needs else 0.0) for job in plan.jobs)
    bound = max(total / WORKERS, *chains)
    return {
        "jobs": len(plan.jobs),
        "makespan_seconds": makespan,
        "lower_bound_seconds": bound,
        "makespan_over_lower_bound": makespan / bound,
        "workers_busy": total / (WORKERS * makespan),
        "driver_cpu_milliseconds_per_job": 1000 * spent / len(plan.jobs),
        "driver_milliseconds_per_job": 1000 * (makespan - watched.waited) / len(plan.jobs),
        "peak_megabytes": watched.peak_bytes / 1e6,
    }


class Watched:
    """A pool, and how long the driver waited in it for jobs to end."""

    def __init__(self, pool):
        self._pool = pool
        self.waited = 0.0
        self.peak_bytes = 0
        self._over = threading.Event()

    def __getattr__(self, name):
        return getattr(self._pool, name)

    def wait(self, seconds):
        began = time.perf_counter()
        done = self._pool.wait(seconds)
        self.waited += time.perf_counter() - began
        return done

    def __enter__(self):
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._sampler.join()

    def _sample(self):
        while not self._over.wait(1.0):
            pages = int(Path(f"/proc/{os.getpid()}/statm").read_text().split()[1])
            self.peak_bytes = max(self.peak_bytes, pages * resource.getpagesize())
