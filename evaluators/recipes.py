"""Perplexity recipes: how text is cut into windows, and the published protocols by name with their data on the Hub.

Source: Frantar et al. 2022, arXiv:2210.17323, and the data loaders of its published code, of which `c4-new` and
`ptb-new` are the ones behind the numbers of its later revisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from evaluators.errors import EvaluationError
from evaluators.hub import HubSplit

ONCE, PER_WINDOW, NEVER = "once", "per_window", "never"
DROP, KEEP = "drop", "keep"
BLANK_LINE = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How text becomes windows.

    Attributes:
        bos: `once`: where the tokenizer adds one by default, at the start of what is tokenized in one piece;
            `per_window`: every window starts with one, whatever the tokenizer does by default; `never`.
        joiner: what stands between documents.
        tail: what becomes of the tokens that fill no window: `drop`, or `keep` them as a shorter last window.
    """

    bos: str = ONCE
    joiner: str = BLANK_LINE
    tail: str = DROP


@dataclass(frozen=True, kw_only=True)
class HubText(HubSplit):
    """A column of text of a data set on the Hub.

    Attributes:
        field: the column.
    """

    field: str

    def documents(self) -> Sequence[str]:
        """The texts in their order, read as they are asked for.

        Raises:
            EvaluationError: neither the local cache nor the Hub gives them, or the cache holds another revision.
        """
        found: Sequence[str] = self.load()[self.field]
        return found

    @property
    def remedy(self) -> str:
        """How to get the text onto a machine that is not connected."""
        return f"{super().remedy}, or give the text as {{path: ...}}"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published protocol.

    Attributes:
        evaluation: the text that perplexity is measured on.
        calibration: the text that calibration windows are taken from, at random offsets.
        joiner: what stands between documents; None: `max_windows` are drawn from single documents.
        num_documents: how many documents, from the first, are evaluated; None: all.
        max_windows: how many windows are evaluated at most; None: all.
        calibrates_on_documents: calibration windows are drawn from single documents, not from the text as a whole.
    """

    evaluation: HubText
    calibration: HubText
    joiner: str | None
    num_documents: int | None = None
    max_windows: int | None = None
    calibrates_on_documents: bool = False


def _wikitext(split: str) -> HubText:
    return HubText(
        repository="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        split=split,
        field="text",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
    )


def _c4(split: str, shards: int) -> HubText:
    return HubText(
        repository="allenai/c4",
        file=f"en/c4-{split}.00000-of-{shards:05d}.json.gz",
        split=split,
        field="text",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
    )


def _ptb(split: str) -> HubText:
    # The data set itself is a script, which is never run; the Hub keeps a converted copy on this branch.
    return HubText(
        repository="ptb-text-only/ptb_text_only",
        file=f"penn_treebank/{split}/0000.parquet",
        split=split,
        field="sentence",
        revision="refs/convert/parquet",
    )


_C4_WINDOWS, _C4_NEW_DOCUMENTS = 256, 1100
DRAW_SEED = 0  # of the windows that `c4` is evaluated on, whatever the calibration's seed

RECIPES: dict[str, Recipe] = {
    "wikitext2": Recipe(evaluation=_wikitext("test"), calibration=_wikitext("train"), joiner=BLANK_LINE),
    "c4": Recipe(
        evaluation=_c4("validation", 8),
        calibration=_c4("train", 1024),
        joiner=None,
        max_windows=_C4_WINDOWS,
        calibrates_on_documents=True,
    ),
    "c4-new": Recipe(
        evaluation=_c4("validation", 8),
        calibration=_c4("train", 1024),
        joiner=" ",
        num_documents=_C4_NEW_DOCUMENTS,
        max_windows=_C4_WINDOWS,
        calibrates_on_documents=True,
    ),
    "ptb": Recipe(evaluation=_ptb("validation"), calibration=_ptb("train"), joiner=BLANK_LINE),
    "ptb-new": Recipe(evaluation=_ptb("test"), calibration=_ptb("train"), joiner=" "),
}


def describe(name: str | None, cut: Cut) -> dict[str, Any]:
    """All that a recipe says of the windows, for the protocol of a row and the identity of an evaluation.

    Args:
        name: of the corpus.
        cut: as it was resolved for that corpus.

    Returns:
        Everything for a published recipe. For any other corpus only what differs from the default cut, so that the
        default says nothing.
    """
    recipe = RECIPES.get(name or "")
    if recipe is None:
        default = Cut()
        return {key: value for key, value in vars(cut).items() if value != getattr(default, key)}
    facts: dict[str, Any] = {
        "recipe": name,
        "dataset": recipe.evaluation.label,
        "revision": recipe.evaluation.revision,
        "bos": cut.bos,
    }
    if recipe.joiner is None:
        return facts | {"windows_from": f"random offsets in random documents, seed {DRAW_SEED}"}
    if recipe.num_documents is not None:
        facts["documents"] = recipe.num_documents
    return facts | {"joiner": cut.joiner, "tail": cut.tail}


def draw_from_documents(
    texts: Sequence[str], encode: Callable[[str], Sequence[int]], *, count: int, length: int, seed: int, label: str
) -> list[Sequence[int]]:
    """Windows at random offsets in random documents, each longer than a window. A document may be drawn again.

    The order of draws is that of GPTQ's code, from Python's generator, so that a smaller `count` gives the first
    windows of a larger one.

    DEVIATION: that code also takes a document of exactly one window, and then fails to draw an offset in it.

    Args:
        texts: the documents.
        encode: a document to its tokens.
        count: number of windows.
        length: tokens per window.
        seed: of the draws.
        label: what the text is, for errors.

    Raises:
        EvaluationError: no document is longer than a window.
    """
    random = Random(seed)
    windows: list[Sequence[int]] = []
    short: set[int] = set()  # documents known to be too short are drawn, but not tokenized again
    while len(windows) < count:
        index = random.randint(0, len(texts) - 1)
        ids = [] if index in short else encode(texts[index])
        if len(ids) <= length:
            short.add(index)
            if len(short) == len(texts):
                raise EvaluationError(
                    f"corpus {label} has no document of more than {length} tokens: use a shorter sequence_length"
                )
            continue
        start = random.randint(0, len(ids) - length - 1)
        windows.append(ids[start : start + length])
    return windows


def draw_offsets(num_tokens: int, *, count: int, length: int, seed: int, label: str) -> list[int]:
    """Where `count` windows of `length` tokens start in a text of `num_tokens`, as GPTQ's code draws them.

    Raises:
        EvaluationError: the text is not longer than a window.
    """
    if num_tokens <= length:
        raise EvaluationError(
            f"corpus {label} has {num_tokens} tokens, not more than a window of {length}: "
            "use a shorter sequence_length or a larger corpus"
        )
    random = Random(seed)
    return [random.randint(0, num_tokens - length - 1) for _ in range(count)]
