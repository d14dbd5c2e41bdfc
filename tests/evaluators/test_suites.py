import importlib.resources

import pytest

from evaluators.errors import EvaluationError
from evaluators.suites import SuiteTask, read_suite, suite_names
from evaluators.tasks import TASKS, check_task, is_packaged, subtasks_of


def test_the_suites():
    assert suite_names() == ["instruction", "offline", "openpangu-18", "smoke"]


@pytest.mark.parametrize("name", suite_names())
def test_every_task_of_a_suite_is_known_and_named_once(name):
    tasks = read_suite(name)
    for task in tasks:
        check_task(task.name)
        assert task.metric
    assert len({task.name for task in tasks}) == len(tasks) > 0


def test_eighteen_are_eighteen_and_say_where_they_are_from():
    assert len(read_suite("openpangu-18")) == 18
    text = importlib.resources.files("evaluators.suites").joinpath("openpangu-18.yaml").read_text()
    assert text.startswith("# Reconstructed")


@pytest.mark.parametrize("name", ["offline", "smoke"])
def test_offline_needs_neither_the_hub_nor_a_permission(name):
    for task in read_suite(name):
        assert is_packaged(task.name)
        assert not any(TASKS[subtask].runs_code for subtask in subtasks_of(task.name))


def test_offline_is_all_that_is_packaged_and_runs_no_code():
    singles = {name for name, source in TASKS.items() if source.splits and not source.runs_code and "mmlu_" not in name}
    assert {task.name for task in read_suite("offline")} == singles | {"mmlu"}


def test_an_entry_says_only_what_is_set():
    assert SuiteTask(name="piqa", metric="acc").entry == {"name": "piqa"}
    assert SuiteTask(name="piqa", metric="acc", num_fewshot=0, limit=3).entry == {
        "name": "piqa",
        "num_fewshot": 0,
        "limit": 3,
    }


@pytest.mark.parametrize("name", ["ofline", 3, ["offline"], "../offline"])
def test_unknown_suites(name):
    with pytest.raises(EvaluationError, match=r"unknown suite .*(did you mean|known are)"):
        read_suite(name)
