"""What `bitatlas plan` shows besides time."""

import io

from rich.console import Console

from orchestrator.footprint import Footprint
from orchestrator.inputs import Inputs
from orchestrator.plan_view import plan_table, room_lines


def shown(sweep, plan, model_input, done, identities):
    inputs = Inputs(models={"tiny": model_input}, identities=identities)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan_table(sweep.name, plan, inputs, done))
    return console.export_text()


def test_a_few_cells_are_shown_one_by_one(make_sweep, plan_of, model_input, make_identities):
    sweep = make_sweep(grid=[{"method": "rtn", "weight_bits": [8, 4], "group_size": 64}])
    plan = plan_of(sweep)
    text = shown(sweep, plan, model_input, {plan.jobs[0].id}, make_identities(sweep))
    assert "study: 3 cells, 8 jobs, 1 done" in text
    row = next(line for line in text.splitlines() if "tiny.rtn-w4" in line).split()
    assert row[3:8:2] == ["3", "0", "4.375"]


def test_many_cells_are_summed_up_by_model_and_method(make_sweep, plan_of, model_input, make_identities):
    options = {"damping": [step / 100 for step in range(1, 41)]}
    grid = [{"method": ["gptq", "gptaq"], "weight_bits": 4, "group_size": [64, 32], "options": options}]
    sweep = make_sweep(grid=grid)
    text = shown(sweep, plan_of(sweep), model_input, set(), make_identities(sweep))
    (row,) = [line.split() for line in text.splitlines() if "tiny gptaq (80 cells)" in line]
    assert row[5:] == ["│", "240", "│", "0", "│", "4.375", "to", "4.625", "│", *row[14:]]


def test_what_is_done_is_left_out_where_it_cannot_be_told(make_sweep, plan_of, model_input, make_identities):
    sweep = make_sweep()
    text = shown(sweep, plan_of(sweep), model_input, None, make_identities(sweep))
    assert "done" not in text


def test_memory_and_disk():
    needs = Footprint(
        host_bytes=4.5e9, device_bytes=38.9e9, largest_job="m gptq: quantize", artifact_bytes=51e9, cache_bytes=0.2e9
    )
    assert room_lines(needs, "outputs/study") == [
        "memory: a worker needs up to 38.9 GB of its device and 4.5 GB of its node's (most: m gptq: quantize)",
        "disk: 51.0 GB of artifacts in outputs/study, 0.2 GB of shared statistics",
    ]
    on_cpu = Footprint(host_bytes=3e9, device_bytes=None, largest_job="m fp: c4", artifact_bytes=1e9, cache_bytes=0)
    assert room_lines(on_cpu, "out") == [
        "memory: a worker needs up to 3.0 GB of its node's (most: m fp: c4)",
        "disk: 1.0 GB of artifacts in out",
    ]
