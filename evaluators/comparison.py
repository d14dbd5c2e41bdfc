"""Paired statistics of evaluations on the same documents, and what an accuracy alone can say. Pure; numpy alone.

Everything is conditional on the documents being a sample of the ones that matter: nothing here knows of prompts, seeds
of calibration, or data that was seen in training. Shape letters: N items, R resamples.

Non-finite values are results. A mean or a ratio that they enter is what arithmetic makes of it (infinite or nan), and
its interval is nan: there is none. Accuracies are 0 or 1; what an item without an answer counts as is the caller's
business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from evaluators.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float64]
    Ints: TypeAlias = npt.NDArray[np.int64]

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0

# Differences of accuracies have three values and of half-credits five; beyond this many, drawing items is cheaper.
_MOST_CATEGORIES = 16
# Most resampled items in memory at once: 8 MiB of indices and as much of values.
_CHUNK_ITEMS = 1 << 20


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its confidence interval; the ends are nan where there is none."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    def contains(self, value: float) -> bool:
        """Whether a value lies in the interval, its ends included; never where there is none."""
        return self.low <= value <= self.high

    def within(self, low: float, high: float) -> bool:
        """Whether the whole interval lies between two values; never where there is none."""
        return low <= self.low and self.high <= high


@dataclass(frozen=True)
class Flips:
    """How many of `items` answers changed: `gained` from wrong to right, `lost` from right to wrong."""

    gained: int
    lost: int
    items: int


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one cell on the documents of one task.

    Attributes:
        doc_ids_N: int64, which documents; each once.
        values_N: float64, what each scored.
    """

    doc_ids_N: Ints
    values_N: Floats


def pair(reference: Scores, other: Scores) -> tuple[Floats, Floats]:
    """The values of two evaluations, document by document, in the order of their ids.

    Raises:
        EvaluationError: a document appears twice, or the two did not see the same ones. What they share is not
            compared in its place: it would be another, unnamed set of documents.
    """
    for scores in (reference, other):
        if len(np.unique(scores.doc_ids_N)) != len(scores.doc_ids_N):
            raise EvaluationError("a document is scored twice: scores can only be paired where each stands once")
    missing = np.setdiff1d(reference.doc_ids_N, other.doc_ids_N)
    added = np.setdiff1d(other.doc_ids_N, reference.doc_ids_N)
    if len(missing) or len(added):
        parts = [
            f"{len(ids):,} in the {side} alone (such as {ids[0]})"
            for side, ids in (("first", missing), ("second", added))
            if len(ids)
        ]
        raise EvaluationError(
            f"the documents differ, {' and '.join(parts)}: scores can only be paired on the same ones, "
            "so evaluate both with the same data and limit"
        )
    return (
        reference.values_N[np.argsort(reference.doc_ids_N)],
        other.values_N[np.argsort(other.doc_ids_N)],
    )


def flips(reference_N: Floats, other_N: Floats) -> Flips:
    """Count the answers that changed.

    Args:
        reference_N: 1.0 right, 0.0 wrong.
        other_N: the same documents in the same order.
    """
    before_N, after_N = _right(reference_N), _right(other_N)
    _check_pairs(reference_N, other_N)
    return Flips(
        gained=int(np.count_nonzero(after_N & ~before_N)),
        lost=int(np.count_nonzero(before_N & ~after_N)),
        items=len(before_N),
    )


def mcnemar(found: Flips) -> float:
    """Two-sided p-value of "gains and losses are equally likely", exact given the number of flips.

    Being exact it errs on the side of large values, the more so the fewer flips there are: five losses without a gain
    give 0.0625.

    Source: McNemar 1947, Psychometrika 12(2); the exact form is the sign test on the items that flipped.
    """
    changed = found.gained + found.lost
    tail = _binomial(changed, 0.5)[: min(found.gained, found.lost) + 1].sum()
    return min(1.0, float(2 * tail))


def wilson_interval(successes: int, items: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Score interval of a share; unlike value ± 1.96 standard errors it is never empty and stays within 0 and 1.

    Raises:
        EvaluationError: no items, or more successes than items.
    Source: Wilson 1927, J. Am. Stat. Assoc. 22(158).
    """
    if not 0 <= successes <= items or items == 0:
        raise EvaluationError(f"{successes} of {items} is not a share: at least one item, at most all of them right")
    z2 = _z(confidence) ** 2
    share = successes / items
    centre = (share + z2 / (2 * items)) / (1 + z2 / items)
    half = math.sqrt(z2 * (share * (1 - share) / items + z2 / (4 * items**2))) / (1 + z2 / items)
    # At the ends one bound is exactly the share; rounding must not move it past.
    return Interval(share, 0.0 if successes == 0 else centre - half, 1.0 if successes == items else centre + half)


def flip_interval(found: Flips, *, confidence: float = CONFIDENCE) -> Interval:
    """Interval of a paired difference of accuracies from the Wilson intervals of its two rates of flips.

    Wider than the bootstrap's where there are few flips. No flips at all make the bootstrap's interval [0, 0], though
    200 items without one still allow a true loss of 1.9 points. So a claim that nothing is lost rests on this one too.

    Source: square-and-add, Newcombe 1998, Stat. Med. 17(8), method 10; Zou and Donner 2008, Stat. Med. 27(10), eq. 4.
    The rates of one multinomial are negatively correlated by less than the square of a rate, which is neglected.
    """
    gained = wilson_interval(found.gained, found.items, confidence=confidence)
    lost = wilson_interval(found.lost, found.items, confidence=confidence)
    value = gained.value - lost.value
    return Interval(
        value,
        value - math.hypot(gained.value - gained.low, lost.high - lost.value),
        value + math.hypot(gained.high - gained.value, lost.value - lost.low),
    )


def bootstrap_difference(
    reference_N: Floats,
    other_N: Floats,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """Mean of other - reference with its paired bootstrap interval: whole documents are drawn, with replacement.

    Percentiles of the resampled means, taken a little further out so that few items do not make it too narrow.
    Deterministic; the same seed for every comparison. A single item has no interval.

    Args:
        reference_N: scores.
        other_N: scores of the same documents in the same order.
        confidence: of the interval.
        resamples: how many.
        seed: of PCG64.
    Source: Efron 1979, Ann. Statist. 7(1); expanded percentiles: Hesterberg 2014, arXiv:1411.5279.
    """
    _check_pairs(reference_N, other_N)
    with np.errstate(invalid="ignore"):  # infinity - infinity is a result
        differences_N = other_N - reference_N
        value = float(differences_N.mean())
    if len(differences_N) < 2 or not np.isfinite(differences_N).all():
        return Interval(value, math.nan, math.nan)
    tail = _expanded_tail(len(differences_N), confidence)
    low, high = np.quantile(_resampled_means(differences_N, resamples, seed), [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def perplexity_ratio(
    reference_N: Floats,
    other_N: Floats,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """Perplexity of other / reference with its paired bootstrap interval over windows.

    Windows have one length, so the ratio is exp of the mean difference of their mean negative log-likelihoods.

    Args:
        reference_N: mean negative log-likelihood of each window, nats.
        other_N: the same windows in the same order.
        confidence: of the interval.
        resamples: how many.
        seed: of PCG64.
    """
    found = bootstrap_difference(reference_N, other_N, confidence=confidence, resamples=resamples, seed=seed)
    with np.errstate(over="ignore"):
        value, low, high = np.exp([found.value, found.low, found.high])
    return Interval(float(value), float(low), float(high))


def chance_test(correct: int, choices_N: Ints) -> float:
    """Two-sided p-value of "every answer is a guess among that item's choices", exact.

    Guesses on items with different numbers of choices are a sum of binomials: its distribution is their convolution,
    so nothing is approximated. Two-sided by doubling the smaller tail. A model that always gives the same answer does
    not guess in this sense: it scores as often as that answer is right.

    Args:
        correct: how many items were right.
        choices_N: number of choices of each item, at least 2.
    Raises:
        EvaluationError: no items, an item without a choice, or more right than there are items.
    """
    if len(choices_N) == 0 or choices_N.min() < 2 or not 0 <= correct <= len(choices_N):
        raise EvaluationError(
            f"{correct} right of {len(choices_N)} items cannot be held against guessing: "
            "at least one item, each with at least two choices"
        )
    sizes, counts = np.unique(choices_N, return_counts=True)
    guesses = _guesses(tuple(zip(sizes.tolist(), counts.tolist(), strict=True)))
    return min(1.0, float(2 * min(guesses[: correct + 1].sum(), guesses[correct:].sum())))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that among all of them together a false finding is no likelier than each one says.

    Source: Holm 1979, Scand. J. Statist. 6(2).
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _right(values_N: Floats) -> npt.NDArray[np.bool_]:
    right_N: npt.NDArray[np.bool_] = np.equal(values_N, 1.0)
    if not (right_N | (values_N == 0)).all():
        raise EvaluationError("flips are of answers that are right (1.0) or wrong (0.0): compare other scores by means")
    return right_N


def _check_pairs(reference_N: Floats, other_N: Floats) -> None:
    if len(reference_N) != len(other_N) or len(reference_N) == 0:
        raise EvaluationError(
            f"{len(reference_N)} scores cannot be paired with {len(other_N)}: give the same documents, at least one"
        )


def _resampled_means(values_N: Floats, resamples: int, seed: int) -> Floats:
    """Means of `resamples` draws of N values with replacement."""
    random = np.random.Generator(np.random.PCG64(seed))
    distinct, first, counts = np.unique(values_N, return_index=True, return_counts=True)
    items = len(values_N)
    if len(distinct) <= _MOST_CATEGORIES:
        # How often each value is drawn is multinomial: the same distribution for a thousandth of the work. The order
        # of appearance, unlike that of size, is the same for the negated differences.
        order = np.argsort(first)
        drawn = random.multinomial(items, counts[order] / items, size=resamples)
        return np.asarray(drawn @ distinct[order] / items, dtype=np.float64)
    rows = max(1, _CHUNK_ITEMS // items)
    means = [
        values_N[random.integers(items, size=(min(rows, resamples - start), items))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(means)


def _expanded_tail(items: int, confidence: float) -> float:
    """The percentile that makes a percentile interval as wide as Student's for a normal sample.

    Resampled means spread by sqrt((N-1)/N) too little, and normal quantiles stand in for Student's.
    """
    return NormalDist().cdf(-math.sqrt(items / (items - 1)) * _student(items - 1, confidence))


def _student(freedom: int, confidence: float) -> float:
    """Two-sided quantile of Student's t, within 1% from three degrees of freedom on.

    Source: Abramowitz and Stegun 1964, 26.7.5.
    """
    z = _z(confidence)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise EvaluationError(f"confidence = {confidence} must lie between 0 and 1, such as {CONFIDENCE}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _binomial(trials: int, probability: float) -> Floats:
    """Probabilities of 0 to `trials` successes; from logarithms, so that large numbers do not overflow."""
    successes = np.arange(trials + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(successes[1:]))])
    log_ways = log_factorials[-1] - log_factorials - log_factorials[::-1]
    return np.asarray(
        np.exp(log_ways + successes * math.log(probability) + (trials - successes) * math.log1p(-probability))
    )


@lru_cache(maxsize=64)
def _guesses(groups: tuple[tuple[int, int], ...]) -> Floats:
    """Probabilities of 0 to N right guesses, from (number of choices, number of items) pairs."""
    probabilities = np.ones(1)
    for choices, items in groups:
        # Direct, not by FFT: all terms are positive, so even the smallest tails keep their digits.
        probabilities = np.convolve(probabilities, _binomial(items, 1 / choices))
    probabilities.setflags(write=False)
    return probabilities
