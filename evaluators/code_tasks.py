"""lm-eval's tasks that run programs, on the sandbox: what stands in for the metric that runs them in the open.

Their definitions load the metric `code_eval` from the Hub when they are imported, and try it out. Here it is ours
instead, for as long as a definition is loaded; lm-eval's own code then calls it with programs and tests.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from evaluators.sandbox import run_program

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class SandboxedCodeEval:
    """`code_eval` as lm-eval's definitions call it."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], dict[int, list[dict[str, Any]]]]:
        """Run each prediction followed by its tests.

        Args:
            references: tests, one text per problem.
            predictions: programs per problem.
            k: of pass@k.

        Returns:
            "pass@k" -> the mean over problems of 1 - C(n - c, k) / C(n, k), for c of n programs passing; and per
            problem and program what became of it.

        Raises:
            EvaluationError: this machine cannot hold programs.

        Source: Chen et al. 2021, arXiv:2107.03374, eq. 1.
        """
        results = {
            problem: [_outcome(program, tests) for program in programs]
            for problem, (programs, tests) in enumerate(zip(predictions, references, strict=True))
        }
        counts = [(len(found), sum(outcome["passed"] for outcome in found)) for found in results.values()]
        means = {
            f"pass@{draws}": sum(_pass_at(draws, *count) for count in counts) / len(counts)
            for draws in k
            if all(total >= draws for total, _ in counts)
        }
        return means, results


def _outcome(program: str, tests: str) -> dict[str, Any]:
    verdict = run_program(f"{program}\n{tests}")
    return {"passed": verdict.passed, "result": f"{verdict.kind}: {verdict.detail}"}


def _pass_at(draws: int, total: int, passed: int) -> float:
    return 1 - math.comb(total - passed, draws) / math.comb(total, draws)


@contextmanager
def sandboxed_code_eval() -> Iterator[None]:
    """Within, whoever loads the metric `code_eval` gets the sandboxed one."""
    import evaluate

    load = evaluate.load

    def ours(path: str, *args: Any, **options: Any) -> Any:
        return SandboxedCodeEval() if path == "code_eval" else load(path, *args, **options)

    with mock.patch.object(evaluate, "load", ours):
        yield
