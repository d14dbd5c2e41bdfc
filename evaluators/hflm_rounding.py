"""Log-probabilities with the rounding of lm-eval's HFLM: the log-softmax in the model's own dtype, and their sum too.

In 16 bits this is coarse (a log-likelihood of -40 is rounded to a quarter), and it decides between answers that lie
close together: whoever wants the numbers of lm-eval in that dtype needs its rounding.
Shape letters: N positions, M targets, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from evaluators.head import CHUNK_BYTES, logits_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evaluators.head import SplitModel


def narrow_log_probabilities_at(
    model: SplitModel, hidden_NH: torch.Tensor, positions_M: torch.Tensor, targets_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of targets, in the model's dtype, and whether each is the most likely token.

    Args:
        model: the split model.
        hidden_NH: hidden states.
        positions_M: int64 indices of hidden states.
        targets_M: int64 token ids.

    Returns:
        [M] in the model's dtype, and bool [M]; of tokens that round to the same log-probability the first is the best.
    """
    found = torch.empty(len(positions_M), dtype=hidden_NH.dtype)
    greedy = torch.empty(len(positions_M), dtype=torch.bool)
    chunk = max(1, CHUNK_BYTES // (4 * model.vocabulary))
    for start in range(0, len(hidden_NH), chunk):
        log_probabilities_NV = logits_of(model, hidden_NH[start : start + chunk]).log_softmax(-1)
        best_N = log_probabilities_NV.argmax(-1)
        here = (positions_M >= start) & (positions_M < start + chunk)
        positions = (positions_M[here] - start).to(best_N.device)
        targets = targets_M[here].to(best_N.device)
        found[here] = log_probabilities_NV[positions, targets].cpu()
        greedy[here] = (best_N[positions] == targets).cpu()
    return found, greedy


def narrow_sum(values: Sequence[float], dtype: torch.dtype) -> float:
    """The sum of log-probabilities, rounded to their dtype."""
    return float(torch.tensor(values, dtype=dtype).sum())
