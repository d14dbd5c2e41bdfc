"""A real cluster of two nodes of which one does not see the output directory, and then is lost."""

import os
import signal
import time
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster import actor
from cluster.ray_pool import RayPool
from cluster.session import ray_session
from orchestrator import recovery
from orchestrator.inputs import prepare
from orchestrator.layout import Layout
from orchestrator.plan import make_plan
from orchestrator.schema import EVENTS, RESULTS
from orchestrator.store import Store, read_table
from orchestrator.sweep import Driver
from orchestrator.view import QuietView
from orchestrator.witness import left_witness
from orchestrator.worker import Worker

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A node that sees what the driver sees, and one that has another directory there."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "dashboard_port": 0}
    )
    seeing, blind = (made.add_node(num_cpus=2, resources={"NPU": 1}) for _ in range(2))
    made.wait_for_nodes()
    yield SimpleNamespace(address=made.address, seeing=seeing, blind=blind)
    ray.shutdown()
    made.shutdown()


class Unhurried(Worker):
    """Has imported what it needs, and takes its time: no node does everything before the other has begun. The one that
    sees the output takes more of it where it quantizes, so that the other one has artifacts of its own."""

    def __init__(self, **given):
        from transformers import LlamaForCausalLM  # noqa: F401 - for seconds, on a busy machine for many

        super().__init__(**given)

    def run(self, payload):
        time.sleep(2.0 if payload["kind"] == "quantize" and payload["sees_output"] else 0.5)
        return super().run(payload)


class Noting(QuietView):
    def __init__(self, then=None):
        self.warnings, self._then = [], then

    def warn(self, text):
        self.warnings.append(text)

    def attempted(self, job, completion, *, retry=False):
        if self._then:
            self._then(job, completion)


@pytest.fixture
def run(nodes, make_sweep, tiny_checkpoint, tmp_path, monkeypatch):
    start_actor, cache = actor.start, tmp_path / "node"

    def start_there(recipe, place):
        if place.node_id == nodes.blind.node_id:
            witness = replace(recipe.witness, token="another machine's")
            recipe = replace(recipe, witness=witness, environment={"XDG_CACHE_HOME": str(cache)})
        return start_actor(recipe, place)

    monkeypatch.setattr(actor, "start", start_there)
    sweep = make_sweep(
        models=[{"name": "tiny", "source": str(tiny_checkpoint)}],
        grid=[{"method": "rtn", "weight_bits": [8, 6, 5, 4, 3, 2], "group_size": 32}],
        calibration=None,
        evaluation={"perplexity": [{"corpus": "boolq-passages", "sequence_length": 64, "max_windows": 2}]},
        workers={"device": "simulated-npu", "count": 2},
    )
    inputs = prepare(sweep, "study.yaml")
    plan = make_plan(sweep, inputs.identities)

    def start(out, then=None, processes=None):
        layout, view = Layout(tmp_path / out), Noting(then)
        with (
            ray_session(device="simulated-npu", count=2, threads=1, address=nodes.address) as session,
            left_witness(layout.root) as witness,
            closing(RayPool(session, "tests.orchestrator.test_unshared_cluster:Unhurried", witness=witness)) as pool,
            Store(layout) as store,
        ):
            (blind,) = (info.node for info in pool.workers.values() if not info.sees_output)
            assert len(pool.workers) == 2
            if processes is not None:
                processes |= {name: info.process_id for name, info in pool.workers.items() if not info.sees_output}
            summary = Driver(sweep=sweep, plan=plan, inputs=inputs, layout=layout, store=store, pool=pool).run(view)
        assert (summary.failed, summary.left) == (0, 0)
        rows = read_table(layout.root, RESULTS).to_pylist()
        events = read_table(layout.root, EVENTS).to_pylist()
        (line,) = view.warnings
        assert f"is not seen by {blind}:" in line
        return SimpleNamespace(layout=layout, events=events, blind=blind, cache=cache / "bitatlas" / "artifacts",
                               values={row["cell_id"]: row["value"] for row in rows})  # fmt: skip

    return start


def ends(ran, task):
    """Cell -> the node that did this to it, in the end."""
    told = sorted(ran.events, key=lambda event: event["at"])
    return {
        event["cell_id"]: event["worker"].partition("@")[2]
        for event in told
        if event["event"] in {"finished", "reused"} and event["job"].endswith(task)
    }


VALUES = {}


def test_each_cell_is_evaluated_on_the_node_that_has_it(run):
    ran = run("out")
    made, evaluated = ends(ran, ": quantize"), ends(ran, ": boolq-passages")
    assert made == {cell: node for cell, node in evaluated.items() if cell in made}
    there = list(made.values()).count(ran.blind)
    assert 0 < there < 6
    assert len(list(ran.cache.iterdir())) == there
    assert len(list(ran.layout.artifacts.iterdir())) == 6 - there
    assert not [event for event in ran.events if event["event"] in {"redone", "retried"}]
    VALUES.update(ran.values)


def test_what_a_lost_node_had_is_quantized_again_by_the_other(run, nodes, monkeypatch):
    def kill(job, completion):
        if job.kind == "quantize" and not killed and completion.worker in processes:
            killed.append(job.id)
            # The worker too: it would finish what is short before it notices.
            for process in (nodes.blind.all_processes["raylet"][0].process.pid, processes[completion.worker]):
                os.kill(process, signal.SIGKILL)

    killed, processes = [], {}
    monkeypatch.setattr(recovery, "_AWAIT_SECONDS", 5.0)  # Ray takes long to tell a lost node from a lost process
    ran = run("out", kill, processes)
    redone = [event["job_id"] for event in ran.events if event["event"] == "redone"]
    assert redone
    assert set(killed) <= set(redone)
    assert ran.blind not in ends(ran, ": quantize").values()
    assert len(ran.values) == 7
    assert not VALUES or ran.values == VALUES
