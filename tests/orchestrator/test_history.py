"""What the events say of each job, in the order of their times."""

from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.history import read_history
from orchestrator.layout import Layout
from orchestrator.store import Store

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def layout(tmp_path):
    return Layout(tmp_path / "out")


def event(kind, job=None, second=0, **more):
    return {"sweep": "s", "event": kind, "job_id": job, "at": BEGAN + timedelta(seconds=second)} | more


def commit(layout, *batches):
    with Store(layout) as store:
        for batch in batches:
            store.commit({"events": batch})
    return store.session


def test_nothing_yet(layout):
    history = read_history(layout.root)
    assert (history.latest, history.states(), history.observed()) == (None, {}, [])


def test_the_last_end_counts_and_what_was_set_aside_has_none(layout):
    commit(
        layout,
        [event("started", "a"), event("finished", "a", 1), event("merged", "b", 1), event("reused", "c", 1)],
        [event("set_aside", "b", 2), event("set_aside", "c", 2), event("failed", "d", 5)],
        [event("finished", "c", 3), event("finished", "d", 4)],
    )
    history = read_history(layout.root)
    assert history.states() == {"a": "finished", "c": "finished", "d": "failed"}
    assert history.latest == BEGAN + timedelta(seconds=5)


def test_where_rows_may_be(layout):
    session = commit(
        layout,
        [event("finished", "a", 1), event("finished", "b", 1)],
        [event("failed", "c", 2)],
        [event("started", "a", 3)],
        [event("finished", "b", 4), event("reused", "d", 4)],
    )
    history = read_history(layout.root)
    first, second, _, fourth = (f"{session}-{number:06}.parquet" for number in range(4))
    assert history.batches_of(["a"]) == ({first}, {second})
    assert history.batches_of({"b", "unknown"}) == ({first, fourth}, {second})
    assert [history.last_ended_in(name) for name in (first, second, fourth)] == [{"a"}, {"c"}, {"b", "d"}]


def test_what_estimates_are_fitted_to(layout):
    commit(layout, [event("finished", "a", 9, device="card", seconds=2.5), event("reused", "b", 8)])
    session = commit(layout, [event("finished", "c", 1, device="card", seconds=1.5)])
    a, c = ({"event": "finished", "job_id": job, "device": "card", "seconds": s} for job, s in (("a", 2.5), ("c", 1.5)))
    assert read_history(layout.root).observed() == [c, a]
    assert read_history(layout.root, session).observed() == [c]
