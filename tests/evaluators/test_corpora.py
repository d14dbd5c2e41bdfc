import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators import corpora, packaged
from evaluators.corpora import Corpus, calibration_windows, documents, evaluation_windows
from evaluators.errors import EvaluationError


class CharacterTokenizer:
    """One token per character: fast, and its tokens can be read back."""

    bos_token_id = 1

    def __init__(self, *, adds_bos=False, size=50_000):
        self.adds_bos, self.size = adds_bos, size

    def __len__(self):
        return self.size

    def __call__(self, text, *, add_special_tokens=True, verbose=True):
        bos = [1] if add_special_tokens and self.adds_bos else []
        return {"input_ids": bos + [ord(character) for character in text]}


CHARACTERS = CharacterTokenizer()


def text_of(windows):
    return "".join(chr(i) for i in windows.flatten())


@pytest.fixture
def text_corpus(tmp_path):
    def make(text):
        (tmp_path / "some.txt").write_text(text, encoding="utf-8")
        return Corpus(path=str(tmp_path / "some.txt"))

    return make


# Corpus.parse


@pytest.mark.parametrize(
    ("value", "corpus", "label"),
    [
        ("lambada", Corpus(name="lambada"), "lambada"),
        ({"path": "a/wiki.txt"}, Corpus(path="a/wiki.txt"), "wiki"),
        ({"path": "a/c4.jsonl", "field": "text"}, Corpus(path="a/c4.jsonl", field="text"), "c4"),
        ({"token_ids": "ids.npy"}, Corpus(token_ids="ids.npy"), "ids"),
    ],
)
def test_parse(value, corpus, label):
    assert Corpus.parse(value) == corpus
    assert corpus.label == label


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lambda", "unknown corpus 'lambda': did you mean 'lambada'"),
        ({"pth": "a.txt"}, "unknown corpus key 'pth': did you mean 'path'"),
        ({}, "exactly one of them"),
        ({"path": "a.txt", "token_ids": "b.npy"}, "exactly one of them"),
        ({"path": "a.csv"}, r"must end in .txt or .jsonl"),
        ({"path": "a.jsonl"}, "`field` belongs to a .jsonl path, which needs one"),
        ({"path": "a.txt", "field": "text"}, "`field` belongs to a .jsonl path"),
        ({"path": 3}, "must be a string"),
        (["lambada"], "must be a name or a mapping"),
    ],
)
def test_parse_refuses(value, message):
    with pytest.raises(EvaluationError, match=message):
        Corpus.parse(value)


# documents


def test_registered_corpora_have_text():
    assert documents(Corpus(name="lambada")) is packaged.lambada_documents()


def test_text_file_keeps_every_character_for_evaluation(text_corpus):
    text = " = Title = \n\nfirst\n\n\n\nsecond\n"
    windows = evaluation_windows(text_corpus(text), CHARACTERS, sequence_length=len(text), max_windows=None)
    assert text_of(windows) == text


def test_json_lines(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\\u2028", "n": 1}\n', encoding="utf-8")
    assert documents(Corpus(path=str(path), field="text")) == ("one", "two\u2028")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txt": "a"}', r"some.jsonl line 2 has no text field 'text' \(it has: txt\)"),
        ('{"text": 3}', "line 2 has no text field 'text'"),
        ("[1]", r"line 2 has no text field 'text' \(it has: list\)"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_json_lines_refuses(tmp_path, line, message):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "one"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=message):
        documents(Corpus(path=str(path), field="text"))


def test_empty_file(text_corpus):
    with pytest.raises(EvaluationError, match="holds no text"):
        documents(text_corpus(" \n\n \n"))


def test_file_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(EvaluationError, match=r"latin.txt is not UTF-8 \(byte 3\)"):
        documents(Corpus(path=str(tmp_path / "latin.txt")))


def test_missing_file(tmp_path):
    with pytest.raises(EvaluationError, match="cannot be read"):
        documents(Corpus(path=str(tmp_path / "none.txt")))


def test_token_ids_have_no_documents():
    with pytest.raises(EvaluationError, match="holds token ids"):
        documents(Corpus(token_ids="ids.npy"))


# windows of text


def test_calibration_order_never_changes(text_corpus):
    # golden: "abcdefgh" sorted by the first eight raw words of PCG64(0) (numpy 2.4)
    corpus = text_corpus("\n\n".join("abcdefgh"))
    windows = calibration_windows(corpus, CHARACTERS, samples=1, sequence_length=22, seed=0)
    assert text_of(windows) == "\n\n".join("dcbgahef")


def test_calibration_leaves_out_documents_without_text(text_corpus):
    windows = calibration_windows(text_corpus("a\n\n\n\n \n\nb"), CHARACTERS, samples=1, sequence_length=4, seed=0)
    assert sorted(text_of(windows)) == ["\n", "\n", "a", "b"]


def test_seeds_differ_and_repeat(tokenizer):
    def windows(seed):
        return calibration_windows(Corpus(name="lambada"), tokenizer, samples=4, sequence_length=64, seed=seed)

    assert windows(0).dtype == np.int64
    assert windows(0).shape == (4, 64)
    assert (windows(0) == windows(0)).all()
    assert not (windows(0) == windows(1)).all()


def test_fewer_samples_are_the_first_windows(tokenizer):
    corpus = Corpus(name="boolq-passages")
    many = calibration_windows(corpus, tokenizer, samples=64, sequence_length=96, seed=3)
    few = calibration_windows(corpus, tokenizer, samples=3, sequence_length=96, seed=3)
    assert (many[:3] == few).all()


@pytest.mark.parametrize("name", corpora.CORPORA)
def test_windows_are_those_of_tokenizing_everything_at_once(name, tokenizer):
    everything = tokenizer("\n\n".join(documents(Corpus(name=name))), add_special_tokens=False, verbose=False)
    expected = np.array(everything["input_ids"][: 3 * 700]).reshape(3, 700)
    windows = evaluation_windows(Corpus(name=name), tokenizer, sequence_length=700, max_windows=3)
    assert (windows == expected).all()


@settings(max_examples=50)
@given(
    texts=st.lists(st.text(alphabet="ab \n", min_size=1, max_size=400), min_size=1, max_size=40),
    length=st.integers(2, 300),
    most=st.integers(1, 5),
)
def test_windows_are_a_prefix_of_the_joined_text(texts, length, most):
    joined = "\n\n".join(texts)
    found = corpora._cut(corpora._tokens(texts, CHARACTERS, Corpus(name="lambada"), wanted=length * most), length)
    assert text_of(found[:most]) == joined[: len(found[:most]) * length]
    assert len(found[:most]) == min(most, len(joined) // length)


def test_tokens_at_the_end_of_a_prefix_are_not_used():
    class RunTokenizer(CharacterTokenizer):
        """One token per run of word or space characters, its id the length: a cut inside a run changes it."""

        def __call__(self, text, *, add_special_tokens=True, verbose=True):
            return {"input_ids": [len(run) for run in re.findall(r"\s+|\S+", text)]}

    texts = ["abcdefg\n"] * 5_000
    everything = [7, 3] * 4_999 + [7, 1]
    for wanted in range(1_000, 1_040):
        found = corpora._tokens(texts, RunTokenizer(), Corpus(name="lambada"), wanted=wanted)
        assert found[:wanted].tolist() == everything[:wanted]


def test_long_texts_are_not_tokenized_whole(monkeypatch):
    seen = []

    class Counting(CharacterTokenizer):
        def __call__(self, text, **options):
            seen.append(len(text))
            return super().__call__(text, **options)

    monkeypatch.setitem(corpora.CORPORA, "lambada", lambda: ("x" * 100,) * 10_000)
    evaluation_windows(Corpus(name="lambada"), Counting(), sequence_length=100, max_windows=5)
    assert max(seen) < 5_000


def test_bos_stands_once_at_the_start(bos_tokenizer, tokenizer):
    options = {"sequence_length": 32, "max_windows": 4}
    plain = evaluation_windows(Corpus(name="lambada"), tokenizer, **options).flatten()
    with_bos = evaluation_windows(Corpus(name="lambada"), bos_tokenizer, **options).flatten()
    assert with_bos[0] == bos_tokenizer.bos_token_id
    assert (with_bos[1:] == plain[:-1]).all()


def test_tail_is_dropped(text_corpus):
    windows = evaluation_windows(text_corpus("abcdefgh"), CHARACTERS, sequence_length=3, max_windows=None)
    assert text_of(windows) == "abcdef"


def test_too_few_samples(text_corpus):
    with pytest.raises(EvaluationError, match="corpus some gives 2 windows of 3 tokens, but 5 were asked for: ask for"):
        calibration_windows(text_corpus("abcdefgh"), CHARACTERS, samples=5, sequence_length=3, seed=0)


def test_no_evaluation_window(text_corpus):
    with pytest.raises(EvaluationError, match="has 8 tokens, fewer than one window of 9"):
        evaluation_windows(text_corpus("abcdefgh"), CHARACTERS, sequence_length=9, max_windows=None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"samples": 0}, "samples = 0"), ({"sequence_length": 0}, "sequence_length = 0"), ({"seed": -1}, "seed = -1")],
)
def test_calibration_numbers(overrides, message):
    options = {"samples": 1, "sequence_length": 8, "seed": 0} | overrides
    with pytest.raises(EvaluationError, match=message):
        calibration_windows(Corpus(name="lambada"), CHARACTERS, **options)


@pytest.mark.parametrize(
    ("overrides", "message"), [({"max_windows": 0}, "max_windows = 0"), ({"sequence_length": 1}, "sequence_length = 1")]
)
def test_evaluation_numbers(overrides, message):
    options = {"sequence_length": 8, "max_windows": None} | overrides
    with pytest.raises(EvaluationError, match=message):
        evaluation_windows(Corpus(name="lambada"), CHARACTERS, **options)


def test_text_outside_the_vocabulary(text_corpus):
    with pytest.raises(EvaluationError, match="token id 122, outside the tokenizer's vocabulary of 100"):
        evaluation_windows(text_corpus("az"), CharacterTokenizer(size=100), sequence_length=2, max_windows=None)


# windows given as token ids


@pytest.fixture
def token_corpus(tmp_path):
    def make(array):
        np.save(tmp_path / "ids.npy", array)
        return Corpus(token_ids=str(tmp_path / "ids.npy"))

    return make


def test_given_windows_are_taken_in_order(token_corpus):
    ids = np.arange(12, dtype=np.int64).reshape(3, 4)
    corpus = token_corpus(ids)
    assert (calibration_windows(corpus, CHARACTERS, samples=2, sequence_length=4, seed=7) == ids[:2]).all()
    assert (evaluation_windows(corpus, CHARACTERS, sequence_length=4, max_windows=None) == ids).all()
    with pytest.raises(EvaluationError, match="gives 3 windows of 4 tokens, but 4"):
        calibration_windows(corpus, CHARACTERS, samples=4, sequence_length=4, seed=0)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4), np.int32), r"holds int32 \[2, 4\]; token ids must be int64"),
        (np.zeros(8, np.int64), r"holds int64 \[8\]"),
        (np.zeros((0, 4), np.int64), r"holds int64 \[0, 4\]"),
        (np.zeros((2, 5), np.int64), "windows of 5 tokens, but sequence_length is 4"),
        (np.full((2, 4), -1), "token id -1, outside"),
        (np.full((2, 4), 60_000), "token id 60000, outside the tokenizer's vocabulary of 50000"),
        (np.array([{"pickled": 1}], dtype=object), "not a plain .npy array"),
    ],
)
def test_given_windows_refused(token_corpus, array, message):
    with pytest.raises(EvaluationError, match=message):
        evaluation_windows(token_corpus(array), CHARACTERS, sequence_length=4, max_windows=None)


def test_given_windows_not_numpy(tmp_path):
    (tmp_path / "ids.npy").write_text(json.dumps([1]))
    for name, message in (("ids.npy", "not a plain .npy array"), ("none.npy", "cannot be read")):
        corpus = Corpus(token_ids=str(tmp_path / name))
        with pytest.raises(EvaluationError, match=message):
            evaluation_windows(corpus, CHARACTERS, sequence_length=4, max_windows=None)
