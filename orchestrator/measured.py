"""What an evaluation measured -> metrics, items and protocol of its rows. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluators.corpora import PADDING

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from evaluators.divergence import DivergenceResult
    from evaluators.harness import TaskResult
    from evaluators.perplexity import PerplexityResult
    from orchestrator.config import PerplexityConfig


def perplexity_outcome(asked: PerplexityConfig, result: PerplexityResult) -> dict[str, Any]:
    """Metrics, items and protocol of perplexity alone. A plain corpus cut by default says of itself what it always
    said, so that its rows stay comparable with older ones."""
    metric = {
        "metric": "perplexity",
        "value": result.perplexity,
        "stderr": result.stderr,
        "n": result.num_tokens,
        "higher_is_better": False,
    }
    items = [
        {"doc_id": index, "log_likelihoods": [-nll], "target": None, "metric": "nll", "value": nll}
        for index, nll in enumerate(result.window_nlls)
    ]
    protocol = {
        "sequence_length": asked.sequence_length,
        "windows": result.num_windows,
        "tokens": result.num_tokens,
    } | asked.protocol
    return {"metrics": [metric], "items": items, "protocol": protocol}


def task_outcome(result: TaskResult, *, limit: int | None, is_fp: bool) -> dict[str, Any]:
    """Metrics, items, protocol and warnings of a task.

    Args:
        result: of the whole task.
        limit: as it was asked for.
        is_fp: whether it is the unquantized model's, of which a score at chance is warned.
    """
    import importlib.metadata

    from evaluators.gate import chance_warning

    metrics = [
        {
            "metric": metric.name,
            "value": metric.value,
            "stderr": metric.stderr,
            "n": metric.n,
            "higher_is_better": metric.higher_is_better,
        }
        for metric in result.metrics
    ]
    items = [
        {
            "doc_id": item.doc_id,
            "subtask": item.subtask,
            "log_likelihoods": item.log_likelihoods,
            "target": item.target,
            "answer": item.answer,
            "thought": item.thought,
            "answer_tokens": item.answer_tokens,
            "is_cut": item.is_cut,
            "is_loop": item.is_loop,
            "metric": name,
            "value": value,
        }
        for item in result.items
        for name, value in item.correct.items()
    ]
    protocol = {
        "num_fewshot": result.num_fewshot,
        "limit": limit,
        "split": result.split,
        "protocol_split": result.protocol_split,
        "truncated": result.num_truncated,
        "scoring": result.scoring,
        **result.chat,
        "task_version": result.version,
        "lm_eval": importlib.metadata.version("lm-eval"),
    }
    warning = chance_warning(result.items) if is_fp else None
    return {"metrics": metrics, "items": items, "protocol": protocol, "warnings": [warning] if warning else []}


def divergence_outcome(found: DivergenceResult, facts: dict[str, Any]) -> dict[str, Any]:
    """Metrics and items of the divergence from the unquantized model.

    Args:
        found: what was measured.
        facts: by what it was measured, for the protocol of these metrics.
    """
    values = (
        ("kl_divergence", found.kl_divergence, found.kl_stderr, False),
        ("top1_agreement", found.top1_agreement, found.top1_stderr, True),
    )
    return {
        "metrics": [_metric(name, value, stderr, found.num_tokens, up, facts) for name, value, stderr, up in values],
        "items": [
            {"doc_id": index, "log_likelihoods": None, "target": None, "metric": "kl_divergence", "value": value}
            for index, value in enumerate(found.window_kls)
        ],
    }


def own_divergence_outcome(result: PerplexityResult, facts: dict[str, Any]) -> dict[str, Any]:
    """The unquantized model's own: 0 and 1 by definition, without an error and without items, for nothing is measured.

    The rows are there so that every cell has the same metrics and what others diverge from is seen. A model that is
    broken itself has none.
    """
    divergence, agreement = (0.0, 1.0) if math.isfinite(result.perplexity) else (math.nan, math.nan)
    return {
        "metrics": [
            _metric("kl_divergence", divergence, None, result.num_tokens, False, facts),
            _metric("top1_agreement", agreement, None, result.num_tokens, True, facts),
        ],
        "items": [],
    }


def _metric(
    name: str, value: float, stderr: float | None, num_tokens: int, higher_is_better: bool, facts: dict[str, Any]
) -> dict[str, Any]:
    return {
        "metric": name,
        "value": value,
        "stderr": stderr,
        "n": num_tokens,
        "higher_is_better": higher_is_better,
        "protocol": facts,
    }


def examinable(windows: NDArray[np.int64], window_nlls: list[float]) -> tuple[NDArray[np.int64], list[float], int]:
    """Windows of one length among which the first loss that is not finite is found, and the number of the first.

    All of them, but for a shorter last one: that stands alone where it is the only one to be looked at.
    """
    length = int((windows[-1] != PADDING).sum())
    if length == windows.shape[1]:
        return windows, window_nlls, 0
    if len(windows) > 1 and (not np.isfinite(window_nlls[:-1]).all() or np.isfinite(window_nlls[-1])):
        return windows[:-1], window_nlls[:-1], 0
    return windows[-1:, :length], window_nlls[-1:], len(windows) - 1
