"""Perplexity of a causal language model on token windows. Shape letters: W windows, T tokens, B batch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evaluators.corpora import PADDING
from evaluators.errors import EvaluationError
from evaluators.head import CHUNK_BYTES, LogitChunk, SplitModel, hidden_states, split, token_log_probabilities

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """Perplexity and what it was computed from. Non-finite values are results, kept as they are.

    Attributes:
        perplexity: exp of the mean over predicted tokens, which for windows of one length is that of `window_nlls`.
        stderr: standard error of `perplexity` by the delta method, perplexity * s / sqrt(W) with s the sample standard
            deviation of `window_nlls`: the spread over windows of this corpus. None for a single window.
        window_nlls: per window, the mean negative log-likelihood (nats) of its T - 1 predicted tokens.
        num_tokens: predicted tokens, W * (T - 1), fewer where the last window is shorter.
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
    observe: Callable[[LogitChunk], None] | None = None,
) -> PerplexityResult:
    """Perplexity by GPTQ's recipe: exp of the mean over windows of the mean cross-entropy of T - 1 tokens.

    Where all windows have one length, this is also the exp of the mean over all predicted tokens; where the last one is
    shorter, it is that by definition. The model runs in its own dtype; the loss is float32, the means float64, on the
    CPU, as not every device has float64.

    Args:
        model: a transformers causal language model in evaluation mode.
        windows: int64 [W, T], T at least 2; the last may be shorter, filled up with `PADDING`.
        batch_size: windows per forward pass.
        progress: called with windows done and W after every forward pass.
        chunk_bytes: most bytes that one chunk of float32 logits may take.
        observe: shown the logits of every predicted token, in order, chunk by chunk: whatever else is to be measured
            on these windows needs no forward pass of its own.

    Raises:
        EvaluationError: windows of another shape or dtype, longer than the model's context, or with token ids the
            model does not have; a model that cannot be split into decoder and head.

    Source: Frantar et al. 2022, arXiv:2210.17323.
    """
    if batch_size < 1:
        raise EvaluationError(f"batch_size = {batch_size} must be at least 1")
    parts = split(model)
    _check_windows(windows, parts)
    tokens = window_tokens(windows)
    nlls: list[float] = []
    for batch in _batches(windows, tokens, batch_size):
        ids_BT = batch.to(parts.device)
        scored = sum(tokens[: len(nlls)])
        hidden_NH = hidden_states(parts, ids_BT)[:, :-1].flatten(0, 1)
        log_probabilities, _ = token_log_probabilities(
            parts,
            hidden_NH,
            ids_BT[:, 1:].flatten(),
            chunk_bytes=chunk_bytes,
            observe=None if observe is None else _from(scored, observe),
        )
        nlls += (-log_probabilities.cpu()).view(len(ids_BT), ids_BT.shape[1] - 1).double().mean(dim=1).tolist()
        if progress is not None:
            progress(len(nlls), len(windows))
    return summarize(nlls, num_tokens=sum(tokens), tokens=tokens)


def window_tokens(windows: npt.NDArray[np.int64]) -> list[int]:
    """How many tokens are predicted in each window: all but the first, and no padding."""
    return [int(count) - 1 for count in (windows != PADDING).sum(axis=1)]


def _batches(windows: npt.NDArray[np.int64], tokens: Sequence[int], batch_size: int) -> Iterator[torch.Tensor]:
    """Windows of one length together; a shorter last one alone and without its padding."""
    whole = len(windows) if tokens[-1] == windows.shape[1] - 1 else len(windows) - 1
    for start in range(0, whole, batch_size):
        yield torch.tensor(windows[start : min(start + batch_size, whole)])
    if whole < len(windows):
        yield torch.tensor(windows[whole:, : tokens[-1] + 1])


def _from(start: int, observe: Callable[[LogitChunk], None]) -> Callable[[LogitChunk], None]:
    """Count positions over all windows, not only over those of one forward pass."""
    return lambda chunk: observe(dataclasses.replace(chunk, start=start + chunk.start))


def summarize(window_nlls: list[float], *, num_tokens: int, tokens: Sequence[int] | None = None) -> PerplexityResult:
    """Perplexity and its standard error from per-window mean negative log-likelihoods.

    Args:
        window_nlls: one per window.
        num_tokens: predicted tokens of all windows.
        tokens: of each window; None: equally many.
    """
    with np.errstate(all="ignore"):  # infinity and nan are results
        mean, spread = mean_and_spread(window_nlls, tokens)
        value = float(np.exp(mean))
    return PerplexityResult(
        perplexity=value,
        stderr=None if spread is None else value * spread / math.sqrt(len(window_nlls)),
        window_nlls=list(window_nlls),
        num_tokens=num_tokens,
        num_windows=len(window_nlls),
    )


def mean_and_spread(window_means: Sequence[float], tokens: Sequence[int] | None = None) -> tuple[float, float | None]:
    """Mean over tokens of what was averaged per window, and a spread s: s / sqrt(W) is the mean's standard error.

    Windows of one length: the plain mean and the sample standard deviation. Else the mean is the ratio of two sums over
    windows, and s^2 = W^2 / (W - 1) * sum of (tokens / all tokens)^2 (window mean - mean)^2, which is the same where
    they are equal. None for a single window.

    Source: Cochran, Sampling Techniques, 3rd ed. 1977, chapter 6 (the ratio estimate).
    """
    means = np.asarray(window_means, dtype=np.float64)
    count = len(means)
    if tokens is None or len(set(tokens)) == 1:
        return float(means.mean()), float(means.std(ddof=1)) if count > 1 else None
    weights = np.asarray(tokens, dtype=np.float64) / sum(tokens)
    mean = float((weights * means).sum())
    return mean, float(np.sqrt(count**2 / (count - 1) * ((weights * (means - mean)) ** 2).sum()))


def _check_windows(windows: npt.NDArray[np.int64], model: SplitModel) -> None:
    if windows.ndim != 2 or windows.dtype != np.int64 or len(windows) < 1 or windows.shape[1] < 2:
        raise EvaluationError(
            f"windows are {windows.dtype} {list(windows.shape)}; they must be int64 [W, T], W at least 1, T at least 2"
        )
    whole, last = windows[:-1], windows[-1]
    length = int((last != PADDING).sum())
    if length < 2 or (last[length:] != PADDING).any():
        raise EvaluationError(
            f"the last window holds {length} tokens before its padding; it must hold at least 2, and padding only after"
        )
    if model.max_length is not None and windows.shape[1] > model.max_length:
        raise EvaluationError(
            f"sequence_length {windows.shape[1]} is longer than the model's context of {model.max_length}: "
            "use shorter windows"
        )
    least, most = (int(of([of(part) for part in (whole, last[:length]) if part.size])) for of in (np.min, np.max))
    if least < 0 or most >= model.embeddings:
        raise EvaluationError(
            f"windows hold token ids from {least} to {most}, but the model has {model.embeddings}: "
            "tokenize with the model's own tokenizer"
        )
