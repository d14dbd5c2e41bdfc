"""HumanEval and MBPP by lm-eval's own definitions, their programs in the sandbox."""

import pytest
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from evaluators.code_tasks import SandboxedCodeEval, sandboxed_code_eval
from evaluators.errors import EvaluationError
from evaluators.harness import evaluate_task
from evaluators.packaged_task import load_task, quiet
from evaluators.tasks import TASKS, check_permission

ADD = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a * b\n"
TESTS = "assert add(2, 3) == 5"


class Answering(LM):
    """A model whose answer to a document is given by a function."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests):
        raise AssertionError

    loglikelihood_rolling = loglikelihood


REFERENCES = {
    "humaneval": ("pass@1,create_test", lambda document: document["canonical_solution"]),
    "mbpp": ("pass_at_1,none", lambda document: document["code"]),
}


def score(name, answer, limit):
    task = load_task(name, TASKS[name])
    with quiet():
        found = evaluate(
            lm=Answering(answer), task_dict={"tasks": {name: task}}, limit=limit, confirm_run_unsafe_code=True
        )
    return found["results"][name][REFERENCES[name][0]]


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_solutions_score_one_and_others_zero(name, no_network):
    _, reference = REFERENCES[name]
    assert score(name, reference, 4) == 1.0
    assert score(name, lambda _: "    return None\n", 4) == 0.0


def test_a_program_that_leaves_early_has_not_passed():
    metric, outcomes = SandboxedCodeEval().compute(
        references=[TESTS], predictions=[["import sys\nsys.exit(0)", WRONG, ADD]], k=[1, 2, 4]
    )
    assert [outcome["passed"] for outcome in outcomes[0]] == [False, False, True]
    assert outcomes[0][0]["result"].startswith("unfinished: ")
    assert outcomes[0][1]["result"].startswith("wrong: ")
    # of 3 programs 1 passes: a draw of 1 holds it in a third of all cases, a draw of 2 in two thirds
    assert metric == pytest.approx({"pass@1": 1 / 3, "pass@2": 2 / 3})


def test_means_are_over_problems():
    metric, _ = SandboxedCodeEval().compute(references=[TESTS, TESTS], predictions=[[ADD], [WRONG]])
    assert metric == {"pass@1": 0.5}


def test_only_that_metric_is_ours_and_only_for_as_long():
    import evaluate as hf_evaluate

    before = hf_evaluate.load
    with sandboxed_code_eval():
        assert isinstance(hf_evaluate.load("code_eval"), SandboxedCodeEval)
        with pytest.raises(FileNotFoundError):
            hf_evaluate.load("./no such metric")
    assert hf_evaluate.load is before


@pytest.mark.parametrize("name", REFERENCES)
def test_without_permission_nothing_is_run(name):
    with pytest.raises(EvaluationError, match=f"task {name} runs programs .* evaluation.allow_code_execution: true"):
        evaluate_task(None, None, name)
    check_permission(name, allow_code_execution=True)
    check_permission("mmlu", allow_code_execution=False)
