"""Time that never goes back."""

from datetime import UTC, datetime, timedelta

import pytest

from orchestrator import clock
from orchestrator.clock import MonotoneClock

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
TICK = timedelta(microseconds=1)


@pytest.fixture
def set_clock(monkeypatch):
    return lambda moment: monkeypatch.setattr(clock, "utc_now", lambda: moment)


def test_it_tells_what_the_machine_s_clock_says(set_clock):
    told = MonotoneClock()
    for hours in (0, 1, 5):
        set_clock(NOON + timedelta(hours=hours))
        assert told.now() == NOON + timedelta(hours=hours)


def test_a_clock_that_stands_still_or_is_set_back(set_clock):
    told = MonotoneClock()
    set_clock(NOON)
    assert [told.now(), told.now()] == [NOON, NOON + TICK]
    set_clock(NOON - timedelta(hours=1))
    assert told.now() == NOON + 2 * TICK
    set_clock(NOON + timedelta(hours=1))
    assert told.now() == NOON + timedelta(hours=1)


def test_what_another_clock_told_is_earlier(set_clock):
    told = MonotoneClock()
    set_clock(NOON)
    told.follow(None)
    told.follow(NOON + timedelta(days=1))
    told.follow(NOON)
    assert told.now() == NOON + timedelta(days=1) + TICK
