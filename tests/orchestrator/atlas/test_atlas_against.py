"""Every cell against fp on the same documents: from items to verdicts, and in every form of the report."""

import io
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sample_sweep import CONFIG, MODEL, Row, cell_row, demo_items, demo_results, demo_sweep, write_part, write_sweep
from test_atlas_tables import BARE, fp, row

from orchestrator.atlas import load, print_report, write_report
from orchestrator.atlas.against_fp import AgainstFp, Kind, Verdict
from orchestrator.atlas.against_texts import NOTE, TITLE, against_lines
from orchestrator.atlas.assemble import assemble
from orchestrator.atlas.load_items import load_items
from orchestrator.atlas.rows import ItemKey, ItemScores
from orchestrator.atlas.tables import ModelMap, model_maps
from orchestrator.errors import BitatlasError
from orchestrator.schema import ITEMS

PIQA = {"task": "piqa", "metric": "acc", "higher_is_better": True}
JOB = "0" * 12


def key_of(result: Row) -> ItemKey:
    metric = "nll" if result["metric"] == "perplexity" else str(result["metric"])
    return (result["model"], result["cell_id"], result["job_id"], result["task"], metric)


def scored(values: list[float], *, choices: int = 2, ids: list[int] | None = None, unanswered: int = 0) -> ItemScores:
    """Items of one job; the first `unanswered` have a nan among their log-likelihoods."""
    documents = range(len(values)) if ids is None else ids
    return ItemScores(
        doc_ids_N=np.array(documents, dtype=np.int64),
        values_N=np.array(values, dtype=float),
        choices_N=np.full(len(values), choices, dtype=np.int64),
        answered_N=np.arange(len(values)) >= unanswered,
    )


def mapped(pairs: list[tuple[Row, ItemScores | None]]) -> ModelMap:
    items = {key_of(result): found for result, found in pairs if found is not None}
    (model_map,) = model_maps(assemble(BARE, [result for result, _ in pairs], items=items))
    return model_map


def against(*others: ItemScores | None, reference: ItemScores, **column: object) -> AgainstFp:
    """fp and one cell for each of the others, from 8 bits down, in one column."""
    value = column.get("value", 0.5)
    pairs = [(fp(**{**column, "value": value}), reference)]
    pairs += [
        (row(bits=8 - index, **{**column, "value": value}), found)  # type: ignore[list-item]
        for index, found in enumerate(others)
    ]
    (found,) = mapped(pairs).against
    return found


def answers(right: int, wrong: int) -> list[float]:
    return [1.0] * right + [0.0] * wrong


# What is compared


def test_flips_difference_and_test_of_an_accuracy() -> None:
    other = scored([0.0] * 12 + answers(108, 77) + [1.0] * 3)
    found = against(other, reference=scored(answers(120, 80)), **PIQA)
    assert found.kind is Kind.RIGHT_OR_WRONG
    reference, cell = found.rows
    assert reference.cell.is_fp
    assert (reference.change, reference.flips, reference.p_value, reference.verdict) == (None, None, None, Verdict.NONE)
    assert reference.score is not None
    assert reference.score.value == 0.6
    assert cell.flips is not None
    assert (cell.flips.gained, cell.flips.lost, cell.flips.items) == (3, 12, 200)
    assert cell.change is not None
    assert cell.change.value == pytest.approx(-0.045)
    assert cell.p_value == pytest.approx(2 * sum(math.comb(15, k) for k in range(4)) / 2**15)
    assert cell.verdict is Verdict.LOSS


def test_documents_are_matched_by_id() -> None:
    found = against(scored([0.0, 1.0], ids=[9, 4]), reference=scored([1.0, 0.0], ids=[4, 9]), **PIQA)
    assert found.rows[1].change is not None
    assert found.rows[1].change.value == 0


def test_p_values_are_adjusted_over_the_cells_of_the_column() -> None:
    worse = scored(answers(110, 90))
    alone = against(worse, reference=scored(answers(120, 80)), **PIQA).rows[1]
    same = scored(answers(120, 80))
    beside = against(worse, same, same, reference=scored(answers(120, 80)), **PIQA).rows
    assert alone.p_value == pytest.approx(2 / 1024)
    assert [cell.p_value for cell in beside[1:]] == [pytest.approx(6 / 1024), 1.0, 1.0]


@pytest.mark.parametrize(
    ("items", "lost", "gained", "verdict"),
    [
        (200, 0, 0, Verdict.NO_MEASURABLE_LOSS),  # the bootstrap's [0, 0] claims nothing of a point with 200 items
        (380, 0, 0, Verdict.NO_MEASURABLE_LOSS),
        (381, 0, 0, Verdict.LOSSLESS),
        (2000, 12, 10, Verdict.LOSSLESS),
        (2000, 60, 50, Verdict.NO_MEASURABLE_LOSS),
        (2000, 12, 0, Verdict.LOSS),  # small, but measured
        (200, 5, 0, Verdict.UNCLEAR),  # McNemar: 0.0625
        (200, 0, 12, Verdict.GAIN),
        (200, 12, 0, Verdict.LOSS),
    ],
)
def test_verdicts(items: int, lost: int, gained: int, verdict: Verdict) -> None:
    half = items // 2
    other = [0.0] * lost + answers(half - lost, items - half - gained) + [1.0] * gained
    (_, cell) = against(scored(other), reference=scored(answers(half, items - half)), **PIQA).rows
    assert cell.verdict is verdict


def test_chance_depends_on_the_choices() -> None:
    half = answers(105, 95)
    two = against(scored(half), reference=scored(half), **PIQA).rows
    four = against(scored(half, choices=4), reference=scored(half, choices=4), **PIQA).rows
    none = against(scored(half, choices=0), reference=scored(half, choices=0), **PIQA).rows
    assert [cell.at_chance for cell in two] == [True, True]
    assert [cell.at_chance for cell in (*four, *none)] == [False] * 4


def test_an_item_without_an_answer_counts_as_wrong() -> None:
    """lm-eval takes the first nan for the best choice, so a broken model would score like one that always says A."""
    (_, cell) = against(scored(answers(60, 40), unanswered=30), reference=scored(answers(60, 40)), **PIQA).rows
    assert cell.score is not None
    assert cell.score.value == 0.3
    assert cell.flips is not None
    assert cell.flips.lost == 30
    assert cell.remarks == ("30 without an answer",)


def test_ratio_of_perplexities() -> None:
    before = np.random.default_rng(0).normal(3, 0.2, size=16)
    (reference, close, far) = against(
        scored([*before + 1e-4]), scored([*before + 0.2]), reference=scored([*before]), value=20.0
    ).rows
    assert reference.change is None
    assert close.change is not None
    assert close.change.value == pytest.approx(math.exp(1e-4))
    assert (close.verdict, far.verdict) == (Verdict.LOSS, Verdict.LOSS)  # all windows alike: even this is measured
    noisy = scored([*before + np.tile([0.004, -0.004], 8)])
    assert against(noisy, reference=scored([*before]), value=20.0).rows[1].verdict is Verdict.LOSSLESS
    noisier = scored([*before + np.tile([0.1, -0.1], 8)])
    assert against(noisier, reference=scored([*before]), value=20.0).rows[1].verdict is Verdict.NO_MEASURABLE_LOSS
    better = scored([*before - 0.2])
    assert against(better, reference=scored([*before]), value=20.0).rows[1].verdict is Verdict.GAIN


def test_non_finite_windows_are_said() -> None:
    found = against(scored([3.0, math.nan, math.inf]), reference=scored([3.0, 3.1, 3.2]), value=20.0)
    cell = found.rows[1]
    assert (cell.verdict, cell.remarks) == (Verdict.NONE, ("2 of 3 windows not finite",))
    cell = against(scored([3.0, 3.1]), reference=scored([3.0, math.nan]), value=20.0).rows[1]
    assert (cell.verdict, cell.remarks) == (Verdict.NONE, ("fp not finite",))
    cell = against(scored([3.0]), reference=scored([3.0]), value=20.0).rows[1]
    assert (cell.verdict, cell.remarks) == (Verdict.NONE, ("one document has no interval",))


def test_scores_between_right_and_wrong_have_a_difference_alone() -> None:
    values = np.random.default_rng(1).random(50)
    found = against(scored([*values * 0.5]), reference=scored([*values]), **PIQA)
    assert found.kind is Kind.SCORE
    (_, cell) = found.rows
    assert (cell.score, cell.flips, cell.p_value, cell.at_chance) == (None, None, None, False)
    assert cell.verdict is Verdict.LOSS


def test_other_documents_are_named_and_nothing_is_compared() -> None:
    found = against(scored([1.0, 0.0]), reference=scored([1.0, 0.0, 1.0]), **PIQA)
    (_, cell) = found.rows
    assert (cell.change, cell.p_value, cell.verdict, cell.remarks) == (None, None, Verdict.NONE, ("not paired",))
    (problem,) = found.problems
    assert problem.startswith("rtn w8 g64: the documents differ, 1 in the first alone (such as 2)")


def test_nothing_is_shown_without_fp_or_without_another() -> None:
    values = scored([1.0, 0.0])
    result, reference = row(value=0.5, **PIQA), fp(value=0.5, **PIQA)
    assert mapped([(result, values)]).against == ()
    assert mapped([(reference, values)]).against == ()
    assert mapped([(reference, values), (result, None)]).against == ()
    assert mapped([(reference, None), (result, values)]).against == ()


def test_a_cell_whose_items_are_missing_says_so() -> None:
    found = against(scored([1.0]), None, reference=scored([1.0]), **PIQA)
    assert found.rows[2].remarks == ("no items",)


def test_items_of_another_protocol_are_not_taken() -> None:
    """The same cell, task and metric, but another job."""
    short, long = '{"sequence_length": 512}', '{"sequence_length": 1024}'
    pairs = []
    for protocol, job, offset in ((short, "a", 0.0), (long, "b", 1.0)):
        for result, value in ((fp, 3.0), (row, 3.0 + offset)):
            measured = result(value=20.0, protocol=protocol, job_id=job)
            pairs.append((measured, scored([value, value])))
    ratios = [found.rows[1].change for found in mapped(pairs).against]
    assert [ratio.value for ratio in ratios if ratio] == pytest.approx([1.0, math.e])


# Reading the items


def test_items_agree_with_the_results(tmp_path: Path) -> None:
    atlas = load(demo_sweep(tmp_path / "out"))
    compared = 0
    for result in demo_results():
        if result["status"] != "ok":
            continue
        values = atlas.items[key_of(result)].values_N
        found = math.exp(values.mean()) if result["metric"] == "perplexity" else values.mean()
        assert found == pytest.approx(result["value"])
        compared += 1
    assert compared > 40


def item(doc_id: int, likely: list[float | None] | None, value: float | None = 1.0) -> Row:
    scheme = cell_row(MODEL, "rtn", 4, 16, 64, "")
    return scheme | {"task": "piqa", "metric": "acc", "doc_id": doc_id, "log_likelihoods": likely, "value": value}


def test_choices_and_missing_answers_are_counted_over_parts(tmp_path: Path) -> None:
    directory = write_sweep(tmp_path, items=[item(3, [-1.0, -2.0]), item(1, [-1.0, math.nan, -3.0]), item(2, None)])
    write_part(directory, ITEMS, [item(0, [-math.inf, -1.0]), item(4, [None, -1.0])], name="part-1")
    write_part(directory, ITEMS, [item(3, [-1.0], 0.0)], name="part-2")  # written again: the last one stands
    (directory / "items" / ".part-3.parquet").write_bytes(b"PAR1 half a")
    ((key, found),) = load_items(directory).items()
    assert key == (MODEL, item(0, None)["cell_id"], JOB, "piqa", "acc")
    assert found.doc_ids_N.tolist() == [0, 1, 2, 3, 4]
    assert found.choices_N.tolist() == [2, 3, 0, 1, 2]
    assert found.answered_N.tolist() == [True, False, True, True, False]
    assert found.values_N.tolist() == [1, 1, 1, 0, 1]


def test_rows_of_many_jobs_and_batches_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.atlas.load_items._BATCH_ROWS", 7)
    rows = [item(index // 2, [-1.0], float(index % 2)) | {"job_id": str(index % 2)} for index in range(60)]
    found = load_items(write_sweep(tmp_path, items=rows))
    assert [key[2] for key in found] == ["0", "1"]
    for job, scores in enumerate(found.values()):
        assert scores.doc_ids_N.tolist() == list(range(30))
        assert set(scores.values_N) == {job}


def test_an_older_part_without_some_columns_is_read(tmp_path: Path) -> None:
    directory = write_sweep(tmp_path, items=[])
    bare = {name: value for name, value in item(5, None).items() if name != "log_likelihoods"}
    pq.write_table(pa.Table.from_pylist([bare]), directory / "items" / "old.parquet")
    (found,) = load_items(directory).values()
    assert (found.doc_ids_N.tolist(), found.choices_N.tolist()) == ([5], [0])


def test_a_broken_part_of_the_items_is_named(tmp_path: Path) -> None:
    directory = write_sweep(tmp_path, config=CONFIG, results=[], items=[])
    (directory / "items" / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(BitatlasError, match=r"bad\.parquet is damaged, not a readable Parquet file"):
        load(directory)


def test_many_rows_are_kept_small(tmp_path: Path) -> None:
    """100,000 rows as Python objects would be 50 MB and more."""
    directory = write_sweep(tmp_path, items=[])
    count = 100_000
    names = ("model", "cell_id", "job_id", "task", "metric")
    columns = {name: pa.array(["x"] * count) for name in names} | {
        "doc_id": pa.array(range(count)),
        "value": pa.array([1.0] * count),
        "log_likelihoods": pa.array([[-1.0, -2.0]] * count),
    }
    pq.write_table(pa.table(columns), directory / "items" / "many.parquet")
    del columns
    tracemalloc.start()
    arrow_before = pa.total_allocated_bytes()
    (found,) = load_items(directory).values()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.doc_ids_N) == count
    assert peak < 12 * 2**20
    assert pa.total_allocated_bytes() - arrow_before < 12 * 2**20


# What a reader sees


def printed(directory: Path, width: int) -> str:
    stream = io.StringIO()
    print_report(directory, Console(file=stream, width=width))
    return stream.getvalue()


def test_every_form_of_the_report_shows_it(tmp_path: Path) -> None:
    directory = demo_sweep(tmp_path / "out")
    written = write_report(directory)
    page, markdown = written.html.read_text(encoding="utf-8"), written.markdown.read_text(encoding="utf-8")
    terminal = printed(directory, 140)
    for text in (page, markdown, terminal):
        assert TITLE in text
        for shown in ("58.5", "51.6, 65.1", "−3.5", "−7.0, −0.5", "+2 / −9", "0.393", "unclear", "at chance, loss"):
            assert shown in text
        assert "lossless within 1%" in text
        assert "16 of 16 windows" in text
        assert " ".join(NOTE.split()[:9]) in text.replace("&#39;", "'")
    assert "| cell | score, % | to fp, points | flips | p | reading |" in markdown
    assert '<option value="2">arc_easy acc</option>' in page
    assert "200 without an answer" in page


def test_sweeps_without_items_have_no_such_section(tmp_path: Path) -> None:
    directory = write_sweep(tmp_path / "out", results=demo_results())
    written = write_report(directory)
    assert f"<h3>{TITLE}" not in written.html.read_text(encoding="utf-8")
    assert TITLE not in written.markdown.read_text(encoding="utf-8")
    assert TITLE not in printed(directory, 100)


def test_a_narrow_terminal_cuts_no_number(tmp_path: Path) -> None:
    text = printed(demo_sweep(tmp_path / "out"), 80)
    assert "Against fp: piqa acc, continued" in text
    assert "67.5 [60.7, 73.6]" in text
    assert "1.2092 [1.2059, 1.2127]" in text
    assert max(map(len, text.splitlines())) <= 80


def test_more_tables_than_a_terminal_should_show_are_left_to_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.atlas.terminal.MAPS_SHOWN", 3)
    text = printed(demo_sweep(tmp_path / "out"), 80)
    assert "Against fp: 4 tables in atlas.html and atlas.md." in text
    assert "flips" not in text.lower()


def test_what_could_not_be_paired_is_said_in_every_form(tmp_path: Path) -> None:
    items = [found for found in demo_items() if found["doc_id"] or found["task"] != "piqa" or found["method"] != "awq"]
    directory = write_sweep(tmp_path / "out", results=demo_results(), items=items)
    written = write_report(directory)
    said = "awq w4 g64 asym: the documents differ, 1 in the first alone (such as 0)"
    assert said in written.html.read_text(encoding="utf-8")
    assert said in written.markdown.read_text(encoding="utf-8")
    assert said in " ".join(printed(directory, 140).split())


@pytest.mark.parametrize(
    ("items", "others", "texts"),
    [
        (200, [0.0] * 200, ("0.0 [0.0, 1.9]", "−100.0 [−100.0, −100.0]", "+0 / −200", "<0.001", "loss")),
        (4, [1.0] * 4, ("100.0 [51.0, 100.0]", "0.0 [0.0, 0.0]", "+0 / −0", "1.000", "at chance, no measurable loss")),
    ],
)
def test_texts_of_extremes(items: int, others: list[float], texts: tuple[str, ...]) -> None:
    pairs = [(fp(value=1.0, **PIQA), scored([1.0] * items)), (row(value=1.0, **PIQA), scored(others))]
    (lines,) = against_lines(mapped(pairs))
    assert lines.lines[1].texts == texts


@pytest.mark.parametrize(
    ("shift", "noise", "texts"),
    [
        (0.003, 0.001, ("1.0030 [1.0025, 1.0035]", "loss within 1%")),
        (-0.003, 0.001, ("0.9970 [0.9965, 0.9975]", "gain within 1%")),
        (0.003, 0.03, ("1.0030 [0.9881, 1.0182]", "no measurable loss")),
        (0.72, 0.1, ("2.05 [1.95, 2.16]", "loss")),
        (800.0, 0.0, ("non-finite", "loss")),  # beyond the largest number
    ],
)
def test_texts_of_ratios(shift: float, noise: float, texts: tuple[str, ...]) -> None:
    before = np.linspace(2.5, 3.5, 16)
    other = scored([*before + shift + np.tile([noise, -noise], 8)])
    (lines,) = against_lines(mapped([(fp(value=20.0), scored([*before])), (row(value=21.0), other)]))
    assert lines.lines[1].texts == texts


def test_no_row_is_lost_between_numbers_and_texts(tmp_path: Path) -> None:
    (model_map,) = model_maps(load(demo_sweep(tmp_path / "out")))
    for found, lines in zip(model_map.against, against_lines(model_map), strict=True):
        assert [line.label for line in lines.lines] == [model_map.cell_labels[cell.cell.key] for cell in found.rows]
        assert {len(line.texts) for line in lines.lines} == {len(lines.headings)}
