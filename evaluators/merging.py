"""The results of a task's slices -> the task's. Pure; the floats are those of the task in one piece."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from evaluators.harness import Metric, group_metrics, text_metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evaluators.harness import Item, TaskResult


def merge(parts: Sequence[TaskResult]) -> TaskResult:
    """Put the slices of a task together.

    Args:
        parts: of all slices, in their order.

    Returns:
        What `evaluate_task` gives without slices: its metrics are computed anew by lm-eval's own functions over the
        items of all slices. Where slices were scored in different ways, `scoring` names each.
    """
    first = parts[0]
    items = [item for part in parts for item in part.items]
    by_task: dict[str | None, list[Item]] = {}
    for item in items:
        by_task.setdefault(item.subtask, []).append(item)
    of_items = [metric for metric in first.metrics if metric.name in items[0].correct]
    metrics = group_metrics([[_over(metric, scored) for metric in of_items] for scored in by_task.values()])
    return replace(
        first,
        num_truncated=sum(part.num_truncated for part in parts),
        scoring="; ".join(dict.fromkeys(part.scoring for part in parts)),
        chat=dict(entry for part in parts for entry in part.chat.items()),
        metrics=metrics + text_metrics(items),
        items=items,
    )


def _over(metric: Metric, items: Sequence[Item]) -> Metric:
    """A metric of one task over all its items: `check_slices` has made sure that it is their mean."""
    from lm_eval.api.metrics import mean, mean_stderr

    values = [item.correct[metric.name] for item in items]
    # lm-eval gives no standard error of a single item.
    stderr = float(mean_stderr(values)) if len(values) > 1 else None
    return replace(metric, value=float(mean(values)), stderr=stderr, n=len(values))
