"""What `bitatlas plan` says of time."""

import importlib.util
import os
from types import SimpleNamespace

import pytest

from orchestrator import forecast
from orchestrator.config import WorkersConfig
from orchestrator.cost import Observation
from orchestrator.cost_store import add_observations
from orchestrator.forecast import Devices, describe, devices_of, duration

CARD = Devices(kind="npu", name="Ascend910B1", count=4)


@pytest.fixture
def jobs(make_sweep, plan_of, monkeypatch):
    jobs = plan_of(make_sweep(grid=[{"method": "rtn", "weight_bits": 8, "group_size": 64}])).jobs
    monkeypatch.setattr(forecast, "works", lambda jobs, _, **__: {job.id: 36e15 for job in jobs})
    return jobs


def told(jobs, devices=CARD, *, events=(), kept=None, done=()):
    found = forecast.forecast(jobs, SimpleNamespace(), devices, events=list(events), kept=kept)
    return describe(found, jobs, done, devices)


def finished(job, seconds, device="Ascend910B1"):
    return {"event": "finished", "job_id": job.id, "device": device, "seconds": seconds}


def test_nothing_seen_yet(jobs):
    assert told(jobs) == [  # five jobs of 36e15 operations at 20 TFLOP/s: half an hour each
        "estimated time: 60 min on 4 npu workers; 2.5 h of one worker's time",
        "by number of npu devices: 2.5 h on 1, 60 min on 8, 60 min on 64",  # a cell's two jobs follow each other
        "analytic, not yet fitted to this machine: at a nominal 20000 GFLOP/s per worker, chosen low; the first run "
        "measures it",
    ]


def test_what_this_sweep_saw(jobs):
    lines = told(jobs, events=[finished(jobs[0], 7200.0)], done={jobs[0].id})
    assert lines[0] == "estimated time: 4.0 h on 4 npu workers; 8.0 h of one worker's time"
    assert lines[-1] == "fitted to 1 job seen on Ascend910B1"


def test_what_earlier_sweeps_saw(jobs, tmp_path):
    new = [Observation(device="Ascend910B1", kind="perplexity", job_id=str(i), rate=1e-13) for i in range(3)]
    add_observations(tmp_path / "rates", new)
    lines = told(jobs, Devices(kind="npu", name="Ascend910B1", count=1), kept=tmp_path / "rates")
    assert lines[0] == "estimated time: 5.0 h on 1 npu worker; 5.0 h of one worker's time"
    assert lines[-1] == "fitted to 3 jobs seen on Ascend910B1"


def test_devices_that_are_elsewhere(jobs):
    absent = Devices(kind="npu", name=None, count=1, assumed=True)
    assert "on 1 npu worker, assumed: none of these is in this machine;" in told(jobs, absent)[0]
    lines = told(jobs, absent, events=[finished(jobs[0], 7200.0)])  # where it ran tells what it is
    assert lines[-1] == "fitted to 1 job seen on Ascend910B1"


def test_all_is_done(jobs):
    assert told(jobs, done={job.id for job in jobs}) == []


def test_processors_are_not_asked_of_in_clusters(jobs):
    lines = told(jobs, Devices(kind="cpu", name="a processor", count=2, threads=2))
    assert len(lines) == 2
    assert "nominal 50 GFLOP/s per worker" in lines[1]


def test_workers_of_a_sweep_file(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    found = devices_of(WorkersConfig(device="cpu", threads=3))
    assert (found.kind, found.count, found.assumed) == ("cpu", 2, False)
    assert devices_of(WorkersConfig(device="cpu", count=5)).count == 5
    assert devices_of(WorkersConfig(device="simulated-npu", count=3)).name == f"simulated NPU on {found.name}"


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="there may be an NPU here")
def test_accelerators_that_are_not_here():
    assert devices_of(WorkersConfig(device="npu")) == Devices(kind="npu", name=None, count=1, assumed=True)
    assert devices_of(WorkersConfig(device="npu", per_device=2)).count == 2
    assert devices_of(WorkersConfig(device="npu", count=64)) == Devices(kind="npu", name=None, count=64)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "under 1 min"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (360000, "100.0 h")]
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown
