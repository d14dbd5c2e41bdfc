"""The counts of what a sweep shared, on events without a sweep."""

from pathlib import Path

import pytest

from orchestrator.plan import make_plan
from tests.benchmarks import bench_sharing
from tests.benchmarks.bench_sharing import BOTH, THREADS_PROBE, counts
from tests.benchmarks.made_up import document, made_up


def test_both_sides_can_do_twelve_cells_of_the_grid():
    assert len(BOTH) == 12
    assert THREADS_PROBE in BOTH
    assert BOTH["gptq W3"].scheme == {"method": "gptq", "weight_bits": 3, "group_size": 64}
    assert BOTH["smoothquant W3"].scheme == {"method": "smoothquant", "weight_bits": 3, "activation_bits": 8}
    scripts = Path(bench_sharing.__file__).parent / "peers"
    assert all((scripts / cell.peer).is_file() for cell in BOTH.values())


@pytest.fixture
def plan():
    """RTN shares nothing; SmoothQuant's two cells want the same statistics."""
    sweep, inputs = made_up(
        document(1)
        | {
            "grid": [
                {"method": "rtn", "weight_bits": 4, "group_size": 64},
                {"method": "smoothquant", "weight_bits": [8, 4], "activation_bits": 8},
            ]
        }
    )
    return make_plan(sweep, inputs.identities)


def events(plan):
    """Two workers in turn: each loads the model at its first evaluation, the first SmoothQuant cell has the work."""
    rows, loaded, computed = [], set(), set()
    for number, job in enumerate(plan.jobs):
        worker = f"cpu-{number % 2}@here"
        happened = [] if job.evaluation else ["artifact_made"]
        if job.evaluation and worker not in loaded:
            loaded.add(worker)
            happened.append("model_loaded")
        if not job.evaluation and job.cell.method == "smoothquant":
            happened.append("statistics_read" if computed else "statistics_computed")
            computed.add(job.id)
        for event in (*happened, "finished"):
            rows.append({"event": event, "worker": worker, "job_id": job.id, "seconds": 1.0})
    return [{"event": "session_started", "worker": None, "job_id": None, "seconds": 2.0}, *rows]


def test_what_is_made_once_each(plan):
    found = counts(events(plan), plan)
    assert found["is_once"]
    assert found["times"] == {
        "loads per worker and model": [1, 1],
        "artifacts per cell": [1, 1, 1],
        "computations per statistics": [1],
    }
    assert found["events"]["statistics_read"] == 1
    assert found["cells_with_shared_statistics"] == 2


@pytest.mark.parametrize("event", ["model_loaded", "artifact_made", "statistics_computed"])
def test_what_is_made_again_or_not_told(plan, event):
    rows = events(plan)
    some = next(row for row in rows if row["event"] == event)
    assert not counts([*rows, some], plan)["is_once"]
    assert not counts([row for row in rows if row is not some], plan)["is_once"]
