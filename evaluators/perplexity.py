"""Perplexity of a causal language model on token windows. Shape letters: W windows, T tokens, B batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evaluators.errors import EvaluationError
from evaluators.head import CHUNK_BYTES, SplitModel, hidden_states, split, token_log_probabilities

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """Perplexity and what it was computed from. Non-finite values are results, kept as they are.

    Attributes:
        perplexity: exp of the mean of `window_nlls`.
        stderr: standard error of `perplexity` by the delta method, perplexity * s / sqrt(W) with s the sample standard
            deviation of `window_nlls`: the spread over windows of this corpus. None for a single window.
        window_nlls: per window, the mean negative log-likelihood (nats) of its T - 1 predicted tokens.
        num_tokens: predicted tokens, W * (T - 1).
        num_windows: W.
    """

    perplexity: float
    stderr: float | None
    window_nlls: list[float]
    num_tokens: int
    num_windows: int


@torch.inference_mode()
def perplexity(
    model: Any,
    windows: npt.NDArray[np.int64],
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> PerplexityResult:
    """Perplexity by GPTQ's recipe: exp of the mean over windows of the mean cross-entropy of T - 1 tokens.

    All windows have one length, so this is also the exp of the mean over all predicted tokens. The model runs in its
    own dtype; the loss is float32, the means float64.

    Args:
        model: a transformers causal language model in evaluation mode.
        windows: int64 [W, T], T at least 2.
        batch_size: windows per forward pass.
        progress: called with windows done and W after every forward pass.
        chunk_bytes: most bytes that one chunk of float32 logits may take.

    Raises:
        EvaluationError: windows of another shape or dtype, longer than the model's context, or with token ids the
            model does not have; a model that cannot be split into decoder and head.

    Source: Frantar et al. 2022, arXiv:2210.17323.
    """
    if batch_size < 1:
        raise EvaluationError(f"batch_size = {batch_size} must be at least 1")
    parts = split(model)
    _check_windows(windows, parts)
    num_windows, length = windows.shape
    nlls: list[float] = []
    for start in range(0, num_windows, batch_size):
        ids_BT = torch.tensor(windows[start : start + batch_size], device=parts.device)
        hidden_NH = hidden_states(parts, ids_BT)[:, :-1].flatten(0, 1)
        log_probabilities, _ = token_log_probabilities(
            parts, hidden_NH, ids_BT[:, 1:].flatten(), chunk_bytes=chunk_bytes
        )
        nlls += (-log_probabilities).view(len(ids_BT), length - 1).double().mean(dim=1).tolist()
        if progress is not None:
            progress(len(nlls), num_windows)
    return summarize(nlls, num_tokens=num_windows * (length - 1))


def summarize(window_nlls: list[float], *, num_tokens: int) -> PerplexityResult:
    """Perplexity and its standard error from per-window mean negative log-likelihoods of equal windows."""
    nlls = np.asarray(window_nlls, dtype=np.float64)
    with np.errstate(all="ignore"):  # infinity and nan are results
        value = float(np.exp(nlls.mean()))
        spread = float(nlls.std(ddof=1)) if len(nlls) > 1 else None
    return PerplexityResult(
        perplexity=value,
        stderr=None if spread is None else value * spread / math.sqrt(len(nlls)),
        window_nlls=list(window_nlls),
        num_tokens=num_tokens,
        num_windows=len(window_nlls),
    )


def _check_windows(windows: npt.NDArray[np.int64], model: SplitModel) -> None:
    if windows.ndim != 2 or windows.dtype != np.int64 or len(windows) < 1 or windows.shape[1] < 2:
        raise EvaluationError(
            f"windows are {windows.dtype} {list(windows.shape)}; they must be int64 [W, T], W at least 1, T at least 2"
        )
    if model.max_length is not None and windows.shape[1] > model.max_length:
        raise EvaluationError(
            f"sequence_length {windows.shape[1]} is longer than the model's context of {model.max_length}: "
            "use shorter windows"
        )
    if windows.min() < 0 or windows.max() >= model.embeddings:
        raise EvaluationError(
            f"windows hold token ids from {windows.min()} to {windows.max()}, but the model has {model.embeddings}: "
            "tokenize with the model's own tokenizer"
        )
