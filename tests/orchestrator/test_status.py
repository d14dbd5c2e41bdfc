"""Progress from files alone, at every stage of a sweep's life."""

import io
import re
import threading
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from orchestrator import status
from orchestrator.config import resolved
from orchestrator.errors import BitatlasError
from orchestrator.layout import Layout
from orchestrator.schema import EVENTS
from orchestrator.status import print_status, watch_status
from orchestrator.store import Store, read_table


@pytest.fixture
def sweep_directory(tmp_path, make_sweep):
    layout = Layout(tmp_path / "out")
    layout.root.mkdir()
    layout.sweep.write_text(resolved(make_sweep()))
    return layout


def told(layout):
    stream = io.StringIO()
    code = print_status(layout.root, Console(file=stream, width=200))
    return code, stream.getvalue()


def commit(layout, *events):
    now = datetime.now(UTC)  # not the module's: a long suite may have begun a quarter of an hour ago
    with Store(layout) as store:
        for age, event in enumerate(events):
            store.commit({"events": [{"at": now - timedelta(seconds=100 - age)} | event]})


def job(kind, name, **more):
    return {"event": kind, "job_id": name, "job": f"tiny {name}", "worker": "cpu-0@host", **more}


def test_no_sweep_there(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BitatlasError, match=r"holds no sweep \(no sweep.yaml\); give the --out directory"):
            print_status(directory, Console(file=io.StringIO()))


def test_before_the_first_event(sweep_directory):
    code, text = told(sweep_directory)
    assert code == 0
    assert text.startswith("study: 0 jobs done, 0 running, 0 failed")
    assert "not started" in text


def test_while_it_runs(sweep_directory):
    commit(
        sweep_directory, {"event": "session_started"}, job("started", "a"), job("finished", "a"), job("started", "b")
    )
    code, text = told(sweep_directory)
    assert code == 0
    assert "1 jobs done, 1 running, 0 failed" in text
    assert "has not ended (running, or killed)" in text
    assert "tiny b" in text
    assert "cpu-0@host" in text
    assert "tiny a" not in text


def test_the_time_left_by_the_first_estimate(sweep_directory):
    commit(sweep_directory, {"event": "session_started", "seconds": 3700.5}, job("started", "a"))
    text = told(sweep_directory)[1]
    assert re.search(r"; left ~(1:00:0\d|5\d:\d\d) by its first estimate", text)  # 100 s and more after it started
    assert "by its first estimate" in text


def test_longer_than_estimated(sweep_directory):
    commit(sweep_directory, {"event": "session_started", "seconds": 50.0}, job("started", "a"))
    assert "longer at work than first estimated" in told(sweep_directory)[1]


def test_an_ended_session_has_no_time_left(sweep_directory):
    commit(
        sweep_directory, {"event": "session_started", "seconds": 3700.0}, {"event": "session_ended", "status": "ended"}
    )
    text = told(sweep_directory)[1]
    assert "left ~" not in text
    assert "longer" not in text


def test_after_it_ended_with_a_failure(sweep_directory):
    commit(
        sweep_directory,
        {"event": "session_started"},
        job("started", "a"),
        job("failed", "a", error="ValueError: [no] markup"),
        job("reused", "b"),
        {"event": "session_ended", "status": "ended"},
    )
    code, text = told(sweep_directory)
    assert code == 1
    assert "1 jobs done, 0 running, 1 failed" in text
    assert "failed: tiny a: ValueError: [no] markup" in text
    assert "; ended 20" in text


def test_a_task_put_together_from_slices_is_no_job_of_its_own(sweep_directory):
    commit(
        sweep_directory,
        {"event": "session_started"},
        job("finished", "piqa 1/2"),
        job("finished", "piqa 2/2"),
        job("merged", "piqa"),
        job("started", "rte 1/2"),
    )
    code, text = told(sweep_directory)
    assert code == 0
    assert "2 jobs done, 1 running, 0 failed" in text
    assert "tiny rte 1/2" in text


def test_a_retry_that_worked_is_no_failure(sweep_directory):
    commit(
        sweep_directory,
        job("failed", "a", error="first"),
        {"event": "session_started"},
        job("worker_lost", "a"),
        job("retried", "a"),
        job("finished", "a"),
        {"event": "session_ended", "status": "interrupted"},
    )
    code, text = told(sweep_directory)
    assert code == 0
    assert "1 jobs done, 0 running, 0 failed" in text
    assert "; interrupted 20" in text


def test_a_session_that_broke_says_why(sweep_directory):
    commit(
        sweep_directory,
        {"event": "session_started"},
        {"event": "session_ended", "status": "broken", "error": "no worker is left"},
    )
    text = told(sweep_directory)[1]
    assert "; broken 20" in text
    assert " UTC: no worker is left" in text


def test_jobs_of_a_killed_driver_run_no_more_once_another_session_ended(sweep_directory):
    commit(
        sweep_directory,
        {"event": "session_started"},
        job("started", "a"),
        {"event": "session_started"},
        {"event": "session_ended", "status": "interrupted"},
    )
    assert "0 jobs done, 0 running" in told(sweep_directory)[1]


def test_jobs_of_a_killed_driver_do_not_run_in_the_next_session(sweep_directory):
    commit(
        sweep_directory,
        {"event": "session_started", "session": "first"},
        job("started", "a", session="first"),
        job("started", "b", session="first"),
        {"event": "session_started", "session": "second"},
        job("started", "b", session="second"),
    )
    text = told(sweep_directory)[1]
    assert "0 jobs done, 1 running" in text
    assert "tiny b" in text


def test_warnings_of_the_baseline_are_told_and_no_job_ends_by_them(sweep_directory):
    warning = {"event": "warning", "cell_id": "tiny.fp", "job": "tiny fp: piqa", "error": "right on 5 of 10, [sic]"}
    commit(sweep_directory, {"event": "session_started"}, job("started", "a"), warning, warning)
    code, text = told(sweep_directory)
    assert code == 0
    assert "0 jobs done, 1 running" in text
    assert text.count("warning: tiny fp: piqa: right on 5 of 10, [sic]") == 1


def test_of_how_many(sweep_directory):
    commit(sweep_directory, {"event": "session_started", "jobs": 7}, job("finished", "a"))
    assert told(sweep_directory)[1].startswith("study: 1 of 7 jobs done, 0 running, 0 failed; a driver started ")


def watched(layout, monkeypatch):
    """A watch in a thread: its result, and what it has written so far."""
    monkeypatch.setattr(status, "_REFRESH_SECONDS", 0.02)
    stream, codes = io.StringIO(), []
    console = Console(file=stream, width=120, force_terminal=True)
    thread = threading.Thread(target=lambda: codes.append(watch_status(layout.root, console)), daemon=True)
    thread.start()
    return thread, stream, codes


def wait_for(text, stream):
    for _ in range(500):
        if text in stream.getvalue():
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"{text!r} was not shown")


def test_watched_from_before_it_starts_to_its_end(sweep_directory, monkeypatch):
    thread, stream, codes = watched(sweep_directory, monkeypatch)
    wait_for("not started", stream)
    commit(sweep_directory, {"event": "session_started", "jobs": 3}, job("started", "a"))
    wait_for("0 of 3 jobs done, 1 running", stream)
    wait_for("worker", stream)
    lines = stream.getvalue().splitlines()
    assert not any("━" in line and "worker" in line for line in lines)  # the bar has a line of its own
    commit_more(sweep_directory, job("finished", "a", seconds=65.0), job("failed", "b", error="[no] markup"))
    wait_for("1 of 3 jobs done, 0 running, 1 failed", stream)
    wait_for("1:05", stream)
    wait_for("failed: tiny b: [no] markup", stream)
    assert thread.is_alive()
    commit_more(sweep_directory, {"event": "session_ended", "status": "ended"})
    thread.join(10)
    assert codes == [1]
    assert "; ended 20" in stream.getvalue()


def commit_more(layout, *events):
    """Of the session that is under way."""
    (session,) = {event["session"] for event in read_table(layout.root, EVENTS).to_pylist()}
    with Store(layout) as store:
        now = datetime.now(UTC)
        store.commit({"events": [{"at": now, "session": session} | event for event in events]})


def test_a_watched_screen_stays_short(sweep_directory, monkeypatch):
    failures = [job("failed", f"a{number}", error="lost") for number in range(30)]
    commit(sweep_directory, {"event": "session_started"}, *failures, {"event": "session_ended", "status": "ended"})
    thread, stream, codes = watched(sweep_directory, monkeypatch)
    thread.join(10)
    assert codes == [1]
    assert "22 more before these: `bitatlas status` shows all" in stream.getvalue()
    assert "failed: tiny a29" in stream.getvalue()
    assert "failed: tiny a21:" not in stream.getvalue()


def test_ctrl_c_ends_the_watching_alone(sweep_directory, monkeypatch):
    commit(sweep_directory, {"event": "session_started"}, job("started", "a"))

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", interrupt)
    stream = io.StringIO()
    assert watch_status(sweep_directory.root, Console(file=stream, width=120)) == 0
    assert "tiny a" in stream.getvalue()


def test_what_a_worker_did_beside_its_job_says_nothing_of_the_job(sweep_directory):
    commit(
        sweep_directory,
        {"event": "session_started"},
        job("started", "a"),
        job("finished", "a"),
        job("artifact_made", "a", seconds=3.0),
        job("started", "b"),
        job("model_loaded", "b", seconds=3.0),
    )
    assert "1 jobs done, 1 running, 0 failed" in told(sweep_directory)[1]
