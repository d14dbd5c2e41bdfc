"""What the unquantized model's numbers warn of."""

import numpy as np
import pytest
import torch

from evaluators.gate import bos_warning, chance_warning
from evaluators.harness import Item


def items(right, total, choices=4):
    return [
        Item(doc_id=i, subtask=None, log_likelihoods=[0.0] * choices, target=0, correct={"acc": float(i < right)})
        for i in range(total)
    ]


def test_an_accuracy_that_guessing_gives_is_warned_of():
    assert "right on 27 of 100, which guessing gives as well (p = 0.72)" in chance_warning(items(27, 100))
    assert chance_warning(items(50, 100)) is None
    assert chance_warning(items(50, 100, choices=2)) is not None
    assert chance_warning(items(3, 4)) is not None  # so few items say nothing
    assert chance_warning(items(5, 100)) is None  # far below chance is no guessing


def test_generated_answers_have_no_chance():
    text = Item(doc_id=0, subtask=None, log_likelihoods=[], target=None, correct={"exact_match": 0.0}, answer="")
    assert chance_warning([text]) is None
    assert chance_warning([]) is None


class Tokenizer:
    def __init__(self, bos_token_id):
        self.bos_token_id = bos_token_id


@pytest.fixture
def windows():
    return np.arange(3, 67)[None] % 200 + 3


def with_perplexities(monkeypatch, without, with_bos):
    calls = []

    def fake(model, tokens, count):
        calls.append((tokens.tolist(), count))
        return with_bos if tokens[0] == 1 else without

    monkeypatch.setattr("evaluators.gate._perplexity_of_end", fake)
    return calls


def test_a_missing_bos_is_warned_of_where_it_matters(monkeypatch, windows):
    calls = with_perplexities(monkeypatch, 120.0, 10.0)
    warning = bos_warning(None, Tokenizer(1), windows)
    assert "with one the unquantized model's perplexity on the first is 10 instead of 120" in warning
    tokens = windows[0].tolist()
    assert calls == [(tokens, 56), ([1, *tokens], 56)]  # the same 56 tokens are scored
    with_perplexities(monkeypatch, 10.5, 10.0)
    assert bos_warning(None, Tokenizer(1), windows) is None
    with_perplexities(monkeypatch, float("nan"), 10.0)
    assert bos_warning(None, Tokenizer(1), windows) is None


def test_nothing_is_run_where_bos_is_there_or_unknown(windows):
    assert bos_warning(None, Tokenizer(None), windows) is None
    assert bos_warning(None, Tokenizer(int(windows[0, 0])), windows) is None
    assert bos_warning(None, Tokenizer(1), windows[:, :10]) is None


def test_scores_the_same_tokens_as_a_plain_forward(make_llama, windows):
    from evaluators.gate import _perplexity_of_end

    model = make_llama(vocab_size=300)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(windows)).logits[0, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(windows[0, 1:]), reduction="none")
    assert _perplexity_of_end(model, windows[0], 20) == pytest.approx(losses[-20:].mean().exp().item(), rel=1e-5)
