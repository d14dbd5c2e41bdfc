"""Rates fitted to finished jobs, and the time of jobs together."""

import random
from types import SimpleNamespace

import pytest

from orchestrator import cost
from orchestrator.cost import Observation, Observations, device_key, estimate, makespan, nominal_rate, observe


def seen(kind, rates, device="card"):
    return [Observation(device=device, kind=kind, job_id=f"{kind} {i}", rate=rate) for i, rate in enumerate(rates)]


def test_nothing_seen_is_the_nominal_rate():
    assert Observations().rate("card", "perplexity", 4.0) == 0.25
    other = Observations().plus(seen("perplexity", [9.0], device="other card"))
    assert other.rate("card", "perplexity", 4.0) == 0.25
    assert other.count("card") == 0


def test_a_planted_rate_is_found_among_outliers():
    random.seed(0)
    rates = [2e-12 * random.uniform(0.95, 1.05) for _ in range(40)] + [1e-9] * 9 + [1e-15] * 6
    found = Observations().plus(seen("quantize gptq", rates))
    assert found.rate("card", "quantize gptq", 1.0) == pytest.approx(2e-12, rel=0.05)
    assert found.count("card") == 55


def test_few_jobs_lean_on_all_that_the_device_did():
    found = Observations().plus([*seen("perplexity", [1.0] * 7), *seen("task piqa", [64.0])])
    # One job: a third of its own rate, on a logarithmic scale: 64 ** (1/3) x 1 ** (2/3).
    assert found.rate("card", "task piqa", 1.0) == pytest.approx(4.0)
    assert found.rate("card", "quantize rtn", 1.0) == 1.0
    many = Observations().plus([*seen("perplexity", [1.0] * 70), *seen("task piqa", [64.0] * 22)])
    assert many.rate("card", "task piqa", 1.0) == pytest.approx(64 ** (22 / 24))


def test_a_job_counts_once():
    first = Observations().plus(seen("perplexity", [1.0, 2.0]))
    again = first.plus(seen("perplexity", [3.0]))
    assert again.seen == {"card": {"perplexity": {"perplexity 1": 2.0, "perplexity 0": 3.0}}}
    assert first.seen["card"]["perplexity"]["perplexity 0"] == 1.0


@pytest.fixture
def jobs(make_sweep, plan_of, monkeypatch):
    jobs = plan_of(make_sweep(grid=[{"method": "rtn", "weight_bits": 8, "group_size": 64}])).jobs
    monkeypatch.setattr(cost, "works", lambda jobs, _: {job.id: 10.0 * (i + 1) for i, job in enumerate(jobs)})
    return jobs  # fp perplexity, fp task, quantize, perplexity, task


def finished(job, seconds, **more):
    return {"event": "finished", "job_id": job.id, "device": "card", "seconds": seconds} | more


def test_what_events_tell(jobs):
    events = [
        finished(jobs[0], 5.0),
        finished(jobs[1], 0.5),  # too short to tell
        finished(jobs[2], 5.0, event="reused"),
        finished(jobs[3], 5.0, event="failed"),
        finished(jobs[4], 5.0, job_id="of another plan"),
        finished(jobs[4], None),
        finished(jobs[4], 100.0),
    ]
    assert observe(events, jobs, SimpleNamespace(), threads=2) == [
        Observation(device="card, 2 threads", kind="perplexity", job_id=jobs[0].id, rate=0.5, work=10.0),
        Observation(device="card, 2 threads", kind="task arc_easy", job_id=jobs[4].id, rate=2.0, work=50.0),
    ]


def test_estimates(jobs):
    known = Observations().plus(seen("perplexity", [0.5] * 5))
    found = estimate(jobs, SimpleNamespace(), known, device="card", nominal=1.0)
    assert list(found.values()) == pytest.approx([5, 10, 15, 20, 25])
    unknown = estimate(jobs, SimpleNamespace(), Observations(), device="card", nominal=2.0)
    assert list(unknown.values()) == [5, 10, 15, 20, 25]


def test_together(jobs):
    seconds = dict(zip((job.id for job in jobs), (4.0, 4.0, 10.0, 2.0, 4.0), strict=True))
    assert makespan(jobs, seconds, 1) == 24
    assert makespan(jobs, seconds, 2) == 14  # quantize and the longer of its evaluations, though 24 / 2 is less
    assert makespan(jobs[3:], seconds, 2) == 4  # what they need is done
    assert makespan([], seconds, 2) == 0


def test_names_and_nominal_rates():
    assert device_key("card", 1) == "card"
    assert device_key("card", 4) == "card, 4 threads"
    assert nominal_rate("cpu", 4) == 4 * nominal_rate("cpu", 1)
    assert nominal_rate("cuda", 4) == nominal_rate("cuda", 1) > nominal_rate("cpu", 1)
