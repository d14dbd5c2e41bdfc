import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from evaluators.corpora import PADDING, Corpus, cut_of, evaluation_windows
from evaluators.errors import EvaluationError
from evaluators.perplexity import mean_and_spread, perplexity, summarize, window_tokens


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


@pytest.mark.parametrize(
    "cut", [{"tail": "keep"}, {"bos": "per_window"}, {"bos": "per_window", "tail": "keep"}, {"joiner": " "}]
)
def test_recipes_equal_a_plain_computation(model, tokenizer, tmp_path, cut):
    """The mean over tokens, from the text and full logits, in float64."""
    documents = ["The house by the sea. " * 9, "Nobody came for years, and then two did at once. " * 5]
    (tmp_path / "some.txt").write_text("\n\n".join(documents))
    corpus = Corpus(path=str(tmp_path / "some.txt"))
    windows = evaluation_windows(corpus, tokenizer, sequence_length=32, max_windows=None, cut=cut_of(corpus, **cut))

    ids = tokenizer(cut.get("joiner", "\n\n").join(documents), add_special_tokens=False)["input_ids"]
    start = [tokenizer.bos_token_id] if "bos" in cut else []
    step = 32 - len(start)
    pieces = [start + ids[at : at + step] for at in range(0, len(ids), step)]
    assert 2 < len(pieces[-1]) < 32  # there is a tail
    if "tail" not in cut:
        pieces = pieces[:-1]
    total = count = 0
    for piece in pieces:
        with torch.inference_mode():
            table = model(input_ids=torch.tensor([piece])).logits[0].double().log_softmax(-1)
        total -= sum(table[at - 1, piece[at]].item() for at in range(1, len(piece)))
        count += len(piece) - 1
    for batch_size in (1, 3):
        found = perplexity(model, windows, batch_size=batch_size)
        assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
        assert (found.num_tokens, found.num_windows) == (count, len(pieces))


@pytest.mark.parametrize("options", [{}, {"chunk_bytes": 4 * 300 * 9}, {"batch_size": 2}])
def test_whoever_observes_is_shown_the_logits_of_every_predicted_token_once(small_model, windows, options):
    windows = windows.copy()
    windows[-1, 20:] = PADDING
    shown = []
    observed = perplexity(
        small_model, windows, observe=lambda chunk: shown.append((chunk.start, chunk.logits_NV.clone())), **options
    )
    assert observed == perplexity(small_model, windows, **options)
    assert [start for start, _ in shown] == np.cumsum([0, *(len(logits) for _, logits in shown[:-1])]).tolist()
    with torch.inference_mode():
        expected = [small_model(input_ids=torch.tensor(row[row != PADDING])[None]).logits[0, :-1] for row in windows]
    torch.testing.assert_close(torch.cat([logits for _, logits in shown]), torch.cat(expected), atol=1e-4, rtol=0)
    assert window_tokens(windows) == [32, 32, 32, 32, 19]


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


def test_standard_error_of_windows_of_other_lengths():
    # the ratio estimate by hand: weights 2/5, 2/5, 1/5
    found = summarize([1.0, 2.0, 4.0], num_tokens=5, tokens=[2, 2, 1])
    error = math.sqrt(3 / 2 * ((0.4 * -1) ** 2 + 0 + (0.2 * 2) ** 2))
    assert found.perplexity == pytest.approx(math.exp(2))
    assert found.stderr == pytest.approx(math.exp(2) * error)
    values = [1.0, 2.5, 4.0]
    assert mean_and_spread(values, [7, 7, 7]) == mean_and_spread(values)
    # and it does not jump where one window is a token shorter
    assert mean_and_spread(values, [10**9, 10**9, 10**9 - 1]) == pytest.approx(mean_and_spread(values))
    assert mean_and_spread([2.0], [7]) == (2.0, None)


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
        (np.array([[1, 2, PADDING], [1, 2, 3]]), "token ids from -1 to 3"),
        (np.array([[1, 2, 3], [1, PADDING, 3]]), "the last window holds 2 tokens before its padding"),
        (np.array([[1, 2, 3], [1, PADDING, PADDING]]), "the last window holds 1 tokens before its padding"),
        (np.array([[1, 2, 3], [1, -2, PADDING]]), "token ids from -2 to 3"),
        (np.full((1, 8), 300), "token ids from 300 to 300, but the model has 300"),
    ],
)
def test_windows_refused(small_model, bad, message):
    with pytest.raises(EvaluationError, match=message):
        perplexity(small_model, bad)


def test_batch_size_refused(small_model, windows):
    with pytest.raises(EvaluationError, match="batch_size = 0"):
        perplexity(small_model, windows, batch_size=0)
