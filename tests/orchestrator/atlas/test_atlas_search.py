"""The report's section on a search: what it says, draws, and does with a search in whatever state it is."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from sample_search import (
    BITS,
    BUDGETS,
    DEPTH,
    GUARDS,
    WINDOWS,
    alone,
    demo_search,
    demo_space,
    sensitivity_rows,
    study_rows,
    write_search,
)
from sample_sweep import MODEL, demo_sweep, write_sweep
from test_atlas_report import HOSTILE, Page, printed

from orchestrator.atlas import load, write_report
from orchestrator.atlas.page import SCRIPT, SEARCH_STYLE
from orchestrator.atlas.search_course import front_figure, history_figures
from orchestrator.atlas.search_figures import allocation_figure, search_figures
from orchestrator.atlas.search_grid import Grid, bits_squares, compact
from orchestrator.atlas.search_rows import Search
from orchestrator.atlas.search_texts import about, compact_maps, found_sentences, hurt_texts
from orchestrator.search.records import TRIALS, Records
from orchestrator.search.space import Choice, Group, Space

KINDS = ["q+k+v", "o", "gate+up", "down"]


def searched(directory: Path) -> Search:
    found = load(directory).search
    assert found is not None
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return demo_search(demo_sweep(tmp_path_factory.mktemp("search") / "out"))


def chosen_of(directory: Path, study: int = 0) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((directory / "search" / "chosen.json").read_text())["studies"][study]
    return entry


def trace(figure: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in figure["data"] if one["name"] == name]
    return dict(found)


def test_what_a_study_found_is_said_beside_its_starts(demo: Path) -> None:
    search, entry = searched(demo), chosen_of(demo)
    text = " ".join(found_sentences(search, search.studies[0], {}))
    knapsack, uniform = entry["starts"]
    assert f"Of 160 allocations tried within {entry['budget_bytes'] / 1e6:.1f} MB" in text
    assert f"stores {entry['bits_per_weight']:.3f} bits per weight" in text
    assert f"is {entry['loss']:.4f} nats on the {WINDOWS} search windows" in text
    below = 100 * (1 - entry["loss"] / uniform["loss"])
    assert f"{below:.0f}% below uniform 3-g64 ({uniform['loss']:.2f})" in text
    assert f"below knapsack fp ({knapsack['loss']:.4f})" in text
    assert f"on the {GUARDS} held-out guard windows it is {entry['guard_loss']:.4f}" in text
    assert f"It cost {entry['window_forwards']:,} window forwards and" in text
    assert "(20 complete, 139 pruned, 1 failed); it stopped because all evaluations are spent." in text


def test_a_worse_loss_on_guard_windows_is_said(tmp_path: Path) -> None:
    space = demo_space()
    _, entry = study_rows(space, "3.6 bits", space.budget(3.6, "x"))
    entry |= {"guard_loss": 3 * entry["starts"][0]["guard_loss"]}
    entry["starts"][1] |= {"guard_loss": entry["guard_loss"] / 1.05}
    search = searched(write_search(write_sweep(tmp_path / "out"), space=space, studies=[entry]))
    text = " ".join(found_sentences(search, search.studies[0], {}))
    assert ", 3.0 times knapsack fp (" in text
    assert " and 5.0% above uniform 3-g64 (" in text


def test_a_perplexity_has_no_unit_and_a_cell_of_the_sweep_its_label(tmp_path: Path) -> None:
    space = demo_space()
    _, entry = study_rows(space, "3.6 bits", space.budget(3.6, "x"))
    directory = demo_sweep(tmp_path / "out")
    cell = next(cell for cell in load(directory).cells if (cell.method, cell.weight_bits) == ("gptq", 3))
    write_search(directory, space=space, studies=[entry | {"cell": cell.cell_id}], more={"objective": "perplexity"})
    text = write_report(directory).markdown.read_text(encoding="utf-8")
    assert f"Its perplexity is {entry['loss']:.4f} on the 16 search windows" in text
    assert "In the sweep it is the cell gptq w3 g64 asym." in text
    assert "nats" not in text.split("## Search")[1].split("## smollm2")[0]


def test_an_allocation_is_drawn_by_block_and_kind(demo: Path) -> None:
    space, entry = demo_space(), chosen_of(demo)
    figure = search_figures(searched(demo))["allocations"][0]["figure"]
    (drawn,) = figure["data"]
    assert drawn["y"] == KINDS
    assert drawn["x"] == list(range(DEPTH))
    for place, index in enumerate(entry["allocation"]):
        block, kind = divmod(place, len(KINDS))
        choice = space.groups[place].choices[index]
        assert drawn["text"][kind][block] == str(choice.weight_bits)
        assert drawn["z"][kind][block] == pytest.approx(choice.weight_bits + 0.25)
        share = 100 * space.groups[place].num_weights / space.num_weights
        hover = f"{choice.weight_bits} bits, g64<br>{choice.weight_bits + 0.25:.3f} stored bits per weight"
        assert (
            drawn["hovertext"][kind][block]
            == f"{hover}<br>{choice.stored_bytes:,} bytes<br>{share:.2f}% of the weights"
        )
    assert (drawn["zmin"], drawn["zmax"]) == (2.25, 5.25)  # of all choices, so that allocations have the same colours


def test_every_chosen_allocation_can_be_selected(demo: Path) -> None:
    names = [one["name"] for one in search_figures(searched(demo))["allocations"]]
    front = [point for point in chosen_of(demo, 2)["front"] if "guard_loss" in point]
    assert len(front) == 3
    assert names == [
        *(
            f"{study}, {chosen_of(demo, at)['bits_per_weight']:.3f} stored bits per weight"
            for at, study in enumerate(BUDGETS)
        ),
        *(f"all sizes, {point['bits_per_weight']:.3f} stored bits per weight" for point in front),
    ]
    page = write_report(demo).html.read_text(encoding="utf-8")
    select = page.split('<select data-control="allocation">')[1].split("</select>")[0]
    assert select.count("<option") == len(names)


def test_the_front_shows_complete_trials_starts_and_what_was_chosen(demo: Path) -> None:
    search = searched(demo)
    figure = front_figure(search)
    complete = [row for row in Records(demo).rows(TRIALS) if row["state"] == "complete"]
    assert len(trace(figure, "complete trials")["x"]) == len(complete) == 40
    assert trace(figure, "complete trials")["y"] == [row["loss"] for row in complete]
    for index, study in enumerate(BUDGETS):
        entry = chosen_of(demo, index)
        star = trace(figure, f"{study}, chosen")
        assert (star["x"], star["y"]) == ([entry["bits_per_weight"]], [entry["loss"]])
    assert sorted(trace(figure, "uniform")["x"]) == [2.25, 3.25]
    assert len(trace(figure, "knapsack")["x"]) == 2
    front = chosen_of(demo, 2)["front"]
    assert trace(figure, "all sizes, front")["y"] == [point["loss"] for point in front]
    assert trace(figure, "all sizes, chosen")["y"] == [point["loss"] for point in front if "guard_loss" in point]
    assert figure["layout"]["yaxis"]["type"] == "log"
    assert figure["layout"]["yaxis"]["title"]["text"] == "KL to unquantized, nats"


def test_a_uniform_trial_is_marked_though_nothing_names_it(tmp_path: Path) -> None:
    space = demo_space()
    rows, _ = study_rows(space, "3.6 bits", space.budget(3.6, "x"), generations=1)
    uniform = (1,) * len(space.groups)
    rows[0] |= {
        "allocation": json.dumps(uniform),
        "stored_bytes": space.stored_bytes(uniform),
        "bits_per_weight": space.bits_per_weight(uniform),
    }
    found = trace(
        front_figure(searched(write_search(write_sweep(tmp_path / "o"), space=space, trials=rows))), "uniform"
    )
    assert (found["x"], found["text"]) == ([3.25], ["uniform 3-g64"])


def test_the_history_begins_with_the_best_start_and_never_rises(demo: Path) -> None:
    search = searched(demo)
    loss, relative = (one["figure"] for one in history_figures(search))
    for index, study in enumerate(BUDGETS):
        entry = chosen_of(demo, index)
        line = trace(loss, study)
        best_start = min(start["loss"] for start in entry["starts"])
        assert (line["x"][0], line["y"][0]) == (0, best_start)
        assert (line["x"][-1], line["y"][-1]) == (entry["window_forwards"], entry["loss"])
        assert line["y"] == sorted(line["y"], reverse=True)
        guards = trace(loss, f"{study}, guard windows")
        told = [row for row in Records(demo).rows(TRIALS) if row["study"] == study and row["guard_loss"] is not None]
        assert guards["y"][1:] == [row["guard_loss"] for row in told]
        assert trace(loss, f"{study}, starts")["y"] == [start["loss"] for start in entry["starts"]]
        by_start = trace(relative, study)["y"]
        assert (by_start[0], by_start[-1]) == (1, pytest.approx(entry["loss"] / best_start))


def test_a_start_beyond_the_budget_is_no_start_of_the_history(tmp_path: Path) -> None:
    space = demo_space()
    rows, entry = study_rows(space, "3.6 bits", space.budget(3.6, "x"))
    entry["starts"].append(entry["starts"][1] | {"name": "uniform 5-g64", "loss": 0.01, "stored_bytes": 10**9})
    search = searched(write_search(write_sweep(tmp_path / "out"), space=space, trials=rows, studies=[entry]))
    assert 0.01 not in trace(history_figures(search)[0]["figure"], "3.6 bits")["y"]
    assert 0.01 in trace(front_figure(search), "uniform")["y"]


def test_sensitivities_of_the_fewest_bits_come_first(demo: Path) -> None:
    found = search_figures(searched(demo))["sensitivities"]
    assert [one["name"] for one in found] == [f"{bits} bits, g64" for bits in BITS]
    losses = alone(demo_space())
    for level, one in enumerate(found):
        drawn = one["figure"]["data"][0]
        for place, loss in enumerate(losses):
            block, kind = divmod(place, len(KINDS))
            assert drawn["z"][kind][block] == pytest.approx(math.log10(loss[level]), abs=1e-4)
    assert found[0]["figure"]["data"][0]["hovertext"][3][1].startswith("model.layers.1.mlp.down_proj<br>loss 1.20<br>")


def test_which_layers_hurt_is_answered_in_a_sentence(demo: Path) -> None:
    texts = hurt_texts(searched(demo))
    assert texts is not None
    losses = [loss[0] for loss in alone(demo_space())]
    share = 100 * 1.2 / sum(losses)
    ranked = sorted(losses, reverse=True)
    count = next(n for n in range(len(ranked)) if sum(ranked[:n]) >= sum(losses) / 2)
    assert texts.sentence.startswith(f"At 2 bits, g64, {count} of 120 groups with ")
    assert f"make half of the summed loss: block 1 down ({share:.0f}%), " in texts.sentence
    assert f" and {count - 3} others; of all kinds down makes most of it (" in texts.sentence
    assert "measured so far" not in texts.sentence
    assert len(texts.rows) == 10
    assert texts.rows[0] == ("model.layers.1.mlp.down_proj", "2 bits, g64", "1.20", f"{share:.1f}%")
    assert texts.rows[1][1:3] == ("3 bits, g64", "0.3000")


def test_a_choice_that_breaks_the_model_is_worst(tmp_path: Path) -> None:
    rows = sensitivity_rows(demo_space())
    rows[4] |= {"loss": math.inf}
    rows[40] |= {"loss": math.nan}
    search = searched(write_search(write_sweep(tmp_path / "out"), sensitivities=rows))
    texts = hurt_texts(search)
    assert texts is not None
    assert texts.sentence.startswith("At 2 bits, g64, block 0 o, block 2 gate+up give no finite loss.")
    assert texts.rows[0] == ("model.layers.0.self_attn.o_proj", "2 bits, g64", "non-finite", "–")
    figure = search_figures(search)["sensitivities"][0]["figure"]
    assert figure["data"][0]["text"][1][0] == figure["data"][0]["text"][2][2] == "∞"
    json.dumps(figure, allow_nan=False)


def test_losses_on_top_of_other_bits_have_no_shares(tmp_path: Path) -> None:
    rows = sensitivity_rows(demo_space(), base="uniform-4-g64")
    texts = hurt_texts(searched(write_search(write_sweep(tmp_path / "out"), sensitivities=rows)))
    assert texts is not None
    assert texts.sentence.startswith(
        "At 2 bits, g64, the rest uniform-4-g64, the loss is highest with block 1 down (1.20)"
    )
    assert {row[3] for row in texts.rows} == {"–"}


def test_markdown_has_a_map_of_digits_and_the_ten_worst(demo: Path) -> None:
    space, entry = demo_space(), chosen_of(demo)
    text = write_report(demo).markdown.read_text(encoding="utf-8")
    for kind, name in enumerate(KINDS):
        digits = "".join(str(BITS[index]) for index in entry["allocation"][kind::4])
        assert f"\n{name:<7}  {digits}\n" in text
    assert f"\n{'':<7}  0{'':9}10{'':8}20\n" in text
    assert "| model.layers.1.mlp.down_proj | 2 bits, g64 | 1.20 |" in text.replace("\\_", "_")
    assert text.index("## Search: search-demo") < text.index(f"## {MODEL}")
    assert space.num_weights == 106_168_320


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_terminal_shows_every_block_at_any_width(demo: Path, width: int) -> None:
    text = printed(demo, width)
    assert max(len(line) for line in text.splitlines()) <= width
    entry = chosen_of(demo)
    lines = [line.split() for line in text.splitlines() if line.startswith("gate+up ")]
    digits = "".join(str(BITS[index]) for index in entry["allocation"][2::4])
    assert "".join(line[1] for line in lines).startswith(digits)
    assert "make half of the summed loss: block 1 down" in " ".join(text.split())


def test_the_terminal_has_colours(demo: Path) -> None:
    assert "\x1b[30;48;2;246;220;140m2\x1b[0m" in printed(demo, 100, colour=True)


def test_a_search_in_any_state_is_shown(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    space = demo_space()
    rows, entry = study_rows(space, "3.6 bits", space.budget(3.6, "x"))
    sensitivities = sensitivity_rows(space)
    states: dict[str, tuple[dict[str, Any], str]] = {
        "nothing": ({}, "It has written nothing to show yet."),
        "space": ({"space": space}, "120 groups of linears"),
        "some": ({"space": space, "sensitivities": sensitivities[:50]}, "50 of 480 choices are measured so far."),
        "no space": ({"sensitivities": sensitivities}, "13 of 120 groups make half of the summed loss"),
        "trials": (
            {"space": space, "trials": rows},
            f"the best so far stores {entry['bits_per_weight']:.3f} bits per weight",
        ),
        "pruned": ({"space": space, "trials": rows[1:4]}, "No complete measurement yet of 3 allocations tried."),
        "chosen": ({"studies": [entry]}, f"the chosen one stores {entry['bits_per_weight']:.3f} bits per weight"),
        "all but trials": (
            {"space": space, "studies": [entry], "sensitivities": sensitivities},
            f"It cost {entry['window_forwards']:,} window",
        ),
    }
    for name, (written, said) in states.items():
        directory = write_search(write_sweep(tmp_path / name), **written)
        paths = write_report(directory)
        assert said in paths.markdown.read_text(encoding="utf-8"), name
        assert said in " ".join(printed(directory, 70).split()), name
        page = paths.html.read_text(encoding="utf-8")
        assert said in page, name
        figures = json.loads(page.split('id="search-figures">')[1].split("</script>")[0])
        for one in [
            *figures["allocations"],
            *figures["sensitivities"],
            *figures["history"],
            {"figure": figures["front"]},
        ]:
            go.Figure(one["figure"])  # raises where plotly does not know a property
        assert bool(figures["allocations"]) == (name in ("trials", "all but trials"))


def test_a_running_search_shows_its_best_so_far(tmp_path: Path) -> None:
    space = demo_space()
    rows, entry = study_rows(space, "3.6 bits", space.budget(3.6, "x"))
    search = searched(write_search(write_sweep(tmp_path / "out"), space=space, trials=rows))
    (one,) = search_figures(search)["allocations"]
    assert one["name"].startswith("3.6 bits, best so far, 3.6")
    assert one["figure"] == allocation_figure(space, tuple(entry["allocation"]))
    assert trace(front_figure(search), "3.6 bits, best so far")["y"] == [entry["loss"]]


def test_the_searchs_file_says_the_objective_while_nothing_is_chosen(tmp_path: Path) -> None:
    space = demo_space()
    directory = write_search(write_sweep(tmp_path / "out"), space=space, sensitivities=sensitivity_rows(space))
    records = Records(directory)
    records.write_json(records.file, {"search": {"objective": "perplexity", "windows": 12, "guard_windows": 6}})
    search = searched(directory)
    assert (search.objective, search.num_windows, search.guard_windows) == ("perplexity", 12, 6)
    texts = hurt_texts(search)
    assert texts is not None
    assert {row[3] for row in texts.rows} == {"–"}  # a perplexity is the whole model's, so a sum says nothing


def test_where_a_start_was_chosen_it_is_said(tmp_path: Path) -> None:
    space = demo_space()
    rows, entry = study_rows(space, "3.6 bits", space.budget(3.6, "x"))
    best = {key: value for key, value in entry["starts"][0].items() if key != "name"}
    search = searched(write_search(write_sweep(tmp_path / "out"), space=space, trials=rows, studies=[entry | best]))
    text = " ".join(found_sentences(search, search.studies[0], {}))
    assert "It is the start knapsack fp itself." in text
    assert "equal to knapsack fp (" in text


def test_experts_share_a_square_and_what_lies_in_no_block_is_told(tmp_path: Path) -> None:
    choices = tuple(Choice(weight_bits=bits, group_size=0, stored_bytes=100 * bits) for bits in (2, 3))
    names = [f"model.layers.{block}.mlp.experts.{expert}.down_proj" for block in (0, 1) for expert in (0, 1)]
    space = Space(tuple(Group(linears=(name,), num_weights=800, choices=choices) for name in [*names, "lm_head"]))
    grid = Grid.of(space)
    assert list(grid.kinds.values()) == ["down"]
    squares = bits_squares(space, grid, (0, 1, 1, 1, 0))
    assert squares["down", 0].text == "2.5"
    assert squares["down", 0].stored_bits == pytest.approx(2.5)
    assert squares["down", 1].text == "3"
    assert grid.label(names[0]) == names[0]
    entry = {"study": "s", "allocation": [0, 1, 1, 1, 0], "loss": 0.5}
    search = searched(write_search(write_sweep(tmp_path / "out"), space=space, studies=[entry]))
    (shown,) = compact_maps(search)
    assert shown.outside == "Outside of blocks: lm_head 2 bits, per channel."
    assert shown.pieces == [[("", "   0    "), ("down", " 2.5   3")]]


def test_embedding_and_head_are_told_beside_the_map(tmp_path: Path) -> None:
    choices = tuple(Choice(weight_bits=bits, group_size=64, stored_bytes=100 * bits) for bits in (2, 3))
    alone = Choice(weight_bits=16, group_size=0, stored_bytes=3200)
    names = [f"model.layers.{block}.mlp.down_proj" for block in (0, 1)]
    blocks = [Group(linears=(name,), num_weights=800, choices=choices) for name in names]
    embedding = Group(linears=("model.embed_tokens",), num_weights=1600, choices=(*choices, alone), role="embedding")
    space = Space((*blocks, embedding))
    entry = {"study": "s", "allocation": [0, 1, 2], "loss": 0.5}
    search = searched(write_search(write_sweep(tmp_path / "out"), space=space, studies=[entry]))
    (shown,) = compact_maps(search)
    assert shown.outside == "Outside of blocks: model.embed_tokens left alone."
    assert "2 groups of linears, 1,600 weights, to choose among 2-g64, 3-g64; its embedding, " in about(search)
    assert "its embedding, 1,600 weights, among 2-g64, 3-g64, 16" in about(search)
    # Sixteen bits of the embedding do not stretch the colours of the linears.
    trace = allocation_figure(space, (0, 1, 2))["data"][0]
    assert (trace["zmin"], trace["zmax"]) == (2.0, 3.0)


def test_kinds_of_the_same_short_name_keep_their_full_one() -> None:
    grid = Grid(("model.layers.0.mlp.down_proj", "model.layers.0.shared.down_proj", "model.layers.0.mlp.up_proj"))
    assert list(grid.kinds.values()) == ["mlp.down_proj", "shared.down_proj", "up"]


def test_a_compact_map_is_cut_where_the_terminal_is_narrow() -> None:
    grid = Grid(tuple(f"model.layers.{block}.mlp.up_proj" for block in range(25)))
    pieces = compact(grid, {("up", block): str(block % 8 + 1) for block in range(24)}, width=16)
    assert [piece[1][1] for piece in pieces] == ["123456781234", "567812345678", "·"]
    assert [piece[0][1].split() for piece in pieces] == [["0", "10"], ["12", "20"], []]


def test_hostile_names_of_a_search_are_text_everywhere(tmp_path: Path) -> None:
    space = demo_space(prefix=f"{HOSTILE.replace('.', '')}.layers")
    rows, entry = study_rows(space, HOSTILE, space.budget(3.6, "x"))
    entry["starts"][0] |= {"name": HOSTILE}
    entry |= {"cell": HOSTILE, "stopped": HOSTILE, "sampler": HOSTILE}
    named = {"search": HOSTILE, "model": HOSTILE, "objective": HOSTILE}
    sensitivities = [row | {"base": HOSTILE} for row in sensitivity_rows(space, name=HOSTILE)]
    lone = sensitivities[0] | {"group": f"model.layers.0.{HOSTILE}"}
    directory = write_search(
        demo_sweep(tmp_path / "out"),
        space=space,
        sensitivities=[*sensitivities, lone],
        trials=[row | named for row in rows],
        studies=[entry],
        more=named,
    )
    paths = write_report(directory)
    text = paths.html.read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert "<script>alert" not in text
    assert "img" not in {tag for tag, _ in page.tags}
    figures = json.loads(text.split('id="search-figures">')[1].split("</script>")[0])
    drawn = [text for one in [*figures["allocations"], *figures["sensitivities"]] for text in _texts(one["figure"])]
    drawn += _texts(figures["front"]) + [text for one in figures["history"] for text in _texts(one["figure"])]
    assert any("alert" in text for text in drawn)
    assert not [text for text in drawn if "<script" in text or "<img" in text]  # plotly reads tags in these
    markdown = paths.markdown.read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert "\x1b" not in text + markdown + printed(directory, 100)


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def test_without_a_search_nothing_of_it_is_in_the_report(tmp_path: Path) -> None:
    directory = demo_sweep(tmp_path / "out")
    before = write_report(directory).markdown.read_bytes(), printed(directory, 100)
    page = (directory / "atlas.html").read_text(encoding="utf-8")
    here = Path(load.__code__.co_filename).parent
    script = (here / SCRIPT).read_text(encoding="utf-8").replace("  // {{ search }}\n", "")
    assert f"<script>{script}</script>" in page
    assert "search-figures" not in page
    assert "#search" not in page
    assert (here / SEARCH_STYLE).read_text(encoding="utf-8") not in page
    demo_search(directory)
    assert write_report(directory).markdown.read_bytes() != before[0]
    assert 'href="#search"' in (directory / "atlas.html").read_text(encoding="utf-8")
    shutil.rmtree(directory / "search")
    assert (write_report(directory).markdown.read_bytes(), printed(directory, 100)) == before
