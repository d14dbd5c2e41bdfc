"""From token ids to hidden states, and from hidden states to log-probabilities, never holding all the logits.

A model is split into its decoder and its output head, so that the head (often the widest matrix) is applied only
where a log-probability is wanted, in chunks of positions.
Shape letters: B batch, T tokens, N positions, M targets, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from evaluators.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Bytes of one chunk of float32 logits. Larger chunks are no faster and cost memory on a worker that shares its node.
CHUNK_BYTES = 64 * 2**20

# Tokens on which the split model is compared with the whole one.
_CHECKED_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class SplitModel:
    """A causal language model taken apart; make it with `split`.

    Attributes:
        decoder: token ids [B, T] to hidden states [B, T, H] after the final norm.
        output: hidden states [..., H] to logits [..., V].
        softcap: logits are softcap * tanh(logits / softcap) (Gemma 2); None leaves them alone.
        vocabulary: V.
        embeddings: number of token ids the model knows.
        max_length: longest sequence the model was made for; None if its config does not say.
        device: of the input embeddings.
    """

    decoder: Any
    output: Any
    softcap: float | None
    vocabulary: int
    embeddings: int
    max_length: int | None
    device: torch.device


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitChunk:
    """The logits of consecutive positions, shown once while they are there.

    Attributes:
        start: index of the first position among all that are scored.
        logits_NV: float32; whoever is shown them last may overwrite them.
        normalizer_N: float32, their logsumexp.
        best_N: int64, the most likely token (the first of equals).
    """

    start: int
    logits_NV: torch.Tensor
    normalizer_N: torch.Tensor
    best_N: torch.Tensor


def split(model: Any) -> SplitModel:
    """Take a transformers causal language model apart, and check on a few tokens that the parts make the whole.

    The check catches every head that does more than a projection and a soft-cap (scaled logits, for instance).

    Raises:
        EvaluationError: the model is in training mode, has no separate head, or its parts give other logits.
    """
    if model.training:
        raise EvaluationError(f"{type(model).__name__} is in training mode: call model.eval() before evaluating it")
    decoder, output = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or decoder is model or output is None:
        raise EvaluationError(f"{type(model).__name__} has no separate decoder and output head: use a causal LM class")
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight
    parts = SplitModel(
        decoder=decoder,
        output=output,
        softcap=getattr(config, "final_logit_softcapping", None),
        vocabulary=int(config.vocab_size),
        embeddings=int(embedding.shape[0]),
        max_length=getattr(config, "max_position_embeddings", None),
        device=embedding.device,
    )
    _check(model, parts)
    return parts


def hidden_states(model: SplitModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, T, H] after the final norm, in the model's dtype; causal, so right padding needs no mask."""
    return model.decoder(input_ids=ids_BT.to(model.device), use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def token_log_probabilities(
    model: SplitModel,
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    observe: Callable[[LogitChunk], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of one target per hidden state, in float32 from logits of the model's own dtype.

    Args:
        model: the split model.
        hidden_NH: hidden states.
        targets_N: int64 token ids.
        chunk_bytes: most bytes that one chunk of float32 logits may take.
        observe: shown every chunk of logits, in order, after its log-probabilities were taken.

    Returns:
        float32 [N] log-probabilities and bool [N], whether the target is the most likely token (the first of equals).
    """
    positions_N = torch.arange(len(hidden_NH))
    return log_probabilities_at(model, hidden_NH, positions_N, targets_N, chunk_bytes=chunk_bytes, observe=observe)


def log_probabilities_at(
    model: SplitModel,
    hidden_NH: torch.Tensor,
    positions_M: torch.Tensor,
    targets_M: torch.Tensor,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    observe: Callable[[LogitChunk], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_log_probabilities` of any number of targets per hidden state, whose logits are computed once.

    Args:
        model: the split model.
        hidden_NH: hidden states.
        positions_M: int64 indices of hidden states, in ascending order.
        targets_M: int64 token ids.
        chunk_bytes: most bytes that one chunk of float32 logits may take.
        observe: shown every chunk of logits, in order, after its log-probabilities were taken.

    Returns:
        float32 [M] and bool [M].
    """
    log_probabilities, greedy = [], []
    for start, logits, positions, targets in target_chunks(
        model, hidden_NH, positions_M, targets_M, chunk_bytes=chunk_bytes
    ):
        wide = logits.float()
        normalizer_N, best_N = wide.logsumexp(dim=1), wide.argmax(dim=1)
        log_probabilities.append(wide[positions, targets] - normalizer_N[positions])
        greedy.append(best_N[positions] == targets)
        if observe is not None:
            observe(LogitChunk(start=start, logits_NV=wide, normalizer_N=normalizer_N, best_N=best_N))
    return torch.cat(log_probabilities), torch.cat(greedy)


def target_chunks(
    model: SplitModel,
    hidden_NH: torch.Tensor,
    positions_M: torch.Tensor,
    targets_M: torch.Tensor,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Logits of consecutive positions, a chunk at a time, with the targets that are wanted there.

    Yields:
        the first position's index, logits [n, V] in the model's dtype, and of the targets in the chunk the positions
        (counted from the first) and the token ids, on the logits' device.
    """
    chunk = max(1, chunk_bytes // (4 * model.vocabulary))
    starts = torch.arange(0, len(hidden_NH), chunk)
    bounds = [*torch.searchsorted(positions_M.cpu(), starts).tolist(), len(positions_M)]
    for start, low, high in zip(starts.tolist(), bounds, bounds[1:], strict=False):
        logits = logits_of(model, hidden_NH[start : start + chunk])
        positions = (positions_M[low:high] - start).to(logits.device)
        yield start, logits, positions, targets_M[low:high].to(logits.device)


def logits_of(model: SplitModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] in the model's dtype; the caller keeps the number of positions small."""
    logits: torch.Tensor = model.output(hidden)
    if model.softcap is not None:
        logits = model.softcap * torch.tanh(logits / model.softcap)
    return logits


@torch.inference_mode()
def _check(model: Any, parts: SplitModel) -> None:
    ids = torch.arange(min(_CHECKED_TOKENS, parts.embeddings), device=parts.device)[None]
    whole = model(input_ids=ids, use_cache=False).logits.float()
    ours = logits_of(parts, hidden_states(parts, ids)).float()
    if whole.shape != ours.shape:
        raise EvaluationError(
            f"{type(model).__name__} gives logits {list(whole.shape)}, its head {list(ours.shape)}: not supported yet"
        )
    if not (whole.isfinite().all() and ours.isfinite().all()):
        return  # a model broken by quantization is measured, not refused; there is nothing left to compare
    off = (whole - ours).abs().max().item()
    if off > 1e-2 * max(whole.abs().max().item(), 1e-6):
        raise EvaluationError(
            f"{type(model).__name__} changes its logits after the head (by up to {off:.3g}) in a way that is not "
            "known here: teach evaluators.head about it"
        )
