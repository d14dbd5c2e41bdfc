"""openPangu's tokenizer: what is special, what is SentencePiece's, and BOS, which conversations must have too."""

import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece

from evaluators.chat import Chat
from evaluators.corpora import Corpus, evaluation_windows
from evaluators.scorer import Scorer
from orchestrator.errors import BitatlasError
from orchestrator.models.loading import load_model, load_tokenizer

PUBLISHED = Path(__file__).parents[2] / "assets" / "openpangu-tiny"
BOS, EOS = 1, "[unused10]"
TEXTS = [
    "The house by the sea.",
    "  two spaces before, and after  ",
    "line\n\nbreaks\tand tabs",
    "系统：你好，世界",
    "bytes: \U0001f40b é ẞ",
    "",
    "[unused9] stands in a text [unused10][unused16]x",
    "not special: [unused99] <unk",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PUBLISHED)


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece.SentencePieceProcessor(model_file=str(PUBLISHED / "tokenizer.model"))


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(PUBLISHED, tmp_path / "model")


def described(pieces, text):
    """Cut at the special strings; SentencePiece on what lies between; BOS before all."""
    settings = json.loads((PUBLISHED / "tokenizer_config.json").read_text())
    special = [entry["content"] for entry in settings["added_tokens_decoder"].values()]
    ids = [BOS]
    for part in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        ids += [pieces.PieceToId(part)] if part in special else pieces.EncodeAsIds(part) if part else []
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_bos_and_its_pieces(tokenizer, pieces, text):
    assert tokenizer(text)["input_ids"] == described(pieces, text)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == described(pieces, text)[1:]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == "<s>" + text
    # Only the named special tokens are skipped, as in the released class: marks of thoughts stay readable.
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace(EOS, "")


def test_tokens_that_end_and_fill_are_the_published_ones(tokenizer):
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", BOS)
    assert tokenizer.eos_token == EOS
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0
    assert tokenizer.vocab_size == len(tokenizer) == len(tokenizer.get_vocab()) == 2048
    assert json.loads((PUBLISHED / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_a_conversation_has_one_bos_and_an_empty_system_turn(tokenizer):
    """As the published inference script: rendered, then tokenized. `apply_chat_template(tokenize=True)` has none."""
    scorer = Scorer(load_model(PUBLISHED), tokenizer, chat=Chat(tokenizer, "no_think"))
    text = scorer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert text == "[unused9]系统：[unused10][unused9]用户：Hello /no_think[unused10][unused9]助手："
    ids = scorer.tok_encode(text)
    assert ids[0] == BOS
    assert ids.count(BOS) == 1
    vocabulary = tokenizer.get_vocab()
    opens, closes = vocabulary["[unused9]"], vocabulary["[unused10]"]
    assert [token for token in ids if token in (opens, closes)] == [opens, closes, opens, closes, opens]


@pytest.mark.parametrize(("mode", "suffix"), [("default", ""), ("auto_think", " /auto_think"), ("slow_think", "")])
def test_thinking_modes_are_what_the_user_s_turn_ends_in(tokenizer, mode, suffix):
    chat = Chat(tokenizer, mode)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert chat.render(turns) == f"[unused9]系统：Be brief.[unused10][unused9]用户：Hi{suffix}[unused10][unused9]助手："
    vocabulary = tokenizer.get_vocab()
    assert (chat.thought.opens, chat.thought.closes) == (vocabulary["[unused16]"], vocabulary["[unused17]"])


def test_a_corpus_begins_with_one_bos(tokenizer):
    windows = evaluation_windows(Corpus(name="boolq-passages"), tokenizer, sequence_length=64, max_windows=3)
    assert windows[0, 0] == BOS
    assert (windows == BOS).sum() == 1


def test_it_can_be_saved_and_read_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_vocabulary_that_is_missing(copy):
    (copy / "tokenizer.model").unlink()
    with pytest.raises(BitatlasError, match=r"tokenizer\.model is missing; copy the checkpoint again"):
        load_tokenizer(copy)


def test_a_vocabulary_that_is_empty(copy):
    (copy / "tokenizer.model").write_bytes(b"")
    with pytest.raises(BitatlasError, match=r"tokenizer\.model is empty; copy the checkpoint again"):
        load_tokenizer(copy)


def test_a_vocabulary_that_was_never_fetched(copy):
    (copy / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(BitatlasError, match=r"tokenizer\.model is a Git LFS pointer, not the vocabulary; fetch it"):
        load_tokenizer(copy)


def test_a_vocabulary_of_another_model(copy):
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    special = settings["added_tokens_decoder"]
    special["77"] = special.pop(str(next(i for i, entry in special.items() if entry["content"] == EOS)))
    path.write_text(json.dumps(settings))
    with pytest.raises(BitatlasError, match=r"no usable tokenizer \(tokenizer_config\.json says that \[unused10\] is"):
        load_tokenizer(copy)


def test_code_of_the_checkpoint_is_never_run(copy):
    (copy / "tokenization_openpangu.py").write_text("raise SystemExit('ran')")
    assert load_tokenizer(copy)("x")["input_ids"][0] == BOS
