"""A sweep as a job of a running cluster: two nodes, token authentication, simulated NPUs, `ray job submit`."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import yaml

import cluster as cluster_package
from cluster.metrics import METRICS
from orchestrator.schema import EVENTS, RESULTS
from orchestrator.store import read_table

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

BITATLAS = [sys.executable, "-c", "from orchestrator.cli import main; main()"]
JOBS = 14  # 5 cells x 2 evaluations, 4 of them quantized
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "resources": {"NPU": 1}}
head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": 0, "dashboard_agent_listen_port": 0}
cluster = Cluster(initialize_head=True, head_node_args=node | head)
cluster.add_node(**node)
print("cluster", json.dumps({
    "address": cluster.address,
    "dashboard": "http://" + cluster.head_node.webui_url,
    "metrics": [f"http://{n.node_ip_address}:{n.metrics_export_port}/metrics" for n in cluster.list_all_nodes()],
}), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


class RunningCluster:
    """A cluster with a token of its own, its dashboard and its metrics endpoints."""

    def __init__(self, facts, environment, token):
        self.address, self.dashboard, self._metrics = facts["address"], facts["dashboard"], facts["metrics"]
        self._environment, self._token = environment, token

    def ray(self, *words):
        """`ray job ...`, as a person would type it."""
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", *words],
            env=self._environment | {"RAY_API_SERVER_ADDRESS": self.dashboard},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.stdout

    def submit(self, *words, options=()):
        """The job's id; tried again while the cluster is not yet ready for jobs."""
        deadline = time.monotonic() + 60
        while not (found := re.search(r"'(raysubmit_\w+)' submitted", output := self._submit(words, options))):
            assert time.monotonic() < deadline, output
            time.sleep(2)
        return found[1]

    def _submit(self, words, options):
        return self.ray("submit", "--no-wait", *options, "--", *map(str, words))

    def get(self, path, **query):
        url = f"{self.dashboard}{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self._token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def state(self, what):
        return self.get(f"/api/v0/{what}", detail=1, limit=1000)["data"]["result"]["result"]

    def job(self, name):
        return self.get(f"/api/jobs/{name}")

    def is_over(self, name):
        return self.job(name)["status"] not in {"PENDING", "RUNNING"}

    def wait(self, name):
        """Its last status and its log."""
        wait_until(lambda: self.is_over(name))
        return self.job(name)["status"], self.ray("logs", name)

    def metrics(self):
        """Series of ours at both nodes: name -> its label sets and values."""
        found = {}
        for url in self._metrics:
            with urllib.request.urlopen(url, timeout=30) as answer:
                for line in answer.read().decode().splitlines():
                    match = re.fullmatch(r"(ray_bitatlas_\w+)\{(.*)\} (\S+)", line)
                    if match:
                        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
                        found.setdefault(match[1], []).append((labels, float(match[3])))
        return found


@pytest.fixture(scope="module")
def cluster():
    token = secrets.token_hex(32)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "COLUMNS": "200"}
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        facts = next(line for line in process.stdout if line.startswith("cluster ")).partition(" ")[2]
        yield RunningCluster(json.loads(facts), environment, token)
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def sweep_file(tiny_checkpoint, tmp_path_factory):
    file = tmp_path_factory.mktemp("sweep") / "tiny.yaml"
    document = {
        "name": "tiny",
        "models": [{"name": "tiny", "source": str(tiny_checkpoint)}],
        "grid": [
            {"method": "rtn", "weight_bits": [8, 4], "group_size": 32},
            {"method": "gptq", "weight_bits": [4, 2], "group_size": 32},
        ],
        "calibration": {"corpus": "lambada", "samples": 8, "sequence_length": 128, "seed": 0},
        "evaluation": {
            "perplexity": [{"corpus": "boolq-passages", "sequence_length": 256, "max_windows": 24}],
            "tasks": [{"name": "arc_easy", "limit": 24}],
        },
        "workers": {"device": "simulated-npu"},
    }
    file.write_text(yaml.safe_dump(document))
    return file


def events(out, kind):
    if not (out / "events").exists():
        return []
    return [row for row in read_table(out, EVENTS).to_pylist() if row["event"] == kind]


def wait_until(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def stopped(cluster, sweep_file, tmp_path_factory):
    """A job that `ray job stop` ended after some of the sweep was done."""
    out = tmp_path_factory.mktemp("job") / "out"
    name = cluster.submit(*BITATLAS, "run", sweep_file, "--out", out, "--no-report")
    wait_until(lambda: len(events(out, "finished")) >= 2 or cluster.is_over(name))
    cluster.ray("stop", name)
    return out, name, *cluster.wait(name)


def test_ray_job_stop_keeps_what_is_done(stopped):
    out, _, status, log = stopped
    assert status == "STOPPED"
    assert [row["status"] for row in events(out, "session_ended")] == ["interrupted"]
    done = len(events(out, "finished"))
    assert 2 <= done < JOBS
    assert f"stopped: {done} jobs are done, {JOBS - done} are left; go on with: bitatlas run" in log


def test_the_job_says_which_cluster_it_joined(stopped, cluster):
    _, name, _, log = stopped
    assert f"joined the Ray cluster at {cluster.address}, whose job {name} this is" in log


@pytest.fixture(scope="module")
def resumed(stopped, cluster, sweep_file):
    """The job again, a worker of it killed on the way; what the cluster's API and metrics told meanwhile."""
    out = stopped[0]
    before = len(events(out, "finished"))
    name = cluster.submit(*BITATLAS, "run", sweep_file, "--out", out, "--no-report")
    wait_until(lambda: len(events(out, "finished")) > before or cluster.is_over(name))
    actors = [actor for actor in cluster.state("actors") if actor["state"] == "ALIVE"]
    victim = next(actor for actor in actors if actor["name"].startswith("simulated-npu-0@"))
    busy = {row["job"] for row in events(out, "started")}
    os.kill(victim["pid"], signal.SIGKILL)
    status, log = cluster.wait(name)
    names = {series for metric in METRICS for series in metric.exported}
    wait_until(lambda: names <= set(cluster.metrics()), 40)
    return {
        "status": status,
        "log": log,
        "actors": actors,
        "busy": busy,
        "metrics": cluster.metrics(),
        "later": cluster.state("actors"),
        "tasks": cluster.state("tasks"),
    }


def test_the_job_goes_on_and_fills_the_tables(resumed, stopped):
    assert resumed["status"] == "SUCCEEDED", resumed["log"]
    out = stopped[0]
    rows = read_table(out, RESULTS).to_pylist()
    assert len(rows) == 5 * 3  # perplexity, acc, acc_norm
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["device"].partition(" on ")[0] for row in rows} == {"simulated NPU"}
    ended = Counter(row["job_id"] for row in events(out, "finished"))
    assert (len(ended), set(ended.values())) == (JOBS, {1})
    assert len(events(out, "worker_lost")) == 1


def test_actors_are_named_by_device(resumed, cluster):
    host = cluster.address.partition(":")[0]
    workers = [actor for actor in resumed["actors"] if actor["class_name"] == "WorkerActor"]
    assert {actor["name"].partition(f"@{host}")[0] for actor in workers} == {"simulated-npu-0"}  # one on each node
    assert len({actor["name"] for actor in workers}) == len({actor["node_id"] for actor in workers}) == 2
    assert all(actor["repr_name"] == actor["name"] for actor in workers)
    assert len({actor["ray_namespace"] for actor in workers}) == 1
    assert {actor["name"] for actor in workers} <= {actor["name"] for actor in resumed["later"]}
    assert "bitatlas-metrics-tiny" in {actor["name"] for actor in resumed["actors"]}


def test_tasks_are_named_by_cell(resumed, stopped):
    labels = {row["job"] for row in events(stopped[0], "finished")}
    assert len(labels) == JOBS
    names = {task["name"] for task in resumed["tasks"]}
    assert labels <= names
    assert not any("activity" in name or "record" in name for name in names), "questions asked each second"


def test_the_endpoint_lists_every_metric(resumed):
    metrics = resumed["metrics"]
    for metric in METRICS:
        for series in metric.exported:
            for labels, _ in metrics[series]:
                assert set(metric.tags) <= set(labels)
                assert labels["sweep"] == "tiny"
    assert set(metrics) == {series for metric in METRICS for series in metric.exported}


def test_the_grafana_dashboard_asks_for_what_is_there(resumed):
    there = {series: set().union(*(labels for labels, _ in rows)) for series, rows in resumed["metrics"].items()}
    dashboard = json.loads((Path(cluster_package.__file__).parent / "deploy" / "grafana" / "bitatlas.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 10
    for expression in expressions:
        (series,) = set(re.findall(r"ray_\w+", expression))
        assert set(re.findall(r"(\w+)=~", expression)) <= there[series]


def test_what_the_metrics_say(resumed, stopped):
    metrics = resumed["metrics"]
    retries = {labels["kind"]: value for labels, value in metrics["ray_bitatlas_retries_total"]}
    assert retries == {"worker_lost": 1}
    (last,) = {labels["WorkerId"] for labels, _ in metrics["ray_bitatlas_jobs"]} & {
        labels["WorkerId"] for labels, _ in metrics["ray_bitatlas_retries_total"]
    }
    jobs = {labels["state"]: value for labels, value in metrics["ray_bitatlas_jobs"] if labels["WorkerId"] == last}
    assert sum(jobs.values()) == JOBS
    assert {labels["state"] for labels, _ in metrics["ray_bitatlas_cells"]} == {
        "waiting",
        "running",
        "finished",
        "failed",
    }
    stages = {labels["stage"] for labels, _ in metrics["ray_bitatlas_stage_seconds_count"]}
    assert stages == {"quantize", "boolq-passages", "arc_easy"}
    assert {labels["stage"] for labels, _ in metrics["ray_bitatlas_tokens_total"]} == {"boolq-passages"}
    assert all(value > 1e6 for _, value in metrics["ray_bitatlas_peak_memory_bytes"])


def test_output_inside_the_job_s_own_copy_of_its_directory_is_refused(cluster, sweep_file):
    name = cluster.submit(*BITATLAS, "run", sweep_file.name, options=["--working-dir", str(sweep_file.parent)])
    status, log = cluster.wait(name)
    assert status == "FAILED"
    assert "bitatlas: --out outputs/tiny lies in a Ray job's copy of its working directory" in log
    assert "exit code 2" in cluster.job(name)["message"]
