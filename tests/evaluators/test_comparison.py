"""Every statistic against something that is not it: closed forms, scipy, enumeration, and what it promises."""

import itertools
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evaluators import comparison
from evaluators.comparison import (
    Flips,
    Interval,
    Scores,
    bootstrap_difference,
    chance_test,
    flip_interval,
    flips,
    holm,
    mcnemar,
    pair,
    perplexity_ratio,
    wilson_interval,
)
from evaluators.errors import EvaluationError

right_or_wrong = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=40)
nlls = st.lists(st.floats(-20, 20, allow_subnormal=False), min_size=2, max_size=40)


def two_of(values):
    """Two evaluations of as many documents."""
    return values.flatmap(lambda first: st.tuples(st.just(first), st.permutations(first)))


def scores(ids, values):
    return Scores(np.array(ids, dtype=np.int64), np.array(values, dtype=float))


def floats(values):
    return np.array(values, dtype=float)


# Pairing


def test_documents_are_paired_by_id_whatever_their_order():
    before, after = pair(scores([7, 2, 5], [0.7, 0.2, 0.5]), scores([5, 7, 2], [5, 7, 2]))
    assert before.tolist() == [0.2, 0.5, 0.7]
    assert after.tolist() == [2, 5, 7]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([1, 2, 3], [2, 3], r"1 in the first alone \(such as 1\)"),
        ([1], [1, 8, 9], r"2 in the second alone \(such as 8\)"),
        ([1, 2], [2, 3], r"1 in the first alone \(such as 1\) and 1 in the second alone \(such as 3\)"),
        ([1, 1], [1, 1], "scored twice"),
        ([1, 2], [1, 1], "scored twice"),
    ],
)
def test_other_documents_are_refused_and_never_left_out(first, second, said):
    with pytest.raises(EvaluationError, match=said) as caught:
        pair(scores(first, first), scores(second, second))
    assert "\n" not in str(caught.value)


# Flips and McNemar


def test_flips_are_counted():
    assert flips(floats([1, 1, 0, 0, 1]), floats([1, 0, 1, 1, 0])) == Flips(gained=2, lost=2, items=5)


@pytest.mark.parametrize("values", [[0.5, 1.0], [math.nan, 1.0], [2.0, 0.0]])
def test_flips_of_what_is_neither_right_nor_wrong_are_refused(values):
    with pytest.raises(EvaluationError, match="right"):
        flips(floats([0, 1]), floats(values))


@pytest.mark.parametrize("lengths", [(2, 3), (1, 2), (0, 0)])
@pytest.mark.parametrize("statistic", [flips, bootstrap_difference, perplexity_ratio])
def test_only_pairs_are_compared(statistic, lengths):
    """numpy would stretch a single score over all others."""
    with pytest.raises(EvaluationError, match="cannot be paired"):
        statistic(*(np.zeros(length) for length in lengths))


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 0.0625), (5, 0, 0.0625), (1, 7, 2 * 9 / 256), (3, 3, 1.0), (0, 11, 2 / 2048)],
)
def test_mcnemar_by_hand(gained, lost, p_value):
    assert mcnemar(Flips(gained, lost, 100)) == pytest.approx(p_value, rel=1e-12)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_test_of_half(gained, lost):
    wanted = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar(Flips(gained, lost, 1000)) == pytest.approx(wanted, rel=1e-9)


def test_mcnemar_of_thousands_neither_overflows_nor_vanishes():
    wanted = stats.binomtest(2600, 6000, 0.5).pvalue
    assert 0 < mcnemar(Flips(2600, 3400, 14042)) == pytest.approx(wanted, rel=1e-8)


@given(two_of(right_or_wrong))
def test_turning_the_comparison_round_turns_its_signs(pairs):
    before, after = map(floats, pairs)
    there, back = flips(before, after), flips(after, before)
    assert (there.gained, there.lost) == (back.lost, back.gained)
    assert mcnemar(there) == mcnemar(back)
    assert flip_interval(there).low == pytest.approx(-flip_interval(back).high, abs=1e-15)


# The same cell against itself


@given(right_or_wrong)
def test_nothing_differs_from_itself(values):
    values = floats(values)
    found = flips(values, values)
    assert (found.gained, found.lost, mcnemar(found)) == (0, 0, 1.0)
    assert bootstrap_difference(values, values) == Interval(0.0, 0.0, 0.0)
    assert flip_interval(found).contains(0.0)


@given(nlls)
def test_the_ratio_to_itself_is_exactly_one(values):
    assert perplexity_ratio(floats(values), floats(values)) == Interval(1.0, 1.0, 1.0)


# Wilson


@pytest.mark.parametrize(("successes", "items"), [(0, 7), (7, 7), (1, 1), (117, 200), (3, 10), (14042, 14042)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_is_scipys(successes, items, confidence):
    wanted = stats.binomtest(successes, items).proportion_ci(confidence, method="wilson")
    found = wilson_interval(successes, items, confidence=confidence)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert found.value == successes / items
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.62])
def test_wilson_covers_what_it_says(share):
    """No simulation: the probability of every outcome whose interval holds the true share."""
    intervals = [wilson_interval(successes, 200) for successes in range(201)]
    chances = stats.binom.pmf(range(201), 200, share)
    covered = sum(chance for chance, found in zip(chances, intervals, strict=True) if found.contains(share))
    assert 0.93 < covered < 0.97


def test_the_documents_numbers_on_resolution():
    """What docs/statistics.md says of 200 items."""
    found = wilson_interval(100, 200)
    assert (found.high - found.low) / 2 / 1.96 == pytest.approx(0.035, abs=0.001)
    assert flip_interval(Flips(0, 0, 200)).high == pytest.approx(0.0188, abs=1e-4)
    smallest = next(items for items in range(1, 1000) if flip_interval(Flips(0, 0, items)).high <= 0.01)
    assert smallest == 381


@pytest.mark.parametrize(("successes", "items"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_share(successes, items):
    with pytest.raises(EvaluationError, match="not a share"):
        wilson_interval(successes, items)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_lies_between_nothing_and_certainty(confidence):
    with pytest.raises(EvaluationError, match="between 0 and 1"):
        wilson_interval(1, 2, confidence=confidence)


# The interval from flip rates


def test_flip_interval_without_gains_is_wilsons_of_the_losses():
    """With a rate of gains of 0 [0, u], square-and-add is Wilson's lower arm, and the upper one with u added."""
    found, lost = flip_interval(Flips(0, 6, 200)), wilson_interval(6, 200)
    nothing = 1.96**2 / (200 + 1.96**2)
    assert found.value == -0.03
    assert found.low == pytest.approx(-lost.high, abs=1e-12)
    assert found.high == pytest.approx(-0.03 + math.hypot(nothing, 0.03 - lost.low), abs=1e-6)


@pytest.mark.parametrize(("gain", "loss"), [(0.0, 0.01), (0.0, 0.05), (0.02, 0.05), (0.1, 0.15)])
def test_flip_interval_covers_what_it_says(gain, loss):
    """Enumerated over the trinomial of 100 items; the bootstrap's falls far short where flips are rare."""
    covered = 0.0
    for gained, lost in itertools.product(range(40), range(50)):
        chance = stats.multinomial.pmf([gained, lost, 100 - gained - lost], 100, [gain, loss, 1 - gain - loss])
        if chance > 1e-9 and flip_interval(Flips(gained, lost, 100)).contains(gain - loss):
            covered += chance
    assert 0.93 < covered <= 1


# The paired bootstrap


def enumerated(values):
    """The bootstrap distribution of the mean itself: all N**N equally likely resamples."""
    return np.array([np.mean(drawn) for drawn in itertools.product(values, repeat=len(values))])


@pytest.mark.parametrize("values", [[0.0, 1.0, 0.0, -1.0, -1.0], [0.3, -0.2, 1.7, 0.9, 0.1, -2.0]])
@pytest.mark.parametrize("categories", [0, 16])
def test_bootstrap_quantiles_are_those_of_all_resamples(monkeypatch, values, categories):
    """Both ways of drawing: items one by one, and how often each value comes."""
    monkeypatch.setattr(comparison, "_MOST_CATEGORIES", categories)
    monkeypatch.setattr(comparison, "_expanded_tail", lambda items, confidence: 0.1)
    everything = np.sort(enumerated(values))
    found = bootstrap_difference(np.zeros(len(values)), floats(values), resamples=40_000)
    assert found.value == pytest.approx(np.mean(values))
    for end, share in ((found.low, 0.1), (found.high, 0.9)):
        # The share of all resamples below the end is the wanted one: 4 standard errors of 40,000 draws, and one atom.
        below, upto = np.mean(everything < end - 1e-9), np.mean(everything <= end + 1e-9)
        assert below - 0.006 <= share <= upto + 0.006


def test_bootstrap_agrees_with_scipys():
    random = np.random.default_rng(3)
    before = random.normal(size=40)
    after = before + random.normal(0.3, 0.5, size=40)
    confidence = 0.9
    tail = comparison._expanded_tail(40, confidence)
    wanted = stats.bootstrap(
        (after - before,), np.mean, confidence_level=1 - 2 * tail, n_resamples=20_000, method="percentile", rng=random
    )
    found = bootstrap_difference(before, after, confidence=confidence, resamples=20_000)
    width = found.high - found.low
    assert found.low == pytest.approx(wanted.confidence_interval.low, abs=0.03 * width)
    assert found.high == pytest.approx(wanted.confidence_interval.high, abs=0.03 * width)


def test_bootstrap_is_deterministic_and_its_seed_matters():
    before, after = np.random.default_rng(0).normal(size=(2, 30))
    assert bootstrap_difference(before, after) == bootstrap_difference(before, after)
    assert bootstrap_difference(before, after) != bootstrap_difference(before, after, seed=1)


@given(two_of(nlls))
def test_bootstrap_turned_round_is_its_mirror_image(pairs):
    before, after = map(floats, pairs)
    there = bootstrap_difference(before, after, resamples=500)
    back = bootstrap_difference(after, before, resamples=500)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-12)
    ratio, inverse = (perplexity_ratio(*both, resamples=500) for both in ((before, after), (after, before)))
    assert ratio.low == pytest.approx(1 / inverse.high, rel=1e-9)


def test_student_by_expansion():
    for freedom in (3, 4, 7, 15, 100, 14_041):
        wanted = stats.t.ppf(0.975, freedom)
        assert comparison._student(freedom, 0.95) == pytest.approx(wanted, rel=0.01 if freedom < 5 else 0.001)


def test_expanded_percentiles_make_a_normal_sample_as_wide_as_student():
    values = np.random.default_rng(5).normal(size=16)
    found = bootstrap_difference(np.zeros(16), values, resamples=100_000)
    wanted = 2 * stats.t.ppf(0.975, 15) * values.std(ddof=1) / 4
    assert found.high - found.low == pytest.approx(wanted, rel=0.05)


def covered(draw, truth, *, trials, resamples=2000):
    """Share of made-up experiments whose interval holds the truth."""
    random = np.random.default_rng(11)
    intervals = [bootstrap_difference(*draw(random), resamples=resamples) for _ in range(trials)]
    return np.mean([found.contains(truth) for found in intervals])


@pytest.mark.parametrize("windows", [8, 16, 64])
def test_bootstrap_of_windows_covers_what_it_says(windows):
    """Windows differ a lot and are hit alike: with few windows too. 4 standard errors of 500 trials are 0.039."""

    def draw(random):
        base = random.normal(3, 0.3, size=windows)
        return base, base + random.normal(0.15, 0.03, size=windows)

    assert 0.905 < covered(draw, 0.15, trials=500) < 0.985


def test_bootstrap_of_flips_covers_what_it_says():
    def draw(random):
        change = random.choice([1.0, -1.0, 0.0], size=200, p=[0.05, 0.09, 0.86])
        return np.where(change < 0, 1.0, 0.0), np.where(change > 0, 1.0, 0.0)

    assert 0.905 < covered(draw, -0.04, trials=500) < 0.985


def test_bootstrap_of_all_of_mmlu_stays_small():
    """10,000 resamples of 14,042 items would be a gigabyte of indices at once."""
    before, after = np.random.default_rng(0).normal(size=(2, 14_042))
    tracemalloc.start()
    bootstrap_difference(before, after, resamples=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_one_document_has_no_interval():
    found = bootstrap_difference(floats([0.0]), floats([1.0]))
    assert found.value == 1
    assert not found.known
    assert not found.contains(1)
    assert not found.within(-9, 9)


@pytest.mark.parametrize(
    ("before", "after", "value"),
    [
        ([2.0, 3.0], [math.inf, 3.0], math.inf),
        ([math.inf, 3.0], [2.0, 3.0], 0.0),
        ([2.0, 3.0], [math.nan, 3.0], math.nan),
        ([math.inf, 3.0], [math.inf, 3.0], math.nan),
    ],
)
def test_a_non_finite_window_makes_the_ratio_what_arithmetic_makes_of_it(before, after, value):
    found = perplexity_ratio(floats(before), floats(after))
    assert found.value == pytest.approx(value, nan_ok=True)
    assert not found.known


def test_a_ratio_beyond_all_numbers_is_infinite():
    assert perplexity_ratio(np.zeros(2), floats([800.0, 900.0])).value == math.inf


def test_ratio_is_that_of_the_perplexities():
    before, after = np.random.default_rng(1).normal(3, 0.2, size=(2, 16))
    wanted = math.exp(after.mean()) / math.exp(before.mean())
    assert perplexity_ratio(before, after).value == pytest.approx(wanted, rel=1e-12)


# Guessing


def by_enumeration(correct, choices):
    """Two-sided p by going through every way of being right and wrong, in fractions."""
    chances = [Fraction(0)] * (len(choices) + 1)
    for rights in itertools.product([True, False], repeat=len(choices)):
        chance = Fraction(1)
        for right, size in zip(rights, choices, strict=True):
            chance *= Fraction(1, size) if right else Fraction(size - 1, size)
        chances[sum(rights)] += chance
    return float(min(1, 2 * min(sum(chances[: correct + 1]), sum(chances[correct:]))))


@pytest.mark.parametrize("choices", [[2], [4, 4, 4], [3, 4, 5, 4, 4], [2, 2, 4, 4, 3, 5, 2]])
def test_chance_is_what_enumeration_finds(choices):
    for correct in range(len(choices) + 1):
        assert chance_test(correct, np.array(choices)) == pytest.approx(by_enumeration(correct, choices), rel=1e-12)


@pytest.mark.parametrize("correct", [480, 500, 560])
def test_chance_of_two_choices_is_scipys_binomial_test(correct):
    assert chance_test(correct, np.full(1000, 2)) == pytest.approx(stats.binomtest(correct, 1000).pvalue, rel=1e-9)


@given(st.integers(0, 200))
def test_chance_of_four_choices_doubles_the_smaller_tail(correct):
    wanted = 2 * min(stats.binom.cdf(correct, 200, 0.25), stats.binom.sf(correct - 1, 200, 0.25))
    assert chance_test(correct, np.full(200, 4)) == pytest.approx(min(1, wanted), rel=1e-9)


def test_chance_of_mixed_choices_is_scipys_poisson_binomial():
    choices = np.array([3] * 40 + [4] * 1100 + [5] * 32)  # as ARC has them
    guessing = stats.poisson_binom(1 / choices)
    for correct in (250, 293, 330):
        wanted = min(1, 2 * min(guessing.cdf(correct), guessing.sf(correct - 1)))
        assert chance_test(correct, choices) == pytest.approx(wanted, rel=1e-6)


def test_chance_rejects_guessers_no_more_often_than_it_says():
    p_values = np.array([chance_test(correct, np.full(200, 4)) for correct in range(201)])
    assert stats.binom.pmf(range(201), 200, 0.25)[p_values < 0.05].sum() <= 0.05


@pytest.mark.parametrize(("correct", "choices"), [(0, []), (0, [1, 4]), (3, [4, 4]), (-1, [4])])
def test_what_cannot_be_guessed_is_refused(correct, choices):
    with pytest.raises(EvaluationError, match="guessing"):
        chance_test(correct, np.array(choices, dtype=np.int64))


# Holm


def closed_testing(p_values):
    """Holm from first principles: the worst Bonferroni p-value of all families that a hypothesis belongs to."""
    everyone = range(len(p_values))
    families = [family for size in everyone for family in itertools.combinations(everyone, size + 1)]
    return [
        max(
            min(1.0, len(family) * min(p_values[member] for member in family)) for family in families if index in family
        )
        for index in everyone
    ]


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_closed_bonferroni_testing(p_values):
    assert holm(p_values) == pytest.approx(closed_testing(p_values))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []
