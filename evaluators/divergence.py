"""How far a model's next-token distributions are from another's, on the windows of a perplexity evaluation.

The reference (the unquantized model) is kept as its `k` most likely tokens per position with their log-probabilities,
and the log of what is left as one bucket. With p the reference, q the model under test, S the k tokens and r the rest:

    KL_k(p || q) = sum over S of p_i log(p_i / q_i) + p_r log(p_r / q_r)
    KL(p || q)   = KL_k(p || q) + p_r KL(p given r || q given r)  >=  KL_k(p || q)

by the chain rule (the log-sum inequality): what is measured is a lower bound of the divergence over all tokens, it
grows with k, and is exact where k reaches the vocabulary. What is missing is p_r times the divergence within the rest.
Shape letters: N positions, K most likely tokens, V vocabulary, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evaluators.head import LogitChunk
from evaluators.perplexity import mean_and_spread

TOP_K = 512
# Raise when the same two models would get another divergence; part of an evaluation's identity and of a reference's.
VERSION = "divergence/1"


@dataclass(frozen=True, kw_only=True, eq=False)
class TopTokens:
    """What is kept of a distribution over tokens, per position.

    Attributes:
        ids_NK: int32, the most likely tokens.
        log_probabilities_NK: float32, theirs.
        rest_N: float32, the log of the probability of all other tokens together; -inf where there are none.
        best_N: int32, the most likely token (the first of equals).
    """

    ids_NK: torch.Tensor
    log_probabilities_NK: torch.Tensor
    rest_N: torch.Tensor
    best_N: torch.Tensor

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The four tensors, each with N rows."""
        return (self.ids_NK, self.log_probabilities_NK, self.rest_N, self.best_N)

    @classmethod
    def joined(cls, several: Sequence[TopTokens]) -> TopTokens:
        """The positions of several, one after the other."""
        ids, log_probabilities, rest, best = (
            torch.cat(parts) for parts in zip(*(one.parts for one in several), strict=True)
        )
        return cls(ids_NK=ids, log_probabilities_NK=log_probabilities, rest_N=rest, best_N=best)

    def rows(self, start: int, stop: int) -> TopTokens:
        """The positions from `start` up to `stop`."""
        ids, log_probabilities, rest, best = (part[start:stop] for part in self.parts)
        return TopTokens(ids_NK=ids, log_probabilities_NK=log_probabilities, rest_N=rest, best_N=best)


def top_tokens(chunk: LogitChunk, k: int = TOP_K) -> TopTokens:
    """What is kept of a chunk of logits, on the CPU. Overwrites the logits.

    Args:
        chunk: of the reference.
        k: how many tokens, at most all.
    """
    top = chunk.logits_NV.topk(min(k, chunk.logits_NV.shape[1]), dim=1)
    log_probabilities_NK = top.values - chunk.normalizer_N[:, None]
    return TopTokens(
        ids_NK=top.indices.to(torch.int32).cpu(),
        log_probabilities_NK=log_probabilities_NK.cpu(),
        rest_N=_log_rest(chunk, top.indices).cpu(),
        best_N=chunk.best_N.to(torch.int32).cpu(),
    )


def token_divergence(reference: TopTokens, chunk: LogitChunk) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(reference || model) in nats and top-1 agreement per position, float64 [N] each. Overwrites the logits.

    Where both are the same token, agreement is 1, else 0; where the divergence is not a number there is none, and
    agreement is not a number either.
    """
    ids_NK = reference.ids_NK.to(chunk.logits_NV.device, torch.int64)
    log_q_NK = chunk.logits_NV.gather(1, ids_NK) - chunk.normalizer_N[:, None]
    divergence_N = _divergence(reference, log_q_NK, _log_rest(chunk, ids_NK))
    agreement_N = (chunk.best_N.cpu() == reference.best_N).double()
    return divergence_N, agreement_N.masked_fill(divergence_N.isnan(), math.nan)


def token_losses(
    reference: TopTokens, logits_NV: torch.Tensor, targets_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(reference || model) and the negative log-likelihood of a target per position, float64 [N] each, in nats.

    Faster than log-probabilities and `token_divergence`, for a search that asks for nothing else: one exponential per
    logit serves both normalizers. It differs by float32's rounding, and a rest of less than 1e-38 of
    the most likely token's probability counts as that much.

    Args:
        reference: what was kept of these positions.
        logits_NV: float32, of the model under test. Overwritten.
        targets_N: int64 token ids.
    """
    ids_NK = reference.ids_NK.to(logits_NV.device, torch.int64)
    shifted_NV = logits_NV.sub_(logits_NV.amax(dim=1, keepdim=True))
    top_NK, target_N = shifted_NV.gather(1, ids_NK), shifted_NV.gather(1, targets_N[:, None])[:, 0]
    shares_NV = shifted_NV.exp_()
    normalizer_N = shares_NV.sum(dim=1).log()
    rest_N = shares_NV.scatter_(1, ids_NK, 0.0).sum(dim=1).clamp_min_(torch.finfo(torch.float32).tiny).log()
    # Nothing can be left of a distribution that is not one: scattering may have covered what was not a number.
    rest_N = (rest_N - normalizer_N).masked_fill_(normalizer_N.isnan(), math.nan)
    divergence_N = _divergence(reference, top_NK - normalizer_N[:, None], rest_N)
    return divergence_N, (normalizer_N - target_N).cpu().double()


def _divergence(reference: TopTokens, log_q_NK: torch.Tensor, rest_N: torch.Tensor) -> torch.Tensor:
    # In float64 and on the CPU: small beside the logits, and not every device has float64.
    log_p = torch.cat([reference.log_probabilities_NK, reference.rest_N[:, None]], dim=1).double()
    log_q = torch.cat([log_q_NK, rest_N[:, None]], dim=1).cpu().double()
    p, q = log_p.exp(), log_q.exp()
    # sum(q) - sum(p) is 0 but for the rounding of the float32 normalizers; with it every term is at least 0, and that
    # rounding, which would be as large as the divergence of a good 8-bit model, counts in second order only.
    terms = torch.where(p == 0, q, p * (log_p - log_q) - p + q)
    return terms.sum(dim=1)


def _log_rest(chunk: LogitChunk, ids_NK: torch.Tensor) -> torch.Tensor:
    """Log of the probability of all tokens but `ids_NK`, without cancellation: summed over those tokens themselves."""
    rest = chunk.logits_NV.scatter_(1, ids_NK, -math.inf).logsumexp(dim=1) - chunk.normalizer_N
    # Nothing can be left of a distribution that is not one: scattering may have covered what was not a number.
    return rest.masked_fill_(chunk.normalizer_N.isnan(), math.nan)


class Recorder:
    """Observes the reference model's logits (`perplexity`'s `observe`) and hands out what is kept, window by window."""

    def __init__(
        self, window_tokens: Sequence[int], write: Callable[[int, TopTokens], None], *, k: int = TOP_K
    ) -> None:
        """Ready for the first window.

        Args:
            window_tokens: predicted tokens of each window.
            write: given the number of a window and what is kept of it.
            k: see `top_tokens`.
        """
        self._window_tokens = window_tokens
        self._write = write
        self._k = k
        self._window = 0
        self._pending: list[TopTokens] = []

    def __call__(self, chunk: LogitChunk) -> None:
        """Take the next chunk; several windows may end in it."""
        self._pending.append(top_tokens(chunk, self._k))
        while self._pending and sum(len(part.rest_N) for part in self._pending) >= self._window_tokens[self._window]:
            found = TopTokens.joined(self._pending)
            size = self._window_tokens[self._window]
            self._write(self._window, found.rows(0, size))
            left = found.rows(size, len(found.rest_N))
            self._pending = [left] if len(left.rest_N) else []
            self._window += 1


@dataclass(frozen=True, kw_only=True)
class DivergenceResult:
    """Divergence from the reference. Non-finite values are results, kept as they are.

    Attributes:
        kl_divergence: mean over tokens of KL_k(reference || model), in nats.
        kl_stderr: its standard error over windows; None for a single window.
        top1_agreement: share of tokens at which both find the same token most likely.
        top1_stderr: its standard error over windows.
        window_kls: means over the tokens of each window.
        window_agreements: likewise.
        num_tokens: tokens of all windows.
    """

    kl_divergence: float
    kl_stderr: float | None
    top1_agreement: float
    top1_stderr: float | None
    window_kls: list[float]
    window_agreements: list[float]
    num_tokens: int


class Comparison:
    """Observes the logits of a model under test (`perplexity`'s `observe`) beside those of the reference."""

    def __init__(self, window_tokens: Sequence[int], read: Callable[[int], TopTokens]) -> None:
        """Ready for the first window.

        Args:
            window_tokens: predicted tokens of each window.
            read: what was recorded of a window; each is asked for once, in order.
        """
        self._window_tokens = window_tokens
        self._read = read
        self._next = 0  # the window to be read next
        self._held: list[TopTokens] = []  # read, but not yet compared
        self._divergences: list[torch.Tensor] = []
        self._agreements: list[torch.Tensor] = []

    def __call__(self, chunk: LogitChunk) -> None:
        """Take the next chunk, which may lie in several windows."""
        size = len(chunk.best_N)
        while sum(len(part.rest_N) for part in self._held) < size:
            self._held.append(self._read(self._next))
            self._next += 1
        held = TopTokens.joined(self._held)
        divergence_N, agreement_N = token_divergence(held.rows(0, size), chunk)
        self._divergences.append(divergence_N)
        self._agreements.append(agreement_N)
        self._held = [held.rows(size, len(held.rest_N))]

    def result(self) -> DivergenceResult:
        """Means and their standard errors, once every window was observed."""
        kls, agreements = (
            [float(part.mean()) for part in torch.split(torch.cat(found), list(self._window_tokens))]
            for found in (self._divergences, self._agreements)
        )
        with np.errstate(all="ignore"):  # infinity and nan are results
            kl, kl_spread = mean_and_spread(kls, self._window_tokens)
            top1, top1_spread = mean_and_spread(agreements, self._window_tokens)
        root = math.sqrt(len(kls))
        return DivergenceResult(
            kl_divergence=kl,
            kl_stderr=None if kl_spread is None else kl_spread / root,
            top1_agreement=top1,
            top1_stderr=None if top1_spread is None else top1_spread / root,
            window_kls=kls,
            window_agreements=agreements,
            num_tokens=sum(self._window_tokens),
        )
