"""Which job next: dependencies, affinity, retries, and that no job is lost or run twice."""

import heapq
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.plan import Cell, Job
from orchestrator.schedule import SHARED, Schedule
from orchestrator.scheme import Scheme

RTN = Scheme(method="rtn", weight_bits=4)


def cell(key, model="m", scheme=RTN):
    return Cell(id=f"{model}.{key}", model=model, scheme=scheme, calibration=None, key=key)


def quantize(key, model="m"):
    return Job(id=f"q{key}", kind="quantize", cell=cell(key, model))


def evaluate(key, number=0, *, free=False, model="m"):
    held = cell(key, model, None if free else RTN)
    return Job(id=f"e{key}{number}", kind="evaluate", cell=held, needs=None if free else f"q{key}")


def test_an_evaluation_waits_for_its_artifact():
    schedule = Schedule([quantize("a"), evaluate("a")])
    assert schedule.next_for("w0").id == "qa"
    assert schedule.next_for("w1") is None
    assert schedule.finish("w0").id == "qa"
    assert schedule.next_for("w1").id == "ea0"
    assert schedule.unfinished == 1
    schedule.finish("w1")
    assert schedule.done


def test_jobs_start_in_the_plan_s_order():
    schedule = Schedule([evaluate("f", free=True), quantize("b"), quantize("a")])
    started = []
    while not schedule.done:
        started.append(schedule.next_for("w").id)
        schedule.finish("w")
    assert started == ["ef0", "qb", "qa"]


def test_a_worker_stays_with_the_cell_it_holds():
    schedule = Schedule([quantize("a"), quantize("b"), evaluate("a"), evaluate("b")])
    assert [schedule.next_for(w).id for w in ("w0", "w1")] == ["qa", "qb"]
    schedule.finish("w1")
    schedule.finish("w0")
    assert schedule.next_for("w1").id == "eb0"
    assert schedule.next_for("w0").id == "ea0"


def test_a_worker_takes_an_unheld_cell_before_another_worker_s():
    schedule = Schedule([quantize("a"), quantize("c"), evaluate("a", 0), evaluate("a", 1), quantize("b")])
    assert [schedule.next_for(w).id for w in ("w0", "w1")] == ["qa", "qc"]
    schedule.finish("w0")
    schedule.finish("w1")
    assert schedule.next_for("w1").id == "qb"  # cell a is in w0's memory
    assert schedule.next_for("w0").id == "ea0"
    schedule.finish("w1")
    assert schedule.next_for("w1").id == "ea1"  # nothing else is left


def test_a_lost_worker_holds_nothing():
    schedule = Schedule([quantize("a"), quantize("c"), evaluate("a"), evaluate("c")])
    assert [schedule.next_for(w).id for w in ("w0", "w1")] == ["qa", "qc"]
    schedule.finish("w0")
    schedule.finish("w1")
    schedule.forget_worker("w0")
    schedule.forget_worker("unknown")
    assert schedule.next_for("w2").id == "ea0"


def test_a_retried_job_comes_before_the_others():
    schedule = Schedule([quantize("a"), quantize("b"), quantize("c")])
    schedule.next_for("w0")
    assert schedule.fail("w0", retry=True).id == "qa"
    schedule.forget_worker("w0")
    assert schedule.next_for("w1").id == "qa"
    assert schedule.attempts == {"qa": 2}
    assert not schedule.failed


def test_retried_jobs_come_in_the_order_in_which_they_failed():
    schedule = Schedule([quantize(key) for key in "abcd"], seconds={f"q{key}": 1.0 for key in "abcd"})
    for worker in ("w0", "w1"):
        schedule.next_for(worker)
    for worker in ("w0", "w1"):
        schedule.fail(worker, retry=True)
        schedule.forget_worker(worker)
    assert [schedule.next_for(f"w{n}").id for n in range(4)] == ["qa", "qb", "qc", "qd"]


def test_a_retried_job_avoids_workers_while_there_are_others():
    schedule = Schedule([quantize("a"), quantize("b")])
    schedule.next_for("w0")
    schedule.fail("w0", retry=True, avoid=frozenset({"w0"}))
    assert schedule.next_for("w0", ["w0", "w1"]).id == "qb"
    assert schedule.next_for("w1", ["w0", "w1"]).id == "qa"


def test_a_retried_job_comes_back_where_there_is_no_other_worker():
    schedule = Schedule([quantize("a"), quantize("b")])
    schedule.next_for("w0")
    schedule.fail("w0", retry=True, avoid=frozenset({"w0"}))
    assert schedule.next_for("w0", ["w0"]).id == "qa"


def test_what_is_gone_is_made_again_before_what_needs_it():
    schedule = Schedule([quantize("a"), evaluate("a", 0), evaluate("a", 1), evaluate("a", 2)])
    quantizing = schedule.next_for("w0")
    schedule.finish("w0")
    assert [schedule.next_for(w).id for w in ("w0", "w1")] == ["ea0", "ea1"]
    assert schedule.fail("w0", retry=True).id == "ea0"
    assert schedule.redo(quantizing)
    assert not schedule.redo(quantizing)
    schedule.fail("w1", retry=True)  # it found the same
    assert schedule.next_for("w0").id == "qa"
    assert schedule.next_for("w1") is None
    schedule.finish("w0")
    for _ in range(3):
        schedule.next_for("w1")
        schedule.finish("w1")
    assert schedule.done
    assert schedule.finished == {"qa", "ea0", "ea1", "ea2"}


def test_what_needs_a_job_that_failed_for_good_is_skipped_also_where_it_had_failed_before():
    schedule = Schedule([quantize("a"), evaluate("a", 0)])
    quantizing = schedule.next_for("w0")
    schedule.finish("w0")
    schedule.next_for("w0")
    schedule.fail("w0", retry=True)
    schedule.redo(quantizing)
    assert schedule.next_for("w0").id == "qa"
    schedule.fail("w0", retry=False)
    assert (schedule.failed, schedule.skipped, schedule.done) == ({"qa"}, {"ea0"}, True)
    assert schedule.next_for("w0") is None


def test_the_longest_chain_starts_first():
    jobs = [
        quantize("a"),
        quantize("b"),
        quantize("c"),
        evaluate("a"),
        evaluate("b", 0),
        evaluate("b", 1),
        evaluate("c"),
    ]
    seconds = {"qa": 5, "qb": 1, "qc": 6, "ea0": 1, "eb0": 2, "eb1": 9, "ec0": 1}
    schedule = Schedule(jobs, seconds=seconds)
    assert [schedule.next_for(f"w{n}").id for n in range(3)] == ["qb", "qc", "qa"]  # 1 + 9, 6 + 1, 5 + 1
    schedule.finish("w0")
    assert schedule.next_for("w0").id == "eb1"


def test_the_unquantized_model_comes_first_however_short_it_is():
    schedule = Schedule([evaluate("f", free=True), quantize("a")], seconds={"ef0": 1, "qa": 100})
    assert schedule.next_for("w0").id == "ef0"


def test_a_worker_stays_with_its_model_while_there_is_something_unheld():
    jobs = [quantize("a", "m1"), quantize("b", "m2"), quantize("c", "m1"), quantize("d", "m1")]
    schedule = Schedule(jobs, seconds={"qa": 9, "qb": 8, "qc": 1, "qd": 7})
    assert [schedule.next_for(w).id for w in ("w0", "w1")] == ["qa", "qb"]
    schedule.finish("w0")
    schedule.finish("w1")
    assert schedule.next_for("w1").id == "qd"  # nothing of m2 is left
    assert schedule.next_for("w0").id == "qc"


def simulated_makespan(jobs, seconds, workers):
    """Seconds until all is done where nothing takes longer than estimated."""
    schedule, now, ends = Schedule(jobs, seconds=seconds), 0.0, []
    idle = [f"w{n:02}" for n in range(workers)]
    while not schedule.done:
        for worker in list(idle):
            job = schedule.next_for(worker)
            if job is not None:
                idle.remove(worker)
                heapq.heappush(ends, (now + seconds[job.id], worker))
        now, worker = heapq.heappop(ends)
        schedule.finish(worker)
        idle.append(worker)
    return now


@pytest.mark.parametrize("seed", range(5))
def test_heavy_tailed_jobs_end_close_to_the_lower_bound(seed):
    """Of two models, on 32 workers: within 5% of an even share, or of the longest chain."""
    draw = random.Random(seed)
    jobs, seconds = [], {}
    for number in range(200):
        model = draw.choice(["m1", "m2"])
        of_cell = [quantize(f"{number}", model), *(evaluate(f"{number}", n, model=model) for n in range(4))]
        jobs += of_cell
        seconds |= {job.id: draw.paretovariate(1.5) for job in of_cell}
    chains = [seconds[job.id] + (seconds[job.needs] if job.needs else 0) for job in jobs]
    bound = max(sum(seconds.values()) / 32, *chains)
    assert simulated_makespan(jobs, seconds, 32) <= 1.05 * bound
    assert simulated_makespan(jobs, dict.fromkeys(seconds, 1.0), 32) <= 1.05 * len(jobs) / 32 + 1


def test_what_needs_a_failed_job_is_skipped_and_the_rest_goes_on():
    schedule = Schedule([quantize("a"), quantize("b"), evaluate("a", 0), evaluate("a", 1), evaluate("b")])
    schedule.next_for("w0")
    schedule.fail("w0", retry=False)
    assert (schedule.failed, schedule.skipped) == ({"qa"}, {"ea0", "ea1"})
    assert schedule.unfinished == 2
    for _ in range(2):
        schedule.next_for("w0")
        schedule.finish("w0")
    assert schedule.finished == {"qb", "eb0"}
    assert schedule.done


def test_a_failed_evaluation_takes_nothing_with_it():
    schedule = Schedule([quantize("a"), evaluate("a", 0), evaluate("a", 1)], finished=["qa"])
    schedule.next_for("w0")
    schedule.fail("w0", retry=False)
    assert schedule.next_for("w0").id == "ea1"
    assert (schedule.failed, schedule.skipped) == ({"ea0"}, set())


def test_finished_jobs_are_not_run_again_and_free_their_dependents():
    schedule = Schedule([quantize("a"), evaluate("a", 0), evaluate("a", 1)], finished=["qa", "ea0", "older"])
    assert schedule.unfinished == 1
    assert schedule.next_for("w0").id == "ea1"


def test_nothing_to_do_is_done():
    assert Schedule([]).done
    assert Schedule([quantize("a")], finished=["qa"]).done


@settings(max_examples=300)
@given(data=st.data(), evaluations=st.lists(st.integers(-3, 3), min_size=1, max_size=6), workers=st.integers(1, 4))
def test_every_job_ends_exactly_once(data, evaluations, workers):
    """Whatever completes, fails, is retried or lost, in whatever order."""
    jobs = []
    for index, count in enumerate(evaluations):  # negative: an unquantized cell
        if count >= 0:
            jobs.append(quantize(str(index), f"m{index % 2}"))
        jobs += [evaluate(str(index), number, free=count < 0, model=f"m{index % 2}") for number in range(abs(count))]
    jobs = data.draw(st.permutations(jobs))
    before = set(data.draw(st.lists(st.sampled_from([job.id for job in jobs]), unique=True))) if jobs else set()
    needs = {job.id: job.needs for job in jobs}
    seconds = data.draw(st.none() | st.fixed_dictionaries({job.id: st.floats(0, 1e6) for job in jobs}))
    schedule = Schedule(jobs, before, seconds)
    starts: dict[str, int] = {}
    retries: dict[str, int] = {}
    while not schedule.done:
        for worker in range(workers):
            name = f"w{worker}"
            if name in schedule.running:
                continue
            job = schedule.next_for(name)
            if job is not None:
                starts[job.id] = starts.get(job.id, 0) + 1
                assert job.needs is None or job.needs in schedule.finished
                assert job.id not in before
        assert schedule.running, "jobs are left, and none can start"
        running = [job.id for job in schedule.running.values()]
        assert len(running) == len(set(running))
        worker = data.draw(st.sampled_from(sorted(schedule.running)))
        match data.draw(st.sampled_from(["finish", "finish", "fail", "retry", "lost"])):
            case "finish":
                schedule.finish(worker)
            case "fail":
                schedule.fail(worker, retry=False)
            case outcome:
                job = schedule.running[worker]
                again = schedule.attempts[job.id] < 3
                schedule.fail(worker, retry=again)
                retries[job.id] = retries.get(job.id, 0) + again
                if outcome == "lost":
                    schedule.forget_worker(worker)
    ended = [schedule.finished, schedule.failed, schedule.skipped]
    assert set.union(*ended) == set(needs)
    assert sum(map(len, ended)) == len(jobs)
    assert all(needs[job] in schedule.failed for job in schedule.skipped)
    for job in needs:
        tried = 0 if job in before or job in schedule.skipped else 1 + retries.get(job, 0)
        assert starts.get(job, 0) == tried == schedule.attempts.get(job, 0)


def made_at_home(keys="ab", evaluations=2):
    """Two nodes that share no directory, and a worker that sees the output; n1's have quantized all cells."""
    jobs = [job for key in keys for job in (quantize(key), *(evaluate(key, n) for n in range(evaluations)))]
    schedule = Schedule(jobs)
    for worker, home in {"w@n1": "n1", "v@n1": "n1", "w@n2": "n2", "w@n0": SHARED}.items():
        schedule.settle(worker, home)
    makers = [f"{key}@n1" for key in keys]
    for maker, key in zip(makers, keys, strict=True):
        schedule.settle(maker, "n1")
        assert schedule.next_for(maker).id == f"q{key}"
    for maker in makers:
        schedule.finish(maker)
        schedule.forget_worker(maker)
    return schedule


def test_an_artifact_that_stays_at_home_is_evaluated_there_alone():
    schedule = made_at_home("a")
    assert schedule.next_for("w@n2") is None
    assert schedule.next_for("w@n0") is None
    assert schedule.next_for("v@n1").id == "ea0"
    assert schedule.next_for("w@n2") is None  # not at the end of the sweep either
    assert schedule.next_for("w@n1").id == "ea1"


def test_what_was_made_in_the_output_directory_is_not_for_who_does_not_see_it():
    schedule = Schedule([quantize("a"), evaluate("a", 0), evaluate("a", 1), evaluate("f", free=True)], finished=["qa"])
    schedule.settle("w@n1", "n1")
    assert schedule.next_for("w@n1").id == "ef0"  # needs no artifact
    schedule.finish("w@n1")
    assert schedule.next_for("w@n1") is None
    assert [schedule.next_for(worker).id for worker in ("w0", "w1")] == ["ea0", "ea1"]


def test_a_job_that_failed_is_tried_again_at_home_by_another_if_there_is_one():
    schedule = made_at_home("a", 1)
    everybody = ["w@n1", "v@n1", "w@n2", "w@n0"]
    schedule.next_for("w@n1")
    schedule.fail("w@n1", retry=True, avoid=frozenset({"w@n1"}))
    assert schedule.next_for("w@n2", everybody) is None
    assert schedule.next_for("w@n1", everybody) is None
    assert schedule.next_for("w@n1", ["w@n1", "w@n2"]).id == "ea0"  # nobody else can


def test_a_worker_that_comes_back_elsewhere_leaves_what_it_held():
    schedule = made_at_home("a")
    assert schedule.next_for("w@n1").id == "ea0"
    schedule.finish("w@n1")
    schedule.settle("w@n1", SHARED)  # its node sees the output now
    assert schedule.next_for("w@n1") is None
    assert schedule.next_for("v@n1").id == "ea1"


def test_what_a_deserted_home_has_is_made_again():
    schedule = made_at_home("abc", 1)
    quantizing = {job.id: job for job in (quantize(key) for key in "abc")}
    assert schedule.next_for("v@n1").id == "ea0"
    assert schedule.deserted(["w@n2", "v@n1"]) == set()
    schedule.finish("v@n1")
    schedule.forget_worker("v@n1")
    assert schedule.deserted(["w@n2", "w@n0"]) == {"n1"}
    assert schedule.left_at("n1") == ["qb", "qc"]  # nothing waits for the other
    assert schedule.deserted(["w@n2", "w@n0"]) == set()  # told once
    for name in ("qb", "qc"):
        assert schedule.redo(quantizing[name])
    assert [schedule.next_for(worker).id for worker in ("w@n2", "w@n0")] == ["qb", "qc"]
    schedule.finish("w@n2")
    assert schedule.next_for("w@n1") is None  # n1 is there again: what was redone is not its own any more
    assert schedule.next_for("w@n2").id == "eb0"
    schedule.finish("w@n0")
    assert schedule.next_for("w@n2") is None
    assert schedule.next_for("w@n1") is None
    assert schedule.next_for("w@n0").id == "ec0"


def test_where_all_share_nothing_is_deserted():
    schedule = Schedule([quantize("a"), evaluate("a")], finished=["qa"])
    assert schedule.deserted([]) == schedule.deserted(["w0"]) == set()
    schedule.settle("w@n1", "n1")
    assert schedule.deserted(["w@n1"]) == {SHARED}
    assert schedule.deserted(["w@n1", "w0"]) == set()


@settings(max_examples=300)
@given(data=st.data(), cells=st.integers(1, 5), evaluations=st.integers(0, 3))
def test_every_job_ends_and_every_evaluation_is_where_its_artifact_is(data, cells, evaluations):
    """Nodes without a shared directory, whose workers come, go and fail."""
    jobs = [quantize(str(key), f"m{key % 2}") for key in range(cells)]
    jobs += [evaluate(str(key), n, model=f"m{key % 2}") for key in range(cells) for n in range(evaluations)]
    by_id, homes, made_at = {job.id: job for job in jobs}, ["", "n1", "n2"], {}
    schedule = Schedule(jobs)
    alive = {}
    for number, home in enumerate(data.draw(st.lists(st.sampled_from(homes), min_size=1, max_size=4))):
        alive[f"w{number}@{home}"] = home
        schedule.settle(f"w{number}@{home}", home)
    losses = 0
    while not schedule.done:
        for name, home in alive.items():
            job = None if name in schedule.running else schedule.next_for(name, alive)
            if job is not None and job.kind == "evaluate":
                assert made_at[job.cell.key] == home
        assert schedule.running, "jobs are left, and none can start"
        worker = data.draw(st.sampled_from(sorted(schedule.running)))
        what = data.draw(st.sampled_from(["finish", "finish", "retry", "lost"]))
        if what == "finish":
            job = schedule.finish(worker)
            if job.kind == "quantize":
                made_at[job.cell.key] = alive[worker]
        else:
            losses += 1
            schedule.fail(worker, retry=losses < 20, avoid=frozenset({worker}))
        if what == "lost":
            schedule.forget_worker(worker)
            home = alive.pop(worker)
            if not alive:
                home = data.draw(st.sampled_from(homes))
                alive[f"new@{home}"] = home
                schedule.settle(f"new@{home}", home)
            for deserted in schedule.deserted(alive):
                for name in schedule.left_at(deserted):
                    assert schedule.redo(by_id[name])
    assert schedule.finished | schedule.failed | schedule.skipped == set(by_id)


def test_finishing_what_does_not_run_is_our_own_mistake():
    with pytest.raises(KeyError):
        Schedule([quantize("a")]).finish("w0")
