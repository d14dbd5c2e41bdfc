"""What a search left that makes no sense is refused by name, with a remedy."""

import json
from pathlib import Path
from typing import Any

import pytest
from sample_search import demo_space, study_rows, write_search
from sample_sweep import write_sweep

from orchestrator.atlas import load
from orchestrator.errors import BitatlasError

WRONG = [
    ("chosen.json", "{", "chosen.json is not readable JSON"),
    ("chosen.json", "[1]", "chosen.json: it must hold an object with `studies`"),
    ("chosen.json", '{"studies": [{"trials": 3}]}', "`studies` must be a list of objects with a name"),
    ("chosen.json", '{"studies": [{"study": "a", "trials": "many"}]}', "study 'a': `trials` must be a whole number"),
    ("chosen.json", '{"studies": [{"study": "a", "loss": "low"}]}', "`loss` must be a number"),
    ("chosen.json", '{"studies": [{"study": "a", "starts": [1]}]}', "`starts` must be a list of objects"),
    (
        "chosen.json",
        '{"studies": [{"study": "a", "allocation": [0, 1]}]}',
        "a list of 120 whole numbers, one per group",
    ),
    ("chosen.json", json.dumps({"studies": [{"study": "a", "allocation": [9] * 120}]}), "which has 4 choices"),
    ("chosen.json", b"\xff\xfe\x00", "chosen.json is not readable JSON"),
    ("search.yaml", '{"search": 3}', "search.yaml: it must hold an object with the settings"),
    ("search.yaml", "a: [", "search.yaml is not readable YAML"),
    ("space.json", '{"a": 1}', "space.json: it is no list of groups"),
    ("space.json", '[{"linears": ["a.0.b"]}]', r"no list of groups with their choices \(it lacks 'num_weights'\)"),
    ("space.json", '[{"linears": [], "num_weights": 1, "choices": []}]', "a group has linears, weights and choices"),
    ("trials/x.parquet", b"not parquet", "x.parquet is damaged, not a readable Parquet file"),
    ("sensitivity/x.parquet", b"PAR1", "x.parquet is damaged"),
    ("trials", "a file", "trials cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "said"), WRONG)
def test_what_is_wrong_is_named_with_a_remedy(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    directory = write_search(write_sweep(tmp_path / "out"), space=demo_space())
    path = directory / "search" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BitatlasError, match=said) as caught:
        load(directory)
    assert str(caught.value).endswith("; restore it, or remove it to see the report without what it tells")
    assert str(path.parent if name.startswith("trials/") else path.name) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"allocation": "[0, 1]"}, "trial 0 of '3.6 bits': its allocation must be a list of 120"),
        ({"allocation": "[0,"}, "trial 0 of '3.6 bits': its allocation is not JSON"),
        ({"study": None}, "a row does not say which trial of which study"),
    ],
)
def test_a_trial_that_makes_no_sense_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    space = demo_space()
    rows, _ = study_rows(space, "3.6 bits", space.budget(3.6, "x"), generations=1)
    rows[0] |= change
    with pytest.raises(BitatlasError, match=said):
        load(write_search(write_sweep(tmp_path / "out"), space=space, trials=rows))
