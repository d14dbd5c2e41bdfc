"""Whether a baseline is worth a night of comparisons: what the unquantized model's own numbers warn of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from evaluators.comparison import chance_test

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from evaluators.harness import Item

# A score that guessing gives this often says nothing about a model.
_LEAST_P = 0.05

# Of a window, the tokens that are looked at: the first few are hard to foresee with BOS or without.
_SKIPPED, _LOOKED_AT = 8, 512
# A BOS that makes text this much more likely was in place when the model was trained.
_RATIO = 1.1


def chance_warning(items: Sequence[Item]) -> str | None:
    """A sentence if the unquantized model's accuracy cannot be told from guessing; None if it can, or has no choices.

    Args:
        items: of one task, with accuracies.
    """
    import numpy as np

    scored = [item for item in items if len(item.log_likelihoods) >= 2 and "acc" in item.correct]
    if not scored:
        return None
    choices_N = np.array([len(item.log_likelihoods) for item in scored])
    correct = int(sum(item.correct["acc"] for item in scored))
    p_value = chance_test(correct, choices_N)
    if p_value < _LEAST_P:
        return None
    return (
        f"the unquantized model is right on {correct} of {len(scored)}, which guessing gives as well "
        f"(p = {p_value:.2f}): what quantization costs cannot show here; use more items, another task or a better model"
    )


def bos_warning(model: Any, tokenizer: Any, windows: npt.NDArray[np.int64]) -> str | None:
    """A sentence if the windows begin without BOS and the model finds their text much likelier with one.

    Args:
        model: the unquantized model.
        tokenizer: its tokenizer.
        windows: int64 [W, T] as they are evaluated; the first alone is run, twice.
    """
    import numpy as np

    bos = tokenizer.bos_token_id
    tokens = windows[0][windows[0] >= 0][:_LOOKED_AT]  # a negative id fills up a shorter window
    if bos is None or len(tokens) <= 2 * _SKIPPED or tokens[0] == bos:
        return None
    without = _perplexity_of_end(model, tokens, len(tokens) - _SKIPPED)
    with_bos = _perplexity_of_end(model, np.concatenate([[bos], tokens]), len(tokens) - _SKIPPED)
    if not (math.isfinite(without) and without > _RATIO * with_bos):
        return None
    return (
        f"windows begin without BOS, and with one the unquantized model's perplexity on the first is {with_bos:.4g} "
        f"instead of {without:.4g}: it was trained with a BOS; set bos: per_window, or mend the tokenizer"
    )


def _perplexity_of_end(model: Any, tokens: npt.NDArray[np.int64], count: int) -> float:
    """Of the last `count` tokens of a text."""
    import torch

    from evaluators.head import hidden_states, split, token_log_probabilities

    with torch.inference_mode():
        parts = split(model)
        ids = torch.tensor(tokens, device=parts.device)
        hidden_NH = hidden_states(parts, ids[None])[0, -count - 1 : -1]
        log_probabilities, _ = token_log_probabilities(parts, hidden_NH, ids[-count:])
        return math.exp(min(-log_probabilities.cpu().double().mean().item(), 700.0))  # not every device has float64
