"""Running token sequences one per row, each whole: for models that token trees cannot be trusted with, and for scores
with HFLM's bits. Rows are padded on the right, or only those of one length stand side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from evaluators.head import hidden_states
from evaluators.prefix_tree import Scored, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from evaluators.head import SplitModel
    from evaluators.prefix_tree import Tokens


def rows_of(sequences: Sequence[Tokens], scored_from: Sequence[int]) -> list[Segment]:
    """Every sequence as a segment of its own, longest first: memory is at its peak at once."""
    segments = []
    for index in sorted(range(len(sequences)), key=lambda index: (-len(sequences[index]), index)):
        tokens, first = sequences[index], scored_from[index]
        segments.append(
            Segment(
                prefix=None,
                start=0,
                tokens=list(tokens),
                depth=list(range(len(tokens))),
                end=[len(tokens)] * len(tokens),
                scored=[Scored(index, first, range(first, len(tokens)))],
                num_finished=1,
            )
        )
    return segments


def row_packs_of(segments: Sequence[Segment], max_tokens: int, *, pad: bool = True) -> Iterator[Sequence[Segment]]:
    """Cut segments, longest first, into packs whose padded size stays within `max_tokens`.

    Without `pad` the rows of a pack are of one length, and each has the hidden states that it has alone: padding moves
    the last bits of attention.
    """
    start = 0
    while start < len(segments):
        length = len(segments[start])
        pack = segments[start : start + max(1, max_tokens // length)]
        if not pad:
            pack = [segment for segment in pack if len(segment) == length]
        yield pack
        start += len(pack)


class RowRunner:
    """Runs packs of `row_packs_of`."""

    def __init__(self, model: SplitModel) -> None:
        """Take a split model."""
        self._model = model

    def run(self, pack: Sequence[Segment]) -> torch.Tensor:
        """Hidden states [T, H] after the final norm, of the sequences' tokens one after the other."""
        ids_BT = torch.zeros(len(pack), max(map(len, pack)), dtype=torch.long)
        for row, segment in enumerate(pack):
            ids_BT[row, : len(segment)] = torch.tensor(segment.tokens)
        hidden_BTH = hidden_states(self._model, ids_BT)
        return torch.cat([hidden_BTH[row, : len(segment)] for row, segment in enumerate(pack)])
