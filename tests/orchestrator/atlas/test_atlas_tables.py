"""The map, from rows alone."""

import math
from datetime import timedelta

import pytest
from sample_sweep import CONFIG, MODEL, START, Row, cell_row, demo_events, demo_results

from orchestrator.atlas.advice import deployments, pareto_front
from orchestrator.atlas.assemble import assemble
from orchestrator.atlas.provenance import census_text, protocol_lines, provenance_lines
from orchestrator.atlas.rows import Atlas
from orchestrator.atlas.tables import HEAT_LEVELS, Entry, ModelMap, State, heat_level, model_maps

BARE = {"name": "bare", "models": [{"name": MODEL}]}


def row(
    method: str = "rtn", bits: int = 4, group: int = 64, options: str = "", model: str = MODEL, **more: object
) -> Row:
    measured = {"task": "lambada", "metric": "perplexity", "status": "ok", "higher_is_better": False}
    return cell_row(model, method, bits, 16, group, options) | measured | more


def fp(**more: object) -> Row:
    return row("fp", 16, 0, **more)


def only_map(rows: list[Row], config: Row = BARE) -> ModelMap:
    (found,) = model_maps(assemble(config, rows))
    return found


def entries(model_map: ModelMap, label: str) -> list[Entry]:
    (cell,) = [cell for cell in model_map.cells if model_map.cell_labels[cell.key] == label]
    return [model_map.entry(cell, column) for column in model_map.columns]


@pytest.fixture
def demo() -> Atlas:
    return assemble(CONFIG, demo_results(), [], demo_events())


def test_demo_has_every_cell_once_fp_first_then_from_many_bits_to_few(demo: Atlas) -> None:
    (model_map,) = model_maps(demo)
    assert model_map.cells[0].is_fp
    assert model_map.weight_bits == (8, 4, 3, 2)
    bits = [cell.weight_bits for cell in model_map.cells]
    assert bits == sorted(bits, reverse=True)
    assert len(set(model_map.cell_labels.values())) == len(model_map.cells) == 16
    assert [column.task for column in model_map.columns] == ["boolq-passages", "lambada", "arc_easy", "piqa"]


def test_states_say_what_happened(demo: Atlas) -> None:
    (model_map,) = model_maps(demo)
    assert {entry.text for entry in entries(model_map, "gptq w2 per-channel asym")} == {"failed: out of memory"}
    assert {entry.text for entry in entries(model_map, "awq w3 g64 asym")} == {"not run yet"}
    smooth = entries(model_map, "smoothquant w4a4 per-channel sym alpha=0.5")
    assert {(entry.state, entry.text, entry.value) for entry in smooth} >= {(State.NON_FINITE, "non-finite", None)}
    assert all(entry.state is State.NON_FINITE and entry.change is None for entry in smooth)
    assert census_text([model_map]).startswith("16 cells: 13 complete, 1 with non-finite")
    assert model_map.failures[0].error.startswith("tried to allocate")


def test_change_is_positive_where_worse_in_both_directions() -> None:
    accuracy = {"task": "piqa", "metric": "acc", "higher_is_better": True}
    found = only_map([fp(value=20.0), row(value=22.0), fp(value=0.8, **accuracy), row(value=0.6, **accuracy)])
    perplexity, piqa = entries(found, "rtn w4 g64")
    assert perplexity.change == pytest.approx(0.1)
    assert perplexity.difference == "+10.0%"
    assert piqa.change == pytest.approx(0.25)
    assert piqa.difference == "−20.0"
    assert piqa.text == "60.0"


def test_best_is_best_among_as_many_or_fewer_bits() -> None:
    values = {("rtn", 8): 20.5, ("rtn", 4): 30.0, ("gptq", 4): 25.0, ("rtn", 3): 26.0, ("gptq", 3): 24.0}
    found = only_map([fp(value=20.0), *(row(method, bits, value=value) for (method, bits), value in values.items())])
    best = {
        found.cell_labels[cell.key]
        for cell in found.cells
        for column in found.columns
        if found.entry(cell, column).best
    }
    assert best == {"rtn w8 g64", "gptq w3 g64"}  # no 4-bit cell: a 3-bit one beats them


@pytest.mark.parametrize(
    ("change", "level"),
    [(-0.5, 0), (0.0, 0), (0.001, 0), (0.01, 3), (0.1, 7), (1.0, 10), (1e6, 10), (math.inf, 10), (-math.inf, 0)],
)
def test_heat_is_logarithmic_and_clipped(change: float, level: int) -> None:
    assert heat_level(change) == level <= HEAT_LEVELS


def test_empty_sweep_shows_what_it_asks_for() -> None:
    (model_map,) = model_maps(assemble(CONFIG, []))
    assert len(model_map.cells) == 16
    assert {entry.state for entry in model_map.entries.values()} == {State.PENDING}
    assert len(model_map.columns) == 4
    assert deployments(model_map) == []


def test_sweep_without_models_or_rows_has_no_map() -> None:
    atlas = assemble({}, [], default_name="folder")
    assert atlas.name == "folder"
    assert model_maps(atlas) == []


def test_only_fp() -> None:
    found = only_map([fp(value=20.0, checkpoint_bytes=100)])
    assert found.variants == ()
    assert found.fp_entry(found.columns[0]) is not None
    assert deployments(found) == []


def test_without_fp_nothing_is_compared() -> None:
    found = only_map([row(value=22.0, checkpoint_bytes=100)])
    assert found.reference is not None
    assert found.reference.pending
    assert entries(found, "rtn w4 g64")[0].change is None
    assert deployments(found) == []


def test_non_finite_fp_is_no_reference() -> None:
    found = only_map([fp(value=math.nan, status="non_finite"), row(value=22.0)])
    assert entries(found, "rtn w4 g64")[0].change is None


def test_infinite_value_with_status_ok_is_shown_as_non_finite() -> None:
    assert entries(only_map([row(value=math.inf)]), "rtn w4 g64")[0].text == "non-finite"


def test_all_failed_keeps_cells_and_columns() -> None:
    failed = {"status": "failed", "value": None, "error_kind": "worker_died", "higher_is_better": None}
    found = only_map([fp(**failed), row(**failed), row(bits=3, **failed | {"task": "quantize", "metric": None})])
    assert [column.task for column in found.columns] == ["lambada"]
    assert not found.columns[0].higher_is_better
    assert {entry.text for entry in found.entries.values()} == {"failed: worker died"}
    assert len(found.failures) == 3


def test_failed_task_without_metric_fills_every_column_of_its_task() -> None:
    tasks = [row(task="piqa", metric=metric, value=0.5, higher_is_better=True) for metric in ("acc", "acc_norm")]
    failed = row(bits=3, task="piqa", metric=None, value=None, status="failed", error_kind="timeout")
    found = only_map([*tasks, failed])
    assert [entry.text for entry in entries(found, "rtn w3 g64")] == ["failed: timeout"] * 2
    assert [found.column_labels[column] for column in found.columns] == ["piqa acc", "piqa acc_norm"]


def test_duplicates_appear_once_and_the_newest_stands() -> None:
    older = row(value=30.0, finished_at=START)
    newer = row(value=25.0, finished_at=START + timedelta(hours=1))
    atlas = assemble(BARE, [newer, older, newer])
    assert [measurement.value for measurement in atlas.measurements] == [25.0]


def test_a_failure_that_was_made_good_is_counted_and_not_shown() -> None:
    failed = row(value=None, status="failed", error_kind="worker_died", finished_at=START)
    unquantized = row(task="quantize", metric=None, value=None, status="failed", finished_at=START)
    good = row(value=25.0, finished_at=START + timedelta(hours=1))
    atlas = assemble(BARE, [failed, unquantized, good])
    assert [measurement.status for measurement in atlas.measurements] == ["ok"]
    assert atlas.superseded == 2
    assert "2 failures made good" in dict(provenance_lines(atlas))["Sessions"]


def test_a_later_failure_does_not_hide_what_was_measured() -> None:
    good = row(value=25.0, finished_at=START)
    lost = row(task="quantize", metric=None, value=None, status="failed", error_kind="disk_full")
    atlas = assemble(BARE, [good, lost | {"finished_at": START + timedelta(hours=1)}, fp(task="boolq", value=9.0)])
    (model_map,) = model_maps(atlas)
    assert [entry.text for entry in entries(model_map, "rtn w4 g64")] == ["failed: disk full", "25.00"]


def test_numbers_of_different_protocols_never_share_a_column() -> None:
    short, long = '{"sequence_length": 512, "stride": 1}', '{"stride": 1, "sequence_length": 1024}'
    same = '{"sequence_length": 1024, "stride": 1}'
    rows = [fp(value=20.0, protocol=same), row(value=21.0, protocol=long), row(bits=3, value=22.0, protocol=short)]
    found = only_map(rows)
    assert [found.column_labels[column] for column in found.columns] == [
        "lambada (sequence_length 512)",
        "lambada (sequence_length 1024)",
    ]
    assert [entry.text for entry in entries(found, "rtn w4 g64")] == ["not run yet", "21.00"]
    assert "stride 1" in protocol_lines(found)[0][1]


def test_one_task_asked_plainly_and_as_a_conversation() -> None:
    plain = {"task": "boolq", "metric": "acc", "higher_is_better": True}
    rows = [
        fp(**plain, value=0.5, protocol='{"limit": 9}'),
        fp(**plain, value=0.4, protocol='{"limit": 9, "chat": "default"}'),
    ]
    found = only_map(rows)
    assert sorted(found.column_labels[column] for column in found.columns) == [
        "boolq (chat default)",
        "boolq (without chat)",
    ]


def test_two_models_keep_to_themselves() -> None:
    config = BARE | {"models": ["b", "a"]}
    rows = [
        fp(model="a", value=10.0),
        row(model="a", value=11.0),
        fp(model="b", value=20.0),
        row(model="b", value=21.0),
    ]
    second, first = model_maps(assemble(config, rows))
    assert (second.model, first.model) == ("b", "a")
    assert entries(first, "rtn w4 g64")[0].difference == "+10.0%"
    assert entries(second, "rtn w4 g64")[0].difference == "+5.0%"


def test_cells_that_differ_in_nothing_visible_are_told_apart_by_id() -> None:
    rows = [row(value=21.0), row(value=22.0, cell_id="other")]
    found = only_map(rows)
    assert len(found.variants) == 2
    assert len(set(found.cell_labels.values())) == len(found.cells)


def test_labels_name_options_and_calibration_only_where_they_differ() -> None:
    ordered, plain = '{"act_order": true, "damping": 0.01}', '{"act_order": false, "damping": 0.01}'
    rows = [row("gptq", options=ordered, value=1.0), row("gptq", options=plain, value=1.0), row(value=1.0)]
    assert set(only_map(rows).cell_labels.values()) == {
        "fp",
        "rtn w4 g64",
        "gptq w4 g64 act_order=true",
        "gptq w4 g64 act_order=false",
    }


def test_missing_cells_are_matched_by_what_the_sweep_file_states() -> None:
    grid = [
        {"method": "gptq", "weight_bits": [4, 3], "group_size": [64, "per_channel"], "options": {"act_order": True}}
    ]
    rows = [row("gptq", 4, 64, '{"act_order": true, "damping": 0.01}', value=21.0), row("gptq", 4, 0, "{}", value=22.0)]
    found = only_map(rows, BARE | {"grid": grid})
    pending = {found.cell_labels[cell.key] for cell in found.cells if cell.pending and not cell.is_fp}
    assert {label.split(" act_order")[0] for label in pending} == {"gptq w3 g64", "gptq w3 per-channel"}


def test_several_calibrations_are_an_axis() -> None:
    config = BARE | {
        "grid": [{"method": "gptq", "weight_bits": 4}],
        "calibration": [{"corpus": "lambada", "samples": 64}, {"corpus": "lambada", "samples": 128}],
    }
    done = row("gptq", value=21.0) | {"calibration": '{"corpus": "lambada", "samples": 64}'}
    found = only_map([done], config)
    assert "gptq w4 g64 samples=64" in found.cell_labels.values()
    assert [cell.calibration["samples"] for cell in found.cells if cell.pending and not cell.is_fp] == [128]


def test_deployment_names_the_smallest_within_each_limit() -> None:
    sizes = {("rtn", 8): (20.1, 60), ("gptq", 8): (20.15, 62), ("gptq", 4): (20.9, 35), ("rtn", 4): (23.0, 34)}
    rows = [row(method, bits, value=value, checkpoint_bytes=size) for (method, bits), (value, size) in sizes.items()]
    found = only_map([fp(value=20.0, checkpoint_bytes=100), *rows])
    said = [(item.limit, item.answer(found), item.saving) for item in deployments(found)]
    assert said == [(0.01, "rtn w8 g64", pytest.approx(0.4)), (0.05, "gptq w4 g64", pytest.approx(0.65))]
    assert deployments(found)[1].headline(found) == "smallest within 5% of fp perplexity on lambada"
    assert deployments(found)[1].detail(found) == "0.0 MB (−65%), perplexity 20.90 (+4.5%)"


def test_deployment_is_silent_where_no_cell_is_good_enough() -> None:
    assert deployments(only_map([fp(value=20.0, checkpoint_bytes=100), row(value=90.0, checkpoint_bytes=30)])) == []


def test_deployment_never_advises_a_checkpoint_larger_than_fp() -> None:
    assert deployments(only_map([fp(value=20.0, checkpoint_bytes=100), row(value=20.0, checkpoint_bytes=130)])) == []


def test_pareto_front() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 6.0), (2.0, 3.0), (4.0, 1.0)]
    assert pareto_front(points, higher_is_better=False) == [(1.0, 5.0), (2.0, 3.0), (3.0, 1.0)]
    assert pareto_front(points, higher_is_better=True) == [(1.0, 5.0), (2.0, 6.0)]
    assert pareto_front([], higher_is_better=True) == []


def test_history_knows_the_running_job(demo: Atlas) -> None:
    assert demo.history.open
    assert demo.history.running == (f"{MODEL} awq w3 g64: quantize",)
    assert (demo.history.sessions, demo.history.retries, demo.history.workers_lost) == (2, 1, 1)


def test_a_divergence_is_its_own_change_from_fp() -> None:
    model_map = only_map(
        [
            row(method="fp", weight_bits=16, metric="kl_divergence", value=0.0, higher_is_better=False),
            row(metric="kl_divergence", value=0.1, higher_is_better=False),
        ]
    )
    (entry,) = entries(model_map, "rtn w4 g64")
    assert (entry.change, entry.heat) == (0.1, 7)
    assert model_map.columns[0].unit == "token"
