"""Perplexity recipes: how text is cut into windows, and the published protocols by name with their data on the Hub.

Source: Frantar et al. 2022, arXiv:2210.17323, and the data loaders of its published code, of which `c4-new` and
`ptb-new` are the ones behind the numbers of its later revisions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from evaluators.errors import EvaluationError

ONCE, PER_WINDOW, NEVER = "once", "per_window", "never"
DROP, KEEP = "drop", "keep"
BLANK_LINE = "\n\n"

_COMMIT = re.compile(r"[0-9a-f]{40}")


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
class HubText:
    """A column of text of a data set on the Hub.

    Attributes:
        repository: its id.
        split: the split.
        field: the column.
        revision: a commit; a branch where the data set has no commit to name.
        config: the configuration, where it has several.
        file: the one file to read, where the data set is too large to be read whole.
    """

    repository: str
    split: str
    field: str
    revision: str
    config: str | None = None
    file: str | None = None

    @property
    def label(self) -> str:
        """`Salesforce/wikitext wikitext-2-raw-v1 test`."""
        return " ".join(part for part in (self.repository, self.config, self.file or self.split) if part)

    def documents(self) -> Sequence[str]:
        """The texts in their order, read as they are asked for.

        Raises:
            EvaluationError: neither the local cache nor the Hub gives them, or the cache holds another revision.
        """
        import datasets

        try:
            table = datasets.load_dataset(
                self.repository,
                self.config,
                data_files={self.split: self.file} if self.file else None,
                split=self.split,
                revision=self.revision,
                verification_mode="no_checks",  # a single file is never all that the data set's card lists
            )
            found: Sequence[str] = table[self.field]
        except Exception as error:  # whatever the Hub, the network or a damaged cache makes it raise
            lines = str(error).strip().splitlines() or [""]
            raise EvaluationError(
                f"data set {self.label} is neither in the local cache nor to be had from the Hub "
                f"({type(error).__name__}: {lines[0]}): {self._remedy}"
            ) from error
        self._check_revision(table)
        return found

    def _check_revision(self, table: Any) -> None:
        """Offline, `datasets` takes whatever revision its cache has; the folder is named by the commit."""
        for file in getattr(table, "cache_files", []):
            folder = file["filename"].replace("\\", "/").split("/")[-2]
            if _COMMIT.fullmatch(folder) and _COMMIT.fullmatch(self.revision) and folder != self.revision:
                raise EvaluationError(
                    f"data set {self.label} is in the local cache at revision {folder}, but the recipe is of "
                    f"{self.revision}: {self._remedy}"
                )

    @property
    def _remedy(self) -> str:
        arguments = [repr(self.repository)]
        arguments += [repr(self.config)] if self.config else []
        arguments += [f"data_files={ {self.split: self.file} }"] if self.file else []
        arguments += [f"split={self.split!r}", f"revision={self.revision!r}", "verification_mode='no_checks'"]
        return (
            "set HF_HOME to a cache that holds it (made on a connected machine by "
            f"datasets.load_dataset({', '.join(arguments)})), or give the text as {{path: ...}}"
        )


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
