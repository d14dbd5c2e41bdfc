"""Generated texts against transformers' own `generate`, one context at a time."""

import pytest
import torch

from evaluators.decoding import Decoding
from evaluators.errors import EvaluationError
from evaluators.generation import Generator, _drawn, _Slots, _Text, ends_in_loop
from evaluators.head import split

CONTEXTS = [
    (5, 6, 7, 8, 9, 10, 11),
    (5, 6, 7, 8, 9, 10, 11, 40, 41),
    (5, 6, 7, 8, 9, 10, 11, 40, 42, 43),
    (90,),
    (5, 6, 7),
    (30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 3, 4),
    (5, 6, 7, 8, 9, 10, 11),
]
NO_END = frozenset()


class Letters:
    """A tokenizer that spells each id as one character."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(0x4E00 + int(token)) for token in ids)


def generator(model, **options):
    return Generator(split(model), Letters(), options.pop("end_tokens", NO_END), **options)


def generate(model, contexts, decoding, **options):
    return generator(model, **options).generate(contexts, decoding, pack_tokens=options.get("pack_tokens", 64))


def by_transformers(model, context, max_new_tokens):
    ids = torch.tensor([context])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(out[0, len(context) :].tolist())


@pytest.fixture(scope="module")
def expected(any_model):
    return [by_transformers(any_model, context, 14) for context in CONTEXTS]


@pytest.mark.parametrize("num_slots", [1, 3, 16])
def test_equals_transformers(any_model, expected, num_slots):
    found = generate(any_model, CONTEXTS, Decoding(max_new_tokens=14), num_slots=num_slots)
    assert [text.tokens for text in found] == expected
    assert {text.ended_by for text in found} == {"length"}
    assert all(text.text == Letters().decode(text.tokens) for text in found)


@pytest.fixture(scope="module")
def plain(small_model):
    return {context: by_transformers(small_model, context, 12) for context in CONTEXTS}


def test_an_end_token_ends_a_text_and_is_its_last(small_model, plain):
    end = plain[CONTEXTS[0]][4]
    found = generate(small_model, CONTEXTS, Decoding(max_new_tokens=12), end_tokens={end}, num_slots=2)
    for text, context in zip(found, CONTEXTS, strict=True):
        expected = plain[context]
        if end in expected:
            assert text.tokens == expected[: expected.index(end) + 1]
            assert text.ended_by == "end token"
        else:
            assert (text.tokens, text.ended_by) == (expected, "length")
    assert found[0].ended_by == "end token"


def test_a_stop_string_over_several_tokens_is_cut_off(small_model, plain):
    tokens = plain[CONTEXTS[1]]
    stop = Letters().decode(tokens[3:6])
    (text,) = generate(small_model, [CONTEXTS[1]], Decoding(max_new_tokens=12, stop=("unseen", stop, "")))
    whole = Letters().decode(tokens)
    assert text.text == whole[: whole.index(stop)]
    assert text.ended_by == "stop string"
    assert len(text.tokens) == whole.index(stop) + 3


def test_equal_contexts_are_continued_once(small_model):
    calls = []
    made = generator(small_model)
    found = made.generate(
        CONTEXTS, Decoding(max_new_tokens=5), pack_tokens=64, progress=lambda done, total: calls.append((done, total))
    )
    assert found[0] == found[-1]
    assert calls[-1] == (6, 6)
    assert [done for done, _ in calls] == [1, 2, 3, 4, 5, 6]


def test_nothing_to_do(small_model):
    assert generate(small_model, [], Decoding(max_new_tokens=5)) == []


def test_draws_do_not_depend_on_the_batch_and_repeat(small_model):
    decoding = Decoding(max_new_tokens=10, temperature=1.0, seed=3)
    found = generate(small_model, CONTEXTS, decoding)
    assert found == generate(small_model, CONTEXTS, decoding, num_slots=2)
    assert found[0].tokens != found[-1].tokens  # equal contexts, streams of their own
    assert found != generate(small_model, CONTEXTS, Decoding(max_new_tokens=10, temperature=1.0, seed=4))


def test_the_most_likely_of_one_is_greedy(small_model):
    greedy = generate(small_model, CONTEXTS, Decoding(max_new_tokens=8))
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}):
        assert greedy == generate(
            small_model, CONTEXTS, Decoding(**{"max_new_tokens": 8, "temperature": 1.0} | options)
        )


def draws(logits, count=4000, **options):
    text = _Text(0, 0, None, torch.Generator().manual_seed(0))
    decoding = Decoding(max_new_tokens=1, **options)
    found = [_drawn(torch.tensor(logits), text, decoding) for _ in range(count)]
    return torch.bincount(torch.tensor(found), minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"temperature": 1.0, "top_p": 0.69}, [0, 0, 3 / 7, 4 / 7]),
        ({"temperature": 1.0, "top_p": 0.71}, [0, 2 / 9, 3 / 9, 4 / 9]),
    ],
)
def test_draws_follow_the_probabilities(options, expected):
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().tolist()
    torch.testing.assert_close(draws(logits, **options), torch.tensor(expected), atol=0.03, rtol=0)


def test_a_broken_model_still_ends(make_llama):
    model = make_llama(vocab_size=300)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        found = generate(model, CONTEXTS, Decoding(max_new_tokens=4, temperature=temperature))
        assert all(text.ended_by == "length" and len(text.tokens) == 4 for text in found)


def test_a_slot_is_given_on():
    def text(index, length):
        part = torch.full((1, 1, length, 2), float(index))
        return _Text(index, length, {0: (part, -part)}, None)

    slots = _Slots(2, 5)
    slots.admit(text(1, 3))
    slots.admit(text(2, 4))
    assert not slots.has_room
    (ended,) = slots.finished(lambda text: "length" if text.index == 1 else None)
    assert (ended.index, [text.index for text in slots.texts]) == (1, [2])
    keys, values = slots._layers[0]
    assert (keys[0, :, :4] == 2).all()
    assert (values[0, :, :4] == -2).all()
    slots.admit(text(3, 1))
    assert (keys[1, :, :1] == 3).all()
    assert (keys[1, :, 1:] == 0).all()
    assert len(slots.finished(lambda _: "length")) == 2
    assert slots.texts == []


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], False),
        (list(range(100)), False),
        ([7] * 24, True),
        ([7] * 23, False),
        ([1, 2, 3] + [7] * 24, True),
        ([7] * 24 + [1], False),
        ([1, 2, 3, 4] * 6, True),
        ([1, 2, 3, 4] * 5, False),
        (list(range(9)) + list(range(20, 30)) * 3, True),
        (list(range(9)) + list(range(20, 40)) * 2, False),
    ],
)
def test_loops(tokens, expected):
    assert ends_in_loop(tokens) is expected


def test_a_model_without_trees_is_refused_by_name(small_model, monkeypatch):
    monkeypatch.setattr("evaluators.generation.reason_against", lambda _: "attention with sinks")
    with pytest.raises(EvaluationError, match="cannot be generated with LlamaModel yet: attention with sinks"):
        generator(small_model)
