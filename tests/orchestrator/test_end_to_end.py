"""The product's promises on real processes: `bitatlas run` with real Ray, killed and started again."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import duckdb
import psutil
import pytest
import yaml

from cluster.pool import InlinePool
from orchestrator.config import read_sweep
from orchestrator.inputs import prepare
from orchestrator.layout import Layout
from orchestrator.plan import make_plan
from orchestrator.schema import EVENTS, ITEMS, LAYERS, RESULTS
from orchestrator.store import Store, read_table
from orchestrator.sweep import Driver
from orchestrator.view import QuietView
from orchestrator.worker import FACTORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

# Each job's rows are committed at once, as those of long jobs are: what is tested is what there is in between.
PROGRAM = "from orchestrator import cli, sweep; sweep._COMMIT_SECONDS = 0.0; cli.main()"
BITATLAS = [sys.executable, "-c", PROGRAM]
GRID = [
    {"method": "rtn", "weight_bits": [8, 4], "group_size": 32},
    {"method": "gptq", "weight_bits": [4, 2], "group_size": 32},
]
JOBS = 14  # 5 cells x 2 evaluations, 4 of them quantized
WINDOWS, DOCUMENTS = 6, 24
# What may differ between two runs of the same work.
CIRCUMSTANCES = {
    "sweep", "quantize_seconds", "evaluate_seconds", "peak_memory_bytes", "worker", "device", "started_at",
    "finished_at", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def sweep_file(tiny_checkpoint, tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep") / "tiny.yaml", tiny_checkpoint)


def write_sweep(path, checkpoint, **changes):
    document = {
        "name": "tiny",
        "models": [{"name": "tiny", "source": str(checkpoint)}],
        "grid": GRID,
        "calibration": {"corpus": "lambada", "samples": 8, "sequence_length": 128, "seed": 0},
        "evaluation": {
            "perplexity": [{"corpus": "boolq-passages", "sequence_length": 256, "max_windows": WINDOWS}],
            "tasks": [{"name": "arc_easy", "limit": DOCUMENTS}],
        },
        "workers": {"device": "cpu", "count": 2},
    }
    path.write_text(yaml.safe_dump(document | changes))
    return path


PROCESSES = []


@pytest.fixture(scope="module", autouse=True)
def nothing_left_running():
    yield
    for process in PROCESSES:
        process.kill()
        process.wait()
        process.stdout.close()


def start(file, out, *more):
    process = subprocess.Popen(
        [*BITATLAS, "run", str(file), "--out", str(out), "--no-report", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A local Ray starts whatever other cluster the environment names: nobody listens on port 9.
        env=os.environ | {"COLUMNS": "200", "RAY_ADDRESS": "127.0.0.1:9"},
    )
    PROCESSES.append(process)
    return process


def finish(process, seconds=280):
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def run(file, out, *more):
    return finish(start(file, out, *more))


def finished_in(out):
    if not (out / "events").exists():
        return 0
    return read_table(out, EVENTS)["event"].to_pylist().count("finished")


def wait_for_finished(out, count, process):
    deadline = time.monotonic() + 240  # two cores that other tests share
    while finished_in(out) < count:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def values(out):
    """Everything that was measured, without the circumstances."""
    tables = {}
    for table in (RESULTS, ITEMS, LAYERS):
        keep = [column for column in table.columns if column not in CIRCUMSTANCES]
        rows = [tuple(map(str, row.values())) for row in read_table(out, table).select(keep).to_pylist()]
        tables[table.name] = sorted(rows)
    return tables


def assert_nothing_ran_twice(out):
    """Per job: exactly one end, and no start after it."""
    events = sorted(read_table(out, EVENTS).to_pylist(), key=lambda event: event["at"])
    ended = {}
    for event in (event for event in events if event["job_id"]):
        assert event["job_id"] not in ended, f"{event['event']} of {event['job']} after it had ended"
        if event["event"] in {"finished", "reused"}:
            ended[event["job_id"]] = event
    return events, ended


@pytest.fixture(scope="module")
def undisturbed(sweep_file, tmp_path_factory):
    """Tables of a run that nobody disturbs, read by DuckDB all the while."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    process = start(sweep_file, out)
    seen = []
    while process.poll() is None:
        if list((out / "results").glob("*.parquet")):
            counts = "count(distinct (cell_id, task, metric)), count(distinct cell_id)"
            with suppress(duckdb.IOException):  # a part that was put together with others just now: ask again
                seen.append(duckdb.sql(f"select {counts} from '{out}/results/*.parquet'").fetchall()[0])
        time.sleep(0.3)
    code, output = finish(process)
    assert code == 0, output
    return out, seen, output


def test_a_sweep_fills_every_table(undisturbed):
    out, _, output = undisturbed
    tables = values(out)
    cells = 5
    assert len(tables["results"]) == cells * 3  # perplexity, acc, acc_norm
    assert len(tables["items"]) == cells * (WINDOWS + DOCUMENTS * 2)
    assert len(tables["layers"]) == (cells - 1) * 14
    assert {row["status"] for row in read_table(out, RESULTS).to_pylist()} == {"ok"}
    _, ended = assert_nothing_ran_twice(out)
    assert len(ended) == cells * 2 + cells - 1
    assert (out / "sweep.yaml").exists()
    assert f"{JOBS} jobs" in output


def test_duckdb_reads_rows_while_the_sweep_runs(undisturbed):
    _, seen, _ = undisturbed
    counts = [rows for rows, _ in seen]
    assert counts == sorted(counts)
    assert counts[0] < 15, "rows were only seen when the sweep was over"


def test_the_same_command_again_does_nothing(undisturbed, sweep_file):
    out, _, _ = undisturbed
    before = values(out), finished_in(out)
    code, output = run(sweep_file, out)
    assert code == 0
    assert "done already" in output
    assert (values(out), finished_in(out)) == before


def test_kill_9_of_the_driver_and_ctrl_c_lose_and_repeat_nothing(undisturbed, sweep_file, tmp_path):
    """Killed with two workers, stopped with one: the values do not depend on how many there are."""
    out = tmp_path / "out"
    process = start(sweep_file, out)
    wait_for_finished(out, 4, process)
    process.kill()
    process.communicate()
    assert 4 <= finished_in(out) < JOBS
    # What a driver leaves that dies between two parts of a batch: rows whose batch has no event.
    stray = out / "results" / "19700101T000000-000000-000000.parquet"
    stray.write_bytes(next((out / "results").glob("*.parquet")).read_bytes())

    process = start(sweep_file, out, "--workers", "1")
    wait_for_finished(out, 8, process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process, 30)
    assert code == 130
    assert f"go on with: bitatlas run {sweep_file} --out {out}" in output
    assert not stray.exists()
    events = read_table(out, EVENTS)["event"].to_pylist()
    done = events.count("finished") + events.count("reused")  # an artifact that the killed driver had not heard of
    assert 8 <= done < JOBS

    code, output = run(sweep_file, out, "--workers", "1")

    assert code == 0, output
    assert f"{done} done before" in output
    events, ended = assert_nothing_ran_twice(out)
    assert len(ended) == JOBS
    assert [event["event"] for event in events].count("session_started") == 3
    assert values(out) == values(undisturbed[0])


def test_kill_9_of_a_worker_costs_only_its_job(undisturbed, sweep_file, tmp_path):
    """Through the whole NPU placement path, on simulated NPUs."""
    checkpoint = yaml.safe_load(sweep_file.read_text())["models"][0]["source"]
    file = write_sweep(tmp_path / "npu.yaml", checkpoint, workers={"device": "simulated-npu", "count": 2})
    out = tmp_path / "out"
    process = start(file, out)
    wait_for_finished(out, 3, process)
    ray_pids = [child.pid for child in psutil.Process(process.pid).children(recursive=True) if is_worker(child)]
    assert len(ray_pids) == 2
    os.kill(ray_pids[0], signal.SIGKILL)

    code, output = finish(process)

    assert code == 0, output
    events, ended = assert_nothing_ran_twice(out)
    assert len(ended) == JOBS
    assert any(event["event"] == "worker_lost" for event in events)
    assert {event["worker"].partition("@")[0] for event in ended.values()} == {"simulated-npu-0", "simulated-npu-1"}
    assert values(out) == values(undisturbed[0])


def is_worker(process):
    try:
        title = " ".join(process.cmdline())
        return title.startswith(("ray::WorkerActor", "ray::tiny"))  # idle, and busy with a job of that name
    except psutil.NoSuchProcess:
        return False


def test_slices_on_two_workers_give_the_rows_of_one(tiny_checkpoint, tmp_path):
    """Of a task in one piece, in this process."""
    files, outs = {}, {}
    for count in (1, 3):
        evaluation = {"tasks": [{"name": "arc_easy", "limit": 150, "slices": count}]}  # three units
        files[count] = write_sweep(tmp_path / f"{count}.yaml", tiny_checkpoint, grid=GRID[:1], evaluation=evaluation)
        outs[count] = tmp_path / f"out{count}"
    run_here(files[1], outs[1])
    code, output = run(files[3], outs[3])
    assert code == 0, output
    assert "11 jobs" in output  # 3 cells x 3 slices, 2 of them quantized
    for out in outs.values():
        assert_nothing_ran_twice(out)
    workers = {row["worker"] for row in read_table(outs[3], EVENTS).to_pylist() if row["event"] == "finished"}
    assert len(workers) == 2
    assert values(outs[1]) == values(outs[3])
    assert len(values(outs[3])["items"]) == 3 * 150 * 2
    code, output = run(files[1], outs[3])
    assert (code, "done already" in output) == (0, True)


def run_here(file, out):
    sweep = read_sweep(file)
    inputs = prepare(sweep, str(file))
    layout, plan = Layout(out), make_plan(sweep, inputs.identities)
    with Store(layout) as store:
        pool = InlinePool(FACTORY)
        driver = Driver(sweep=sweep, plan=plan, inputs=inputs, layout=layout, store=store, pool=pool)
        assert driver.run(QuietView()).failed == 0


RUNNING_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"NPU": 1}, "dashboard_port": 0})
cluster.add_node(num_cpus=1, resources={"NPU": 1})
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def test_joins_a_running_cluster_of_two_nodes(undisturbed, sweep_file, tmp_path):
    checkpoint = yaml.safe_load(sweep_file.read_text())["models"][0]["source"]
    file = write_sweep(tmp_path / "npu.yaml", checkpoint, workers={"device": "simulated-npu"})
    with subprocess.Popen(
        [sys.executable, "-c", RUNNING_CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as cluster:
        address = next(line.split()[1] for line in cluster.stdout if line.startswith("address"))
        code, output = run(file, tmp_path / "out", "--address", address)
        cluster.communicate(timeout=60)
    assert code == 0, output
    assert {row["device"].partition(" on ")[0] for row in read_table(tmp_path / "out", RESULTS).to_pylist()} == {
        "simulated NPU"
    }
    assert values(tmp_path / "out") == values(undisturbed[0])


def test_another_sweep_is_not_overwritten(undisturbed, sweep_file, tmp_path):
    out, _, _ = undisturbed
    checkpoint = yaml.safe_load(sweep_file.read_text())["models"][0]["source"]
    code, output = run(write_sweep(tmp_path / "other.yaml", checkpoint, name="other"), out)
    assert code == 2
    assert output.strip() == f"bitatlas: {out} holds the sweep 'tiny', not 'other'; choose another --out"


def test_a_device_that_is_not_there(sweep_file, tmp_path):
    checkpoint = yaml.safe_load(sweep_file.read_text())["models"][0]["source"]
    out = tmp_path / "out"
    code, output = run(write_sweep(tmp_path / "npu.yaml", checkpoint, workers={"device": "npu"}), out)
    assert code == 2
    assert "no NPU" in output.splitlines()[-1]
    assert not out.exists()


def test_the_report_of_a_real_sweep(undisturbed):
    out = Path(undisturbed[0])
    done = subprocess.run([*BITATLAS, "report", str(out)], capture_output=True, text=True, check=True)
    assert "gptq" in done.stdout
    assert (out / "atlas.html").stat().st_size > 1_000_000
    assert "| gptq" in (out / "atlas.md").read_text()
