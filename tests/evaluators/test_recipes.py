"""Published recipes against the loops of the published code, on made-up data sets; no network anywhere."""

import random
import re

import datasets
import numpy as np
import pytest

from evaluators import recipes
from evaluators.corpora import PADDING, Corpus, calibration_windows, cut_of, evaluation_windows, protocol
from evaluators.errors import EvaluationError
from evaluators.recipes import RECIPES, Cut, draw_from_documents


class Letters:
    """One token per character; BOS is token 1."""

    bos_token_id = 1

    def __init__(self, *, adds_bos=False):
        self.adds_bos = adds_bos

    def __len__(self):
        return 50_000

    def __call__(self, text, *, add_special_tokens=True, verbose=True):
        return {"input_ids": ([1] if add_special_tokens and self.adds_bos else []) + [ord(letter) for letter in text]}


PLAIN, WITH_BOS = Letters(), Letters(adds_bos=True)


def made_up_documents(split):
    """Documents of 0 to 120 letters, other ones in every split."""
    draw = random.Random(split)
    return ["".join(draw.choices("abcdefgh ", k=draw.randint(0, 120))) for _ in range(1500)]


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub; the list holds what was asked of it."""
    asked = []

    def load(repository, config, **options):
        asked.append((repository, config, options))
        return datasets.Dataset.from_dict({"text": (found := made_up_documents(options["split"])), "sentence": found})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.fixture
def text_file(tmp_path):
    def make(text):
        (tmp_path / "some.txt").write_text(text, encoding="utf-8")
        return Corpus(path=str(tmp_path / "some.txt"))

    return make


def windows_of(name, tokenizer=PLAIN, *, sequence_length=50, max_windows=None, **cut):
    corpus = Corpus.parse(name)
    options = {"sequence_length": sequence_length, "max_windows": max_windows}
    return evaluation_windows(corpus, tokenizer, cut=cut_of(corpus, **cut), **options)


def whole_windows(ids, length):
    return np.array(ids[: len(ids) // length * length]).reshape(-1, length)


# the published loops, written as they stand there


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS])
@pytest.mark.parametrize(
    ("name", "split", "joiner"),
    [("wikitext2", "test", "\n\n"), ("ptb", "validation", "\n\n"), ("ptb-new", "test", " ")],
)
def test_joined_recipes(hub, name, split, joiner, tokenizer):
    ids = tokenizer(joiner.join(made_up_documents(split)))["input_ids"]
    assert (windows_of(name, tokenizer) == whole_windows(ids, 50)).all()
    assert (windows_of(name, tokenizer, max_windows=3) == whole_windows(ids, 50)[:3]).all()


@pytest.mark.parametrize("length", [10, 50])
def test_c4_new_is_1100_documents_cut_to_256_windows(hub, length):
    ids = WITH_BOS(" ".join(made_up_documents("validation")[:1100]))["input_ids"][: 256 * length]
    assert (windows_of("c4-new", WITH_BOS, sequence_length=length) == whole_windows(ids, length)).all()
    assert len(windows_of("c4-new", WITH_BOS, sequence_length=length, max_windows=999)) == 256


def published_draws(texts, tokenizer, count, length, seed):
    random.seed(seed)
    windows = []
    for _ in range(count):
        while True:
            index = random.randint(0, len(texts) - 1)
            ids = tokenizer(texts[index])["input_ids"]
            if len(ids) > length:
                break
        start = random.randint(0, len(ids) - length - 1)
        windows.append(ids[start : start + length])
    return np.array(windows)


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS])
def test_c4_is_256_random_windows_of_random_documents(hub, tokenizer):
    expected = published_draws(made_up_documents("validation"), tokenizer, 256, 50, 0)
    found = windows_of("c4", tokenizer)
    assert found.dtype == np.int64
    assert (found == expected).all()
    assert (windows_of("c4", tokenizer, max_windows=7) == expected[:7]).all()


def test_c4_calibrates_on_random_windows_of_random_documents(hub):
    for name, seed in (("c4", 0), ("c4", 5), ("c4-new", 5)):
        found = calibration_windows(Corpus(name=name), WITH_BOS, samples=9, sequence_length=50, seed=seed)
        assert (found == published_draws(made_up_documents("train"), WITH_BOS, 9, 50, seed)).all()


@pytest.mark.parametrize(("name", "joiner"), [("wikitext2", "\n\n"), ("ptb", "\n\n"), ("ptb-new", " ")])
def test_joined_recipes_calibrate_at_random_offsets(hub, name, joiner):
    ids = WITH_BOS(joiner.join(made_up_documents("train")))["input_ids"]
    random.seed(3)
    starts = [random.randint(0, len(ids) - 50 - 1) for _ in range(9)]
    found = calibration_windows(Corpus(name=name), WITH_BOS, samples=9, sequence_length=50, seed=3)
    assert (found == np.array([ids[start : start + 50] for start in starts])).all()
    assert (calibration_windows(Corpus(name=name), WITH_BOS, samples=4, sequence_length=50, seed=3) == found[:4]).all()


def test_what_is_asked_of_the_hub(hub):
    for name in RECIPES:
        windows_of(name)
        calibration_windows(Corpus(name=name), PLAIN, samples=1, sequence_length=50, seed=0)
    found = {(repository, config, options["split"]): options["data_files"] for repository, config, options in hub}
    assert found == {
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"): None,
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"): None,
        ("allenai/c4", None, "train"): {"train": "en/c4-train.00000-of-01024.json.gz"},
        ("allenai/c4", None, "validation"): {"validation": "en/c4-validation.00000-of-00008.json.gz"},
        ("ptb-text-only/ptb_text_only", None, "train"): {"train": "penn_treebank/train/0000.parquet"},
        ("ptb-text-only/ptb_text_only", None, "validation"): {"validation": "penn_treebank/validation/0000.parquet"},
        ("ptb-text-only/ptb_text_only", None, "test"): {"test": "penn_treebank/test/0000.parquet"},
    }
    pinned = {options["revision"] for repository, _, options in hub if not repository.startswith("ptb")}
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in pinned)


def test_no_document_is_long_enough(hub):
    with pytest.raises(EvaluationError, match="corpus c4 has no document of more than 121 tokens: use a shorter"):
        windows_of("c4", sequence_length=121)


def test_documents_that_are_too_short_are_tokenized_once():
    seen = []

    def encode(text):
        seen.append(text)
        return list(range(len(text)))

    texts = ["a", "b", "c", "long enough"]
    draw_from_documents(texts, encode, count=20, length=4, seed=0, label="x")
    assert all(seen.count(text) == 1 for text in "abc")


def test_a_text_that_is_not_longer_than_a_window(monkeypatch):
    monkeypatch.setattr(recipes.HubText, "documents", lambda _: ["abc", "def"])
    with pytest.raises(EvaluationError, match="corpus wikitext2 has 8 tokens, not more than a window of 8"):
        calibration_windows(Corpus(name="wikitext2"), PLAIN, samples=1, sequence_length=8, seed=0)


# bos, joiner, tail


def test_bos_per_window(text_file):
    corpus = text_file("abcdefgh")
    options = {"sequence_length": 4, "max_windows": None}
    found = evaluation_windows(corpus, PLAIN, cut=Cut(bos="per_window"), **options)
    assert found.tolist() == [[1, 97, 98, 99], [1, 100, 101, 102]]
    kept = evaluation_windows(corpus, PLAIN, cut=Cut(bos="per_window", tail="keep"), **options)
    assert kept.tolist() == [*found.tolist(), [1, 103, 104, PADDING]]
    # the default would have put one at the start already
    assert (evaluation_windows(corpus, WITH_BOS, cut=Cut(bos="per_window"), **options) == found).all()


def test_bos_never(text_file):
    found = evaluation_windows(text_file("abcd"), WITH_BOS, sequence_length=4, max_windows=None, cut=Cut(bos="never"))
    assert found.tolist() == [[97, 98, 99, 100]]


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS])
def test_bos_of_windows_drawn_from_documents(hub, tokenizer):
    texts = made_up_documents("validation")
    assert (windows_of("c4", tokenizer, bos="never") == published_draws(texts, PLAIN, 256, 50, 0)).all()
    per_window = windows_of("c4", tokenizer, bos="per_window")
    assert (per_window[:, 0] == 1).all()
    assert (per_window[:, 1:] == published_draws(texts, PLAIN, 256, 49, 0)).all()


def test_per_window_needs_a_bos_token(text_file):
    tokenizer = Letters()
    tokenizer.bos_token_id = None
    with pytest.raises(EvaluationError, match="bos = per_window on corpus some, but the tokenizer has no BOS token"):
        evaluation_windows(text_file("abcd"), tokenizer, sequence_length=4, max_windows=None, cut=Cut(bos="per_window"))


def test_joiner(tmp_path):
    (tmp_path / "some.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}\n')
    corpus = Corpus(path=str(tmp_path / "some.jsonl"), field="text")
    found = evaluation_windows(corpus, PLAIN, sequence_length=5, max_windows=None, cut=cut_of(corpus, joiner="-"))
    assert "".join(map(chr, found[0])) == "ab-cd"


@pytest.mark.parametrize(
    ("text", "length", "windows"),
    [
        ("abcde", 3, [[97, 98, 99], [100, 101, PADDING]]),
        ("abcd", 3, [[97, 98, 99]]),  # nothing could be predicted in a tail of one token
        ("abc", 3, [[97, 98, 99]]),
        ("ab", 3, [[97, 98, PADDING]]),
    ],
)
def test_a_kept_tail_is_a_shorter_last_window(text_file, text, length, windows):
    options = {"sequence_length": length, "cut": Cut(tail="keep")}
    assert evaluation_windows(text_file(text), PLAIN, max_windows=None, **options).tolist() == windows
    assert evaluation_windows(text_file(text), PLAIN, max_windows=1, **options).tolist() == windows[:1]


def test_a_tail_of_one_token_is_no_window(text_file):
    with pytest.raises(EvaluationError, match="has 1 tokens, fewer than one window of 3"):
        evaluation_windows(text_file("a"), PLAIN, sequence_length=3, max_windows=None, cut=Cut(tail="keep"))


def test_the_tail_of_the_text_is_not_that_of_a_part_of_it(text_file):
    """Where few windows are asked for, only the start of the text is tokenized."""
    corpus = text_file("\n\n".join(["abcdefg"] * 4000))
    found = evaluation_windows(corpus, PLAIN, sequence_length=50, max_windows=3, cut=Cut(tail="keep"))
    assert found.shape == (3, 50)
    assert found.min() >= 0


@pytest.mark.parametrize(
    ("value", "cut", "message"),
    [
        ("lambada", {"bos": "twice"}, "unknown bos 'twice'"),
        ("lambada", {"tail": "kept"}, "unknown tail 'kept': did you mean 'keep'"),
        ("c4", {"joiner": " "}, "`joiner` and `tail` mean nothing for corpus c4, because its windows are drawn"),
        ("c4", {"tail": "keep"}, "mean nothing for corpus c4"),
        ({"token_ids": "a.npy"}, {"bos": "never"}, "mean nothing for corpus a, because its windows are given"),
        ({"token_ids": "a.npy"}, {"joiner": " "}, "mean nothing for corpus a"),
        ({"token_ids": "a.npy"}, {"tail": "keep"}, "mean nothing for corpus a"),
    ],
)
def test_what_a_corpus_has_no_use_for_is_refused(value, cut, message):
    with pytest.raises(EvaluationError, match=message):
        cut_of(Corpus.parse(value), **cut)


# what is said of it


def test_a_default_says_nothing():
    for value in ("lambada", {"path": "a.txt"}, {"token_ids": "a.npy"}):
        corpus = Corpus.parse(value)
        assert protocol(corpus, cut_of(corpus)) == {}
    corpus = Corpus(name="lambada")
    assert protocol(corpus, cut_of(corpus, joiner="\n\n")) == {}
    assert protocol(corpus, cut_of(corpus, bos="never", joiner=" ", tail="keep")) == {
        "bos": "never",
        "joiner": " ",
        "tail": "keep",
    }


def test_a_published_recipe_says_everything():
    corpora = {name: Corpus(name=name) for name in RECIPES}
    said = {name: protocol(corpus, cut_of(corpus)) for name, corpus in corpora.items()}
    assert said["c4-new"] == {
        "recipe": "c4-new",
        "dataset": "allenai/c4 en/c4-validation.00000-of-00008.json.gz",
        "revision": "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        "documents": 1100,
        "bos": "once",
        "joiner": " ",
        "tail": "drop",
    }
    assert said["c4"]["windows_from"] == "random offsets in random documents, seed 0"
    assert said["wikitext2"]["dataset"] == "Salesforce/wikitext wikitext-2-raw-v1 test"
    assert said["ptb-new"]["joiner"] == " "
    assert len({str(facts) for facts in said.values()}) == len(RECIPES)


# the local cache of `datasets`, without a Hub


@pytest.fixture
def cache(hub_cache):
    """Writes a split of wikitext2 where `datasets` would have left it."""

    def write(revision, texts):
        rows = [{"text": text} for text in texts]
        hub_cache("Salesforce/wikitext", "wikitext-2-raw-v1", {"test": rows}, revision=revision)

    return write


def test_read_from_the_local_cache(cache):
    cache(RECIPES["wikitext2"].evaluation.revision, [" = Title = \n", "", "some text"])
    found = windows_of("wikitext2", sequence_length=10)
    assert "".join(map(chr, found.flatten())) == "\n\n".join([" = Title = \n", "", "some text"])[:20]


def test_another_revision_in_the_cache_is_refused(cache):
    cache("0" * 40, ["some text"])
    with pytest.raises(EvaluationError, match=f"at revision {'0' * 40}, but the recipe is of b08601e"):
        windows_of("wikitext2")


@pytest.mark.parametrize("name", RECIPES)
def test_a_data_set_that_is_not_there(name, cache):
    with pytest.raises(EvaluationError) as caught:
        windows_of(name)
    message = str(caught.value)
    evaluation = RECIPES[name].evaluation
    assert message.startswith(f"data set {evaluation.label} is neither in the local cache nor to be had from the Hub (")
    assert "set HF_HOME to a cache that holds it (made on a connected machine by datasets.load_dataset(" in message
    assert f"revision={evaluation.revision!r}" in message
    assert message.endswith("or give the text as {path: ...}")
    assert "\n" not in message
