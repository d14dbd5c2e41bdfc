"""Log-probabilities with the rounding of lm-eval's HFLM: the log-softmax in the model's own dtype, and their sum too.

In 16 bits this is coarse (a log-likelihood of -40 is rounded to a quarter), and it decides between answers that lie
close together: whoever wants the numbers of lm-eval in that dtype needs its rounding.
Shape letters: N positions, M targets, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from evaluators.head import target_chunks

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
        positions_M: int64 indices of hidden states, in ascending order.
        targets_M: int64 token ids.

    Returns:
        [M] in the model's dtype, and bool [M]; of tokens that round to the same log-probability the first is the best.
    """
    log_probabilities, greedy = [], []
    for _, logits_NV, positions, targets in target_chunks(model, hidden_NH, positions_M, targets_M):
        rounded_NV = logits_NV.log_softmax(dim=1)
        log_probabilities.append(rounded_NV[positions, targets])
        greedy.append(rounded_NV.argmax(dim=1)[positions] == targets)
    return torch.cat(log_probabilities), torch.cat(greedy)


def narrow_sum(values: Sequence[float], dtype: torch.dtype) -> float:
    """The sum of log-probabilities, rounded to their dtype."""
    return float(torch.tensor(values, dtype=dtype).sum())
