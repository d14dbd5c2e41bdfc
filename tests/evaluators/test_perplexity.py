import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from evaluators.corpora import Corpus, evaluation_windows
from evaluators.errors import EvaluationError
from evaluators.perplexity import perplexity, summarize


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, 300, size=(5, 33))


def plain_nlls(model, windows):
    """Per-window mean cross-entropy from full logits."""
    with torch.inference_mode():
        return [
            functional.cross_entropy(model(input_ids=row[None]).logits[0, :-1].float(), row[1:]).item()
            for row in torch.tensor(windows)
        ]


def test_equals_a_plain_computation(small_model, windows):
    nlls = plain_nlls(small_model, windows)
    found = perplexity(small_model, windows)
    assert found.perplexity == pytest.approx(math.exp(np.mean(nlls)), rel=1e-5)
    assert found.window_nlls == pytest.approx(nlls, abs=1e-5)
    assert (found.num_tokens, found.num_windows) == (5 * 32, 5)


def test_equals_a_plain_computation_on_real_text(model, tokenizer):
    windows = evaluation_windows(Corpus(name="boolq-passages"), tokenizer, sequence_length=128, max_windows=2)
    found = perplexity(model, windows)
    assert math.log(found.perplexity) == pytest.approx(np.mean(plain_nlls(model, windows)), rel=1e-5)


@pytest.mark.parametrize("options", [{"chunk_bytes": 1}, {"chunk_bytes": 4 * 300 * 9}, {"batch_size": 2}])
def test_chunks_and_batches_do_not_matter(small_model, windows, options):
    found = perplexity(small_model, windows, **options)
    assert found.window_nlls == pytest.approx(perplexity(small_model, windows).window_nlls, abs=1e-5)


def test_is_deterministic(small_model, windows):
    assert perplexity(small_model, windows) == perplexity(small_model, windows)


def test_the_model_runs_in_its_own_dtype(make_llama, windows):
    model = make_llama(vocab_size=300).bfloat16()
    assert perplexity(model, windows).window_nlls == pytest.approx(plain_nlls(model, windows), abs=2e-2)


def test_standard_error_by_the_delta_method():
    found = summarize([1.0, 2.0, 4.0], num_tokens=3)
    assert found.perplexity == pytest.approx(math.exp(7 / 3))
    assert found.stderr == pytest.approx(math.exp(7 / 3) * np.std([1, 2, 4], ddof=1) / math.sqrt(3))
    assert summarize([1.0], num_tokens=1).stderr is None


def test_non_finite_values_are_results(make_llama, windows):
    assert summarize([800.0, 800.0], num_tokens=2).perplexity == math.inf
    assert summarize([math.inf, 1.0], num_tokens=2).perplexity == math.inf
    model = make_llama(vocab_size=300)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    found = perplexity(model, windows)
    assert math.isnan(found.perplexity)
    assert all(math.isnan(nll) for nll in found.window_nlls)


def test_progress(small_model, windows):
    calls = []
    perplexity(small_model, windows, batch_size=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((1, 8), np.int32), "they must be int64"),
        (np.zeros(8, np.int64), "they must be int64"),
        (np.zeros((0, 8), np.int64), "they must be int64"),
        (np.zeros((1, 1), np.int64), "they must be int64"),
        (np.zeros((1, 65), np.int64), "sequence_length 65 is longer than the model's context of 64"),
        (np.full((1, 8), 300), "token ids from 300 to 300, but the model has 300"),
    ],
)
def test_windows_refused(small_model, bad, message):
    with pytest.raises(EvaluationError, match=message):
        perplexity(small_model, bad)


def test_batch_size_refused(small_model, windows):
    with pytest.raises(EvaluationError, match="batch_size = 0"):
        perplexity(small_model, windows, batch_size=0)
