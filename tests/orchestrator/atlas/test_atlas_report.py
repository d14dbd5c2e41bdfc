"""atlas.html, atlas.md and the terminal, end to end."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console
from sample_sweep import CONFIG, MODEL, cell_row, demo_items, demo_layers, demo_results, demo_sweep, write_sweep

from orchestrator.atlas import print_report, write_report
from orchestrator.atlas.report import write_atomically

HOSTILE = '<script>alert("1")</script><img src=https://example.org/x>|`*[a](http://b)\x1b[2J'


class Page(HTMLParser):
    """Collects what a browser would load or run, and the text of the figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.figures = ""
        self._in_figures = False
        self.feed(text.replace(get_plotlyjs(), ""))  # 5 MB of script say nothing of the page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if found.get("id") else []
        self._in_figures = tag == "script" and found.get("id") == "figures"

    def handle_data(self, data: str) -> None:
        if self._in_figures:
            self.figures += data

    def handle_endtag(self, tag: str) -> None:
        self._in_figures = False


def printed(directory: Path, width: int, *, colour: bool = False) -> str:
    stream = io.StringIO()
    print_report(
        directory,
        Console(file=stream, width=width, force_terminal=colour, color_system="truecolor" if colour else None),
    )
    return stream.getvalue()


def hostile_sweep(directory: Path) -> Path:
    config = CONFIG | {"name": HOSTILE, "models": [{"name": HOSTILE}]}
    rows = demo_results(HOSTILE)
    items = demo_items(HOSTILE)
    for row in [rows[0], *items[:16]]:  # fp on the first corpus
        row["task"] = HOSTILE
    failed = cell_row(HOSTILE, HOSTILE, 4, 16, 64, json.dumps({HOSTILE: HOSTILE})) | {
        "task": HOSTILE,
        "status": "failed",
        "error_kind": HOSTILE,
        "error": HOSTILE,
        "worker": HOSTILE,
        "protocol": json.dumps({HOSTILE: HOSTILE}),
    }
    layers = demo_layers(HOSTILE, depth=2)
    layers[0]["layer"] = f"model.layers.0.{HOSTILE}"
    return write_sweep(directory, config=config, results=[*rows, failed], layers=layers, items=items)


def small_sweeps(directory: Path) -> list[Path]:
    failed = {"task": "lambada", "status": "failed", "error_kind": "worker_died"}
    two = CONFIG | {"models": [{"name": "a"}, {"name": "b"}]}
    fp_rows = [row for row in demo_results() if row["method"] == "fp"]
    bare = {"name": "bare", "models": [{"name": MODEL}]}
    exact = [row | {"value": 0.0, "stderr": None} for row in demo_results() if row["status"] == "ok"]
    return [
        write_sweep(directory / "begun"),
        write_sweep(directory / "no_models", config={"name": "x"}),
        write_sweep(directory / "only_fp", config=bare, results=fp_rows),
        write_sweep(directory / "no_fp", results=[row for row in demo_results() if row["method"] != "fp"]),
        write_sweep(directory / "failed", config=bare, results=[cell_row(MODEL, "rtn", 4, 16, 64, "") | failed]),
        write_sweep(directory / "two", config=two, results=demo_results("a") + demo_results("b")),
        write_sweep(directory / "zeros", results=exact),
        write_sweep(
            directory / "exact_layers",
            results=demo_results(),
            layers=[r | {"weight_error": 0.0} for r in demo_layers()],
        ),
        hostile_sweep(directory / "hostile"),
    ]


def test_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = Page(write_report(demo_sweep(tmp_path / "out")).html.read_text(encoding="utf-8"))
    loading = {"src", "href", "srcset", "data", "poster", "action", "background", "formaction", "ping"}
    targets = [value or "" for _, attributes in page.tags for name, value in attributes.items() if name in loading]
    assert targets
    assert all(target.startswith(("#", "data:")) for target in targets)
    assert not {"iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    policies = [
        attributes["content"] or "" for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes
    ]
    assert policies[0].startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policies[0]


def test_page_has_no_button_that_sends_a_figure_away(tmp_path: Path) -> None:
    text = write_report(demo_sweep(tmp_path / "out")).html.read_text(encoding="utf-8")
    assert 'plotlyServerURL: ""' in text
    assert 'modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]' in text


def test_page_anchors_exist_and_ids_are_unique(tmp_path: Path) -> None:
    page = Page(write_report(demo_sweep(tmp_path / "out")).html.read_text(encoding="utf-8"))
    anchors = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert {str(anchor).removeprefix("#") for anchor in anchors} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_hostile_names_are_text_everywhere(tmp_path: Path) -> None:
    directory = hostile_sweep(tmp_path / "out")
    paths = write_report(directory)
    text = paths.html.read_text(encoding="utf-8")
    page = Page(text)
    assert "<script>alert" not in text
    assert "<img" not in text.replace(get_plotlyjs(), "")
    assert [tag for tag, _ in page.tags].count("script") == 3
    strings = re.findall(r'"(?:[^"\\]|\\.)*"', page.figures)
    assert any("alert" in string for string in strings)
    shown = [text for spec in json.loads(page.figures) for text in _texts(spec["columns"])]
    assert not [text for text in shown if "<script" in text or "<img" in text]  # plotly reads tags in these
    markdown = paths.markdown.read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert not re.search(r"(?<!\\)\]\(http", markdown)
    assert "\x1b" not in text + markdown + printed(directory, 100)


def _texts(value: object) -> list[str]:
    """Strings that plotly interprets; the key "unplaced" is set as plain text by the page."""
    if isinstance(value, dict):
        return [text for key, item in value.items() if key != "unplaced" for text in _texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def test_every_state_of_a_sweep_can_be_reported(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    for directory in [demo_sweep(tmp_path / "demo"), *small_sweeps(tmp_path)]:
        paths = write_report(directory)
        assert paths.markdown.read_text(encoding="utf-8").startswith("# Atlas of ")
        for model in json.loads(Page(paths.html.read_text(encoding="utf-8")).figures):
            figures = [curve["figure"] for column in model["columns"] for curve in column["curves"]]
            figures += [column["tradeOff"] for column in model["columns"]]
            figures += [figure for kinds in model["layers"].values() for figure in kinds.values()]
            for figure in figures:
                go.Figure(figure)  # raises where plotly does not know a property
                low, high = figure["layout"]["yaxis"].get("range", [0, 1])
                assert low < high
        for width in (40, 80, 140):
            assert max(len(line) for line in printed(directory, width).splitlines()) <= width


def test_figures_mark_what_has_no_place_on_the_axis(tmp_path: Path) -> None:
    page = Page(write_report(demo_sweep(tmp_path / "out")).html.read_text(encoding="utf-8"))
    (model,) = json.loads(page.figures)
    column = model["columns"][0]
    marks = {trace["name"]: len(trace["x"]) for trace in column["curves"][0]["figure"]["data"] if "yaxis" in trace}
    assert marks == {"off scale": 3, "non-finite": 1, "failed": 1}
    assert column["unplaced"].startswith("Not run yet: awq w3 g64 asym. Without a size")
    front = next(trace for trace in column["tradeOff"]["data"] if trace["name"] == "Pareto front")
    assert front["x"] == sorted(front["x"])
    assert set(model["layers"]) == {"output error", "weight error"}
    seen = [trace["name"] for trace in model["layers"]["output error"]["mlp.down_proj"]["data"]]
    assert not [name for name in seen if name.startswith("rtn")]


def test_markdown_tables_are_well_formed(tmp_path: Path) -> None:
    for directory in [demo_sweep(tmp_path / "demo"), hostile_sweep(tmp_path / "hostile")]:
        lines = write_report(directory).markdown.read_text(encoding="utf-8").splitlines()
        tables: list[list[str]] = [[]]
        for line in lines:
            if line.startswith("|"):
                tables[-1].append(line)
            elif tables[-1]:
                tables.append([])
        assert len(tables) > 5
        for table in filter(None, tables):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
            assert len(widths) == 1
            assert re.fullmatch(r"\|( -{3}:? \|)+", table[1])


def test_markdown_says_what_failed_and_how_it_was_measured(tmp_path: Path) -> None:
    text = write_report(demo_sweep(tmp_path / "out")).markdown.read_text(encoding="utf-8")
    assert "| gptq w2 per-channel asym | quantize | failed: out of memory | tried to allocate 2.25 GB" in text
    assert "- arc_easy: acc; limit 200, num_fewshot 0, task_version 1.0; 200 items scored; higher is better" in text
    assert "- Calibration: corpus lambada, samples 64, seed 0, sequence_length 512" in text
    assert "smallest within 5% of fp perplexity on lambada: **gptq w4 g64 asym**, 114.7 MB (−57%)" in text


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_fits_its_width_and_keeps_every_number_whole(tmp_path: Path, width: int) -> None:
    text = printed(demo_sweep(tmp_path / "out"), width)
    assert max(len(line) for line in text.splitlines()) <= width
    for whole in ("22.62*", "58.5 ±3.5", "not run yet", "non-finite", "8-bit", "2-bit", "2.0e5", "+20.9%", "114.7"):
        assert whole in text
    assert "…" not in text
    assert "smallest within 5% of fp perplexity on lambada: gptq w4 g64 asym" in " ".join(text.split())


def test_terminal_colours_go_from_green_to_red(tmp_path: Path) -> None:
    text = printed(demo_sweep(tmp_path / "out"), 140, colour=True)
    assert "\x1b[1;38;2;60;190;70m22.62" in text
    assert re.search(r"\x1b\[38;2;220;70;70m *2\.0e5", text)


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "atlas.md"
    write_atomically(path, "old")

    def broken(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_report_leaves_only_its_two_files_and_others_may_read_them(tmp_path: Path) -> None:
    directory = demo_sweep(tmp_path / "out")
    before = set(directory.iterdir())
    paths = write_report(directory)
    assert set(directory.iterdir()) - before == {paths.html, paths.markdown}
    plain = tmp_path / "plain"
    plain.touch()
    assert paths.html.stat().st_mode == plain.stat().st_mode
