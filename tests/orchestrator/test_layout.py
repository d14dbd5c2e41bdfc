"""File names are a contract with other tools."""

from pathlib import Path

from orchestrator.layout import Layout
from orchestrator.schema import TABLES


def test_the_names_under_a_sweep_s_output():
    layout = Layout(Path("outputs/demo"))
    names = {
        "sweep.yaml": layout.sweep,
        ".lock": layout.lock,
        "artifacts": layout.artifacts,
        "atlas.html": layout.page,
        "atlas.md": layout.markdown,
    } | {name: layout.table(name) for name in TABLES}
    assert {name: Path("outputs/demo") / name for name in names} == names
    assert set(TABLES) == {"results", "items", "layers", "slices", "events"}


def test_damaged_parts_are_kept_apart():
    assert Layout(Path("out")).set_aside("items") == Path("out/set_aside/items")


def test_an_artifact_s_directory_is_its_key_s_start():
    key = "0123456789abcdef" * 4
    assert Layout(Path("out")).artifact(key) == Path("out/artifacts/0123456789abcdef0123456789abcdef")
