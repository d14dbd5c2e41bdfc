"""What a person sees: lines where there is no terminal, a table where there is one."""

import dataclasses
import io

import pytest
from rich.console import Console

from cluster.pool import WorkerInfo
from evaluators.slices import Slice
from orchestrator import view
from orchestrator.schedule import Schedule
from orchestrator.view import LineView, LiveView, QuietView, clock, make_view

WORKERS = {name: WorkerInfo(name=name, device="cpu", process_id=1) for name in ("cpu-0@host", "cpu-1@host")}


@pytest.fixture
def plan(make_sweep, plan_of):
    return plan_of(make_sweep(grid=[{"method": "rtn", "weight_bits": [8, 4], "group_size": 64}]))


@pytest.fixture
def console():
    return Console(record=True, width=120, file=io.StringIO())


def test_lines(plan, console):
    schedule = Schedule(plan.jobs)
    lines = LineView(console)
    lines.begin(plan, schedule, WORKERS)
    assert console.export_text() == "3 cells, 8 jobs, 0 done before; workers: cpu-0@host, cpu-1@host\n"
    lines.update(schedule, {})
    assert console.export_text() == ""
    for name in WORKERS:
        schedule.next_for(name)
    schedule.finish("cpu-1@host")
    lines.update(schedule, {})
    lines.update(schedule, {})
    assert console.export_text() == "[1/8 0:00] done tiny rtn-w8-g64: quantize\n"
    schedule.finish("cpu-0@host")
    schedule.next_for("cpu-0@host")
    schedule.fail("cpu-0@host", retry=False)
    lines.end(schedule)
    text = console.export_text()
    assert "] done tiny fp: boolq-passages" in text
    assert "] FAILED tiny fp: arc_easy" in text


def test_a_slice_by_its_number(plan, console):
    whole = next(job for job in plan.jobs if job.task == "arc_easy")
    part = dataclasses.replace(whole, id="part", slice=Slice(1, 3), whole_id=whole.id)
    plan = dataclasses.replace(plan, jobs=(part,))
    schedule = Schedule(plan.jobs)
    lines = LineView(console)
    lines.begin(plan, schedule, WORKERS)
    schedule.next_for("cpu-0@host")
    schedule.finish("cpu-0@host")
    lines.end(schedule)
    assert "[1/1 0:00] done tiny fp: arc_easy 2/3" in console.export_text()


def test_lines_now_and_then(plan, console, monkeypatch):
    schedule = Schedule(plan.jobs)
    lines = LineView(console)
    lines.begin(plan, schedule, WORKERS)
    schedule.next_for("cpu-0@host")
    console.export_text()
    monkeypatch.setattr(view, "_LINE_SECONDS", -1.0)
    lines.update(schedule, {"cpu-0@host": "perplexity: window 1/2"})
    assert console.export_text() == "[0/8 0:00] left ~?; cpu-0@host: tiny fp: boolq-passages perplexity: window 1/2\n"


def test_a_resumed_sweep_does_not_tell_again(plan, console):
    schedule = Schedule(plan.jobs, [plan.jobs[0].id])
    lines = LineView(console)
    lines.begin(plan, schedule, WORKERS)
    lines.end(schedule)
    assert console.export_text() == "3 cells, 8 jobs, 1 done before; workers: cpu-0@host, cpu-1@host\n"


def test_the_time_left_is_the_one_that_is_told(plan, console, monkeypatch):
    monkeypatch.setattr(view, "_LINE_SECONDS", -1.0)
    schedule, left = Schedule(plan.jobs), [3723.9]
    lines = LineView(console)
    lines.begin(plan, schedule, WORKERS, lambda: left[0])
    lines.update(schedule, {})
    assert "[0/8 0:00] left ~1:02:03; " in console.export_text()
    left[0] = 30.0
    lines.update(schedule, {})
    assert "[0/8 0:00] left ~0:30; " in console.export_text()


def test_the_live_table_tells_the_time_left(plan):
    console = Console(record=True, width=120, height=20, file=io.StringIO(), force_terminal=True)
    live = LiveView(console)
    live.begin(plan, Schedule(plan.jobs), WORKERS, lambda: 90.0)
    live.end(Schedule(plan.jobs))
    assert "left ~1:30" in console.export_text()


def test_brackets_are_no_markup(plan, console):
    lines = LineView(console)
    lines.begin(plan, Schedule(plan.jobs), {"[red]": WORKERS["cpu-0@host"]})
    assert "workers: [red]" in console.export_text()


def test_a_live_table():
    console = Console(record=True, width=100, height=20, file=io.StringIO(), force_terminal=True)
    assert isinstance(make_view(console), LiveView)


def test_the_live_table_shows_workers_jobs_and_failures(plan):
    console = Console(record=True, width=120, height=20, file=io.StringIO(), force_terminal=True)
    schedule = Schedule(plan.jobs)
    live = LiveView(console)
    live.begin(plan, schedule, WORKERS)
    try:
        schedule.next_for("cpu-0@host")
        live.update(schedule, {"cpu-0@host": "quantizing block 3/30"})
        shown = Console(record=True, width=120, file=io.StringIO())
        shown.print(live._draw(schedule))
        text = shown.export_text()
        assert "0/8" in text
        assert "0 of 3 cells" in text
        assert "failed" not in text
        (busy,) = [line for line in text.splitlines() if "cpu-0@host" in line]
        assert "tiny fp: boolq-passages" in busy
        assert "quantizing block 3/30" in busy
        assert any("cpu-1@host" in line and "idle" in line for line in text.splitlines())
        schedule.finish("cpu-0@host")
        for _ in range(2):
            schedule.next_for("cpu-0@host")
            schedule.fail("cpu-0@host", retry=False)
    finally:
        live.end(schedule)
    text = console.export_text()
    assert "2 failed" in text
    assert "5/8" in text  # one done, two failed, two skipped with the failed artifact


def test_a_live_table_that_was_interrupted_lets_the_terminal_go(plan):
    console = Console(record=True, width=100, height=20, file=io.StringIO(), force_terminal=True)
    schedule = Schedule(plan.jobs)
    live = LiveView(console)
    live.begin(plan, schedule, WORKERS)
    live.end(schedule)
    live.begin(plan, schedule, WORKERS)  # a second Live would be refused while one is still on
    live.end(schedule)


def test_which_view(console):
    assert isinstance(make_view(console), LineView)
    QuietView().begin(None, None, {})


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.9, "0:59"), (60, "1:00"), (3599, "59:59"), (3600, "1:00:00")]
)
def test_clock(seconds, shown):
    assert clock(seconds) == shown


def test_warnings_stay_on_the_screen(plan, console):
    lines = LineView(console)
    lines.begin(plan, Schedule(plan.jobs), WORKERS)
    console.export_text()
    lines.warn("tiny fp: piqa: at [chance]")
    assert console.export_text() == "WARNING tiny fp: piqa: at [chance]\n"
    live = LiveView(console)
    live.begin(plan, Schedule(plan.jobs), WORKERS)
    live.warn("tiny fp: piqa: at [chance]")
    live.end(Schedule(plan.jobs))
    assert "warning: tiny fp: piqa: at [chance]" in console.export_text()
