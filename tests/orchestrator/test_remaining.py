"""The time that is left, by estimates and by what a session took."""

import pytest

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
