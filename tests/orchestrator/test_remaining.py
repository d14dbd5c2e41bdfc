"""The time that is left, by estimates and by what a session took."""

import random

import pytest

from orchestrator.cost import makespan
from orchestrator.plan import Cell, Job
from orchestrator.remaining import Remaining
from orchestrator.schedule import Schedule


@pytest.fixture
def jobs(make_sweep, plan_of):
    return plan_of(make_sweep(grid=[{"method": "rtn", "weight_bits": 8, "group_size": 64}])).jobs


@pytest.fixture
def seconds(jobs):  # fp perplexity, fp task, quantize, perplexity, task
    return dict(zip((job.id for job in jobs), (10.0, 6.0, 8.0, 10.0, 6.0), strict=True))


def test_before_anything_ended(jobs, seconds):
    left = Remaining(jobs, seconds)
    assert left.seconds(Schedule(jobs), workers=1, now=0) == 40
    assert left.seconds(Schedule(jobs), workers=2, now=0) == 20
    assert left.seconds(Schedule(jobs), workers=40, now=0) == 18  # quantize, then its perplexity


def test_what_was_done_before_is_not_left(jobs, seconds):
    assert Remaining(jobs, seconds).seconds(Schedule(jobs, [jobs[0].id]), workers=1, now=0) == 30


def test_this_session_corrects_the_estimates(jobs, seconds):
    schedule, left = Schedule(jobs), Remaining(jobs, seconds)
    left.start(schedule.next_for("w"), 100.0)
    assert left.seconds(schedule, workers=1, now=104) == 36  # 4 of the first job's 10 are over
    assert left.seconds(schedule, workers=1, now=150) == 30  # longer than expected: nothing of it is left, no less
    left.finish(schedule.finish("w"), 20.0)
    assert left.scale == 2
    assert left.seconds(schedule, workers=1, now=120) == 60


def test_what_failed_and_what_needed_it_is_not_left(jobs, seconds):
    schedule, left = Schedule(jobs, [jobs[0].id, jobs[1].id]), Remaining(jobs, seconds)
    left.start(schedule.next_for("w"), 0.0)
    schedule.fail("w", retry=False)
    assert left.seconds(schedule, workers=1, now=1) == 0


def test_a_job_that_is_tried_again_begins_anew(jobs, seconds):
    schedule, left = Schedule(jobs, [job.id for job in jobs[1:]]), Remaining(jobs, seconds)
    left.start(schedule.next_for("w"), 0.0)
    schedule.fail("w", retry=True)
    assert left.seconds(schedule, workers=1, now=9) == 10
    left.start(schedule.next_for("w"), 9.0)
    assert left.seconds(schedule, workers=1, now=10) == 9


@pytest.mark.parametrize("seed", range(20))
def test_at_every_moment_it_is_the_makespan_of_all_that_is_left(seed):
    """Against the plain computation over all jobs, while jobs end, fail and are tried again."""
    draw = random.Random(seed)
    jobs, seconds = [], {}
    for number in range(12):
        cell = Cell(id=str(number), model="m", scheme=None, calibration=None, key=str(number))
        quantize = Job(id=f"q{number}", kind="quantize", cell=cell)
        jobs += [quantize, *(Job(id=f"e{number}{n}", kind="evaluate", cell=cell, needs=quantize.id) for n in range(3))]
    seconds = {job.id: draw.uniform(1, 9) for job in jobs}
    schedule, left = Schedule(jobs, {"q0", "e00", "q1"}, seconds), Remaining(jobs, seconds)
    since, now = {}, 0.0
    while not schedule.done:
        for worker in ("a", "b", "c", "d"):
            if worker not in schedule.running and (job := schedule.next_for(worker)):
                left.start(job, now)
                since[job.id] = now
        now += draw.uniform(0, 5)
        running = {job.id for job in schedule.running.values()}
        waiting = [job for job in jobs if job.id not in schedule.finished | schedule.failed | schedule.skipped]
        expected = {
            job.id: max(seconds[job.id] * left.scale - (now - since[job.id] if job.id in running else 0.0), 0.0)
            for job in waiting
        }
        assert left.seconds(schedule, workers=4, now=now) == pytest.approx(makespan(waiting, expected, 4))
        worker = draw.choice(sorted(schedule.running))
        if draw.random() < 0.7:
            left.finish(schedule.finish(worker), draw.uniform(1, 9))
        else:
            schedule.fail(worker, retry=draw.random() < 0.5)
    assert left.seconds(schedule, workers=4, now=now) == 0.0
