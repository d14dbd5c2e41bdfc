"""Scores over calibration seeds."""

import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sample_sweep import write_sweep
from test_atlas_tables import BARE, fp, only_map, row

from orchestrator.atlas.report import print_report, write_report
from orchestrator.atlas.seeds import seed_rows


def seeded(seed: int, value: float | None, samples: int = 64) -> dict[str, Any]:
    recipe = f'{{"corpus": "lambada", "samples": {samples}, "seed": {seed}}}'
    known = {"status": "non_finite"} if value is None else {"value": value}
    return row("gptq", cell_id=f"gptq-{samples}-{seed}", calibration=recipe, **known)


def test_cells_that_differ_in_the_seed_alone_are_one_row() -> None:
    values = [21.0, 21.5, 22.6]
    rows = [fp(value=20.0), row(value=25.0), *(seeded(seed, value) for seed, value in enumerate(values))]
    (found,) = seed_rows(only_map(rows))
    assert found.label == "gptq w4 g64"
    assert found.seeds == "0, 1, 2"
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    assert found.scores == (f"{mean:.2f} ±{deviation:.2f} (+8.5%)",)


def test_another_recipe_is_another_row_and_one_seed_is_none() -> None:
    rows = [seeded(0, 21.0), seeded(1, 22.0), seeded(0, 23.0, samples=128), seeded(1, 25.0, samples=128)]
    assert [found.label for found in seed_rows(only_map(rows))] == ["gptq w4 g64 samples=64", "gptq w4 g64 samples=128"]
    assert seed_rows(only_map([row(value=21.0), seeded(0, 22.0)])) == []


@pytest.mark.parametrize(
    ("values", "text"),
    [([21.0, None], "21.00; non-finite"), ([None, None], "non-finite"), ([21.0, 23.0, None], "22.00")],
)
def test_what_is_not_finite_is_counted_and_not_averaged(values: list[float | None], text: str) -> None:
    (found,) = seed_rows(only_map([seeded(seed, value) for seed, value in enumerate(values)]))
    assert found.scores[0].startswith(text)
    assert found.scores[0].endswith("non-finite")


def test_every_form_of_the_report_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_sweep(tmp_path, config=BARE, results=[fp(value=20.0), seeded(0, 21.0), seeded(1, 23.0)])
    written = write_report(directory)
    assert "| gptq w4 g64 | 0, 1 | 22.00 ±1.41 (+10.0%) |" in written.markdown.read_text(encoding="utf-8")
    page = written.html.read_text(encoding="utf-8")
    assert "Over calibration seeds" in page
    assert "22.00 ±1.41 (+10.0%)" in page
    print_report(directory, Console(width=80))
    assert "22.00 ±1.41 (+10.0%)" in capsys.readouterr().out
