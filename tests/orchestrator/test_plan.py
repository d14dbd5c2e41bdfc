"""The plan: which cells and jobs, in which order, under which ids. Pure."""

import dataclasses

import pytest

import quantizers.rtn
from evaluators.slices import Slice
from orchestrator.plan import content_hash, make_plan

CALIBRATION = {"corpus": "lambada", "samples": 2, "sequence_length": 64}


def test_cells_stand_in_the_order_of_the_file_and_fp_first(make_sweep, plan_of):
    plan = plan_of(make_sweep())
    assert [cell.id.rsplit(".", 1)[0] for cell in plan.cells[1:]] == [
        "tiny.rtn-w8-g64",
        "tiny.rtn-w4-g64",
        "tiny.gptq-w4-g64",
    ]
    fp = plan.cells[0]
    assert (fp.id, fp.method, fp.weight_bits, fp.scheme, fp.calibration) == ("tiny.fp", "fp", 16, None, None)


def test_jobs_start_with_fp_then_calibrated_then_quick_quantizing_then_evaluations(make_sweep, plan_of):
    jobs = plan_of(make_sweep()).jobs
    assert [job.label for job in jobs] == [
        "tiny fp: boolq-passages",
        "tiny fp: arc_easy",
        "tiny gptq-w4-g64: quantize",
        "tiny rtn-w8-g64: quantize",
        "tiny rtn-w4-g64: quantize",
        "tiny rtn-w8-g64: boolq-passages",
        "tiny rtn-w8-g64: arc_easy",
        "tiny rtn-w4-g64: boolq-passages",
        "tiny rtn-w4-g64: arc_easy",
        "tiny gptq-w4-g64: boolq-passages",
        "tiny gptq-w4-g64: arc_easy",
    ]


def test_an_evaluation_needs_the_quantizing_of_its_own_cell(make_sweep, plan_of):
    jobs = plan_of(make_sweep()).jobs
    quantize = {job.cell.id: job.id for job in jobs if job.kind == "quantize"}
    for job in jobs:
        wanted = quantize.get(job.cell.id) if job.kind == "evaluate" else None
        assert job.needs == wanted
    assert len({job.id for job in jobs}) == len(jobs)


def test_each_model_has_its_own_cells(make_sweep, plan_of):
    models = [{"name": name, "source": f"somewhere/{name}"} for name in ("one", "two")]
    plan = plan_of(make_sweep(models=models))
    assert [cell.id for cell in plan.cells if cell.scheme is None] == ["one.fp", "two.fp"]
    assert len(plan.cells) == 8
    assert len({cell.key for cell in plan.cells}) == 8


def test_equal_grid_points_become_one(make_sweep, plan_of):
    entry = {"method": "rtn", "weight_bits": 4, "group_size": 64}
    once, thrice = (
        plan_of(make_sweep(grid=grid)) for grid in ([entry], [entry, entry | {"symmetric": False}, dict(entry)])
    )
    assert thrice == once


def test_equal_evaluations_become_one(make_sweep, plan_of):
    once = plan_of(make_sweep(evaluation={"tasks": [{"name": "piqa"}]}))
    assert plan_of(make_sweep(evaluation={"tasks": [{"name": "piqa"}, {"name": "piqa"}]})) == once


def test_one_model_under_two_names_is_measured_once_and_under_one_name(make_sweep, make_identities):
    sweep = make_sweep(models=[{"name": name, "source": "somewhere/same"} for name in ("one", "two")])
    same = dataclasses.replace(make_identities(sweep), models={"one": "same", "two": "same"})
    tokens = {key: key[1] for key in same.calibrations}
    data = {key: key[1] for key in same.evaluations}
    plan = make_plan(sweep, dataclasses.replace(same, calibrations=tokens, evaluations=data))
    assert {cell.model for cell in plan.cells} == {"one"}


@pytest.fixture
def sliced_plan(make_sweep, make_identities):
    """Of piqa in a number of slices, which has so many units."""

    def make(count, units):
        sweep = make_sweep(evaluation={"tasks": [{"name": "piqa", "slices": count}]})
        identities = make_identities(sweep)
        # What identifies a task knows nothing of slices.
        evaluations = {(model, key): f"{model} piqa" for model, key in identities.evaluations}
        (task,) = sweep.evaluation.tasks
        return make_plan(sweep, dataclasses.replace(identities, evaluations=evaluations, units={task.key: units}))

    return make


def test_a_task_in_slices(sliced_plan):
    whole, sliced = sliced_plan(1, 9), sliced_plan(3, 9)
    assert [job.label for job in sliced.jobs if job.cell.method in {"fp", "gptq"}] == [
        "tiny fp: piqa 1/3",
        "tiny fp: piqa 2/3",
        "tiny fp: piqa 3/3",
        "tiny gptq-w4-g64: quantize",
        "tiny gptq-w4-g64: piqa 1/3",
        "tiny gptq-w4-g64: piqa 2/3",
        "tiny gptq-w4-g64: piqa 3/3",
    ]
    parts = [job for job in sliced.jobs if job.kind == "evaluate"]
    assert [job.slice for job in parts] == [Slice(index, 3) for index in range(3)] * 4
    assert {job.task for job in parts} == {"piqa"}
    assert len({job.id for job in sliced.jobs}) == len(sliced.jobs)
    quantize = {job.cell.id: job.id for job in sliced.jobs if job.kind == "quantize"}
    assert all(job.needs == quantize.get(job.cell.id) for job in parts)
    # The whole is the job that would have been without slices, but for what was asked.
    by_id = {job.id: job for job in whole.jobs}
    for job in parts:
        assert job.id not in by_id
        assert job.whole.label == by_id[job.whole_id].label == job.whole.whole.label
        assert (job.whole.id, job.whole.slice, job.whole.needs) == (job.whole_id, None, job.needs)


def test_another_number_of_slices_makes_other_slices_of_the_same(sliced_plan):
    three, four = (sliced_plan(count, 9).jobs for count in (3, 4))
    quantize = {job.id for job in three if job.kind == "quantize"}
    assert {job.id for job in three} & {job.id for job in four} == quantize
    assert {job.whole.id for job in three} == {job.whole.id for job in four}


@pytest.mark.parametrize(("units", "labels"), [(2, ["1/2", "2/2"]), (1, [])])
def test_a_task_is_cut_into_no_more_slices_than_it_has_units(sliced_plan, units, labels):
    plan = sliced_plan(3, units)
    assert [str(job.slice) for job in plan.jobs if job.cell.scheme is None and job.slice] == labels
    if not labels:
        assert {job.id for job in plan.jobs} == {job.id for job in sliced_plan(1, 9).jobs}


def test_a_task_that_is_named_twice_is_cut_as_at_first(make_sweep, make_identities):
    tasks = [{"name": "piqa", "slices": 2}, {"name": "piqa"}]
    sweep = make_sweep(evaluation={"tasks": tasks})
    identities = make_identities(sweep)
    evaluations = dict.fromkeys(identities.evaluations, "piqa")
    units = {task.key: 9 for task in sweep.evaluation.tasks}
    plan = make_plan(sweep, dataclasses.replace(identities, evaluations=evaluations, units=units))
    assert [job.label for job in plan.jobs if job.cell.scheme is None] == ["tiny fp: piqa 1/2", "tiny fp: piqa 2/2"]


def test_calibrations_are_an_axis_of_the_methods_that_look_at_data(make_sweep, plan_of):
    sweep = make_sweep(calibration=[CALIBRATION, CALIBRATION | {"seed": 1}, CALIBRATION | {"samples": 4}])
    cells = plan_of(sweep).cells
    assert [(cell.method, cell.calibration and cell.calibration.seed) for cell in cells] == [
        ("fp", None),
        ("rtn", None),
        ("rtn", None),
        ("gptq", 0),
        ("gptq", 1),
        ("gptq", 0),
    ]
    assert len({cell.key for cell in cells}) == len(cells)
    assert len({cell.id for cell in cells}) == len(cells)


def ids(plan):
    return {job.label: job.id for job in plan.jobs}


def test_ids_are_the_same_in_every_run(make_sweep, plan_of):
    assert ids(plan_of(make_sweep())) == ids(plan_of(make_sweep()))


def test_ids_do_not_depend_on_names_order_or_neighbours(make_sweep, plan_of, make_document):
    whole = ids(plan_of(make_sweep()))
    grid = list(reversed(make_document()["grid"]))[:1]
    fewer = ids(plan_of(make_sweep(name="other", grid=grid, workers={"count": 7})))
    assert fewer.items() <= whole.items()


def changed(before, after):
    return {label for label in before if before[label] != after[label]}


def test_other_weights_change_every_id(make_sweep, plan_of):
    before = ids(plan_of(make_sweep()))
    assert changed(before, ids(plan_of(make_sweep(), weights="!"))) == set(before)


def test_another_dtype_changes_every_id(make_sweep, plan_of):
    before = ids(plan_of(make_sweep()))
    models = [{"name": "tiny", "source": "somewhere/tiny", "dtype": "float32"}]
    assert changed(before, ids(plan_of(make_sweep(models=models)))) == set(before)


def test_other_calibration_tokens_change_the_cells_that_saw_them(make_sweep, plan_of):
    before = ids(plan_of(make_sweep()))
    assert changed(before, ids(plan_of(make_sweep(), tokens="!"))) == {label for label in before if "gptq" in label}


def test_other_evaluation_data_changes_evaluations_alone(make_sweep, plan_of):
    before = ids(plan_of(make_sweep()))
    different = changed(before, ids(plan_of(make_sweep(), data="!")))
    assert different == {label for label in before if not label.endswith("quantize")}


def test_another_code_version_changes_the_cells_of_that_method(make_sweep, plan_of, monkeypatch):
    before = ids(plan_of(make_sweep()))
    monkeypatch.setattr(quantizers.rtn.Rtn, "code_version", "rtn/999")
    assert changed(before, ids(plan_of(make_sweep()))) == {label for label in before if "rtn" in label}


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 32},
        {"symmetric": True},
        {"scale_dtype": "float32"},
        {"tail_group": True},
        {"options": {"act_order": False}},
        {"options": {"damping": 0.02}},
    ],
)
def test_any_field_of_the_scheme_changes_the_ids(make_sweep, plan_of, change):
    entry = {"method": "gptq", "weight_bits": 4, "group_size": 64}
    before, after = (plan_of(make_sweep(grid=[grid])).jobs for grid in (entry, entry | change))
    fp = {job.id for job in before if job.cell.scheme is None}
    assert {job.id for job in before} & {job.id for job in after} == fp


def test_content_hash_looks_at_content_alone():
    assert content_hash({"a": 1, "b": [2, None]}) == content_hash({"b": [2, None], "a": 1})
    assert content_hash([1, 2]) != content_hash([2, 1])
    assert content_hash("1") != content_hash(1)
