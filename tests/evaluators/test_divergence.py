"""Divergence from a reference: exact where all tokens are kept, a lower bound where they are not."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.corpora import PADDING
from evaluators.divergence import Comparison, Recorder, TopTokens, token_divergence, token_losses, top_tokens
from evaluators.head import LogitChunk
from evaluators.perplexity import perplexity, window_tokens

VOCABULARY = 300


@pytest.fixture(scope="module")
def windows():
    found = np.random.default_rng(0).integers(0, VOCABULARY, size=(4, 33))
    found[-1, 20:] = PADDING
    return found


@pytest.fixture(scope="module")
def other_model(small_model):
    """The small model with noise on its weights."""
    changed = copy.deepcopy(small_model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return changed


def recorded(model, windows, *, k=512, **options):
    found = {}
    perplexity(model, windows, observe=Recorder(window_tokens(windows), found.__setitem__, k=k), **options)
    assert list(found) == list(range(len(windows)))
    return found


def compared(reference, model, windows, **options):
    comparison = Comparison(window_tokens(windows), reference.__getitem__)
    perplexity(model, windows, observe=comparison, **options)
    return comparison.result()


def plain(reference, model, windows):
    """Per window KL and agreement from full float64 log-softmaxes."""
    kls, agreements = [], []
    with torch.inference_mode():
        for row in windows:
            ids = torch.tensor(row[row != PADDING])[None]
            log_p, log_q = (one(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for one in (reference, model))
            kls.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
            agreements.append((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())
    return kls, agreements


def test_all_tokens_kept_equals_a_plain_computation(small_model, other_model, windows):
    found = compared(recorded(small_model, windows), other_model, windows)
    kls, agreements = plain(small_model, other_model, windows)
    assert min(kls) > 0.01
    assert 0.1 < np.mean(agreements) < 0.99
    assert found.window_kls == pytest.approx(kls, rel=1e-5)
    assert found.window_agreements == pytest.approx(agreements)
    weights = np.array([32, 32, 32, 19]) / 115
    assert found.kl_divergence == pytest.approx(weights @ kls, rel=1e-5)
    assert found.top1_agreement == pytest.approx(weights @ agreements)
    error = math.sqrt(4 / 3 * ((weights * (kls - weights @ kls)) ** 2).sum())
    assert found.kl_stderr == pytest.approx(error, rel=1e-3)
    assert found.num_tokens == 115


def test_one_forward_gives_the_same_perplexity(small_model, other_model, windows):
    reference = recorded(small_model, windows)
    calls = []
    hook = other_model.model.register_forward_hook(lambda *_: calls.append(1))
    observed = perplexity(other_model, windows, observe=Comparison(window_tokens(windows), reference.__getitem__))
    hook.remove()
    assert len(calls) == len(windows) + 2  # two for the check of the split model's parts
    assert observed == perplexity(other_model, windows)


@pytest.mark.parametrize("k", [5, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_does_not_diverge_from_itself(make_llama, windows, k, dtype):
    model = make_llama(vocab_size=VOCABULARY).to(dtype)
    found = compared(recorded(model, windows, k=k), model, windows)
    assert found.kl_divergence == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    assert found.kl_stderr == pytest.approx(0, abs=1e-6)


def test_more_tokens_come_closer_from_below(small_model, other_model, windows):
    exact = np.array(plain(small_model, other_model, windows)[0])
    found = [
        np.array(compared(recorded(small_model, windows, k=k), other_model, windows).window_kls)
        for k in (1, 4, 16, 64, 299, 300)
    ]
    for fewer, more in itertools.pairwise(found):
        assert (fewer <= more + 1e-9).all()
    assert (found[0] < 0.9 * exact).all()
    np.testing.assert_allclose(found[-1], exact, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"chunk_bytes": 1}, {"chunk_bytes": 4 * VOCABULARY * 9}, {"batch_size": 2}, {"batch_size": 3}]
)
def test_chunks_and_batches_do_not_matter(small_model, other_model, windows, options):
    plainly = compared(recorded(small_model, windows, k=20), other_model, windows)
    assert compared(recorded(small_model, windows, k=20), other_model, windows, **options).window_kls == pytest.approx(
        plainly.window_kls, abs=1e-5
    )
    reference = recorded(small_model, windows, k=20, **options)
    found = compared(reference, other_model, windows)
    assert found.window_kls == pytest.approx(plainly.window_kls, abs=1e-5)
    assert found.window_agreements == plainly.window_agreements
    assert [len(reference[index].rest_N) for index in range(4)] == window_tokens(windows)


def test_a_broken_model_is_a_result(small_model, make_llama, windows):
    broken = make_llama(vocab_size=VOCABULARY)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    found = compared(recorded(small_model, windows), broken, windows)
    assert math.isnan(found.kl_divergence)
    assert math.isnan(found.top1_agreement)
    assert all(math.isnan(value) for value in found.window_kls + found.window_agreements)
    # and as a reference
    assert math.isnan(compared(recorded(broken, windows, k=7), small_model, windows).kl_divergence)


# single positions


def chunk_of(logits):
    logits = torch.as_tensor(logits, dtype=torch.float32).clone()
    return LogitChunk(start=0, logits_NV=logits, normalizer_N=logits.logsumexp(1), best_N=logits.argmax(1))


def divergence_of(p, q, k):
    return token_divergence(top_tokens(chunk_of(p), k), chunk_of(q))


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=12, max_size=12)


@settings(max_examples=200)
@given(p=LOGITS, q=LOGITS)
def test_never_negative_never_more_than_the_whole_and_growing_with_k(p, q):
    log_p, log_q = (torch.tensor([one], dtype=torch.float64).log_softmax(1) for one in (p, q))
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    found = [divergence_of([p], [q], k)[0].item() for k in range(1, 14)]
    slack = 1e-5 * (1 + exact)
    assert min(found) >= -1e-12
    assert all(less <= more + slack for less, more in itertools.pairwise(found))
    assert max(found) <= exact + slack
    assert found[11] == found[12] == pytest.approx(exact, abs=slack)


def test_what_is_missing_is_the_divergence_within_the_rest():
    p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.4, 0.3, 0.1, 0.2])
    found, agrees = divergence_of(np.log([p]), np.log([q]), 2)
    exact, within = (p * np.log(p / q)).sum(), 0.2 * (p[2:] / 0.2 * np.log(p[2:] / 0.2 / (q[2:] / 0.3))).sum()
    assert found.item() == pytest.approx(exact - within, rel=1e-5)
    assert agrees.item() == 1


def test_a_small_divergence_is_not_lost_in_rounding():
    """Of two 8-bit models' size, over a vocabulary whose normalizer is rounded to 2e-6."""
    generator = torch.Generator().manual_seed(0)
    logits = 20 + 3 * torch.randn(64, 50_000, generator=generator)
    changed = logits + 1e-3 * torch.randn(64, 50_000, generator=generator)
    log_p, log_q = (one.double().log_softmax(1) for one in (logits, changed))
    exact = (log_p.exp() * (log_p - log_q)).sum(1)
    assert exact.mean() < 1e-6
    found, _ = divergence_of(logits, changed, 50_000)
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([0.0, 0.0, -math.inf], [0.0, 0.0, 0.0], math.log(1.5)),  # what the reference rules out costs nothing by itself
        ([0.0, 0.0, 0.0], [0.0, 0.0, -math.inf], math.inf),
        ([0.0, 0.0, 0.0], [0.0, 0.0, math.nan], math.nan),
        ([0.0, 0.0, math.nan], [0.0, 0.0, 0.0], math.nan),
    ],
)
@pytest.mark.parametrize("k", [2, 3])
def test_probabilities_of_zero_and_what_is_no_number(p, q, expected, k):
    found, agrees = divergence_of([p], [q], k)
    assert found.item() == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert agrees.isnan().item() == math.isnan(expected)


@settings(max_examples=200)
@given(p=LOGITS, q=LOGITS, k=st.integers(1, 12), target=st.integers(0, 11))
def test_both_losses_at_once_are_those_of_each(p, q, k, target):
    reference, logits = top_tokens(chunk_of([p]), k), torch.tensor([q])
    divergence_N, nll_N = token_losses(reference, logits.clone(), torch.tensor([target]))
    expected, _ = token_divergence(reference, chunk_of([q]))
    torch.testing.assert_close(divergence_N, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll_N, -logits.double().log_softmax(1)[:, target], rtol=1e-5, atol=1e-5)
    assert divergence_N.item() >= -1e-12


def test_both_losses_at_once_of_what_is_no_number_and_of_nothing_left():
    p = np.array([0.5, 0.3, 0.2])
    reference, target = top_tokens(chunk_of(np.log([p])), 2), torch.tensor([0])
    divergence_N, nll_N = token_losses(reference, torch.tensor([[0.0, 0.0, math.nan]]), target)
    assert math.isnan(divergence_N.item())
    assert math.isnan(nll_N.item())
    # A rest that float32 has no number for counts as the least that it has one for, 1.2e-38.
    divergence_N, _ = token_losses(reference, torch.tensor([[0.0, 0.0, -200.0]]), target)
    q = np.array([0.5, 0.5, torch.finfo(torch.float32).tiny / 2])
    assert divergence_N.item() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    # A kept token's own is not cut off.
    divergence_N, _ = token_losses(reference, torch.tensor([[0.0, -200.0, 0.0]]), target)
    expected, _ = token_divergence(reference, chunk_of([[0.0, -200.0, 0.0]]))
    assert divergence_N.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_kept():
    kept = top_tokens(chunk_of(np.log([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])), 2)
    assert [part.dtype for part in kept.parts] == [torch.int32, torch.float32, torch.float32, torch.int32]
    assert kept.ids_NK[0].tolist() == [1, 2]
    assert kept.log_probabilities_NK[0].exp().tolist() == pytest.approx([0.4, 0.3])
    assert kept.rest_N.exp().tolist() == pytest.approx([0.3, 0.5])
    assert kept.best_N.tolist() == [1, 0]
    whole = top_tokens(chunk_of(np.log([[0.5, 0.5]])), 512)
    assert whole.rest_N.tolist() == [-math.inf]
    assert TopTokens.joined([kept, kept]).rows(1, 3).best_N.tolist() == [0, 1]


def test_never_all_logits_of_a_window_at_once(make_llama):
    """The largest logits that the head is asked for stay within the chunk, for the reference as for the model."""
    model = make_llama(vocab_size=20_000)
    asked = []
    model.get_output_embeddings().register_forward_hook(lambda *of: asked.append(of[2].numel()))
    windows = np.random.default_rng(0).integers(0, 20_000, size=(2, 257))
    chunk_bytes = 4 * 20_000 * 30
    reference = recorded(model, windows, k=64, chunk_bytes=chunk_bytes)
    compared(reference, model, windows, chunk_bytes=chunk_bytes)
    assert max(asked) == 20_000 * 30
    assert sum(asked) == 2 * (2 * 256 + 2 * 8) * 20_000  # and every position once, besides the check of the parts
