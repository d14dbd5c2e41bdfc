"""Token sequences -> segments in which every shared prefix is computed once. Pure: no torch, no model.

Sorted sequences form a trie. It is cut into segments: small tries that are run whole. The tokens between the root and a
segment are its prefix; the keys and values of a prefix are kept from when it was run itself. Where a shared prefix is
too short to be worth keeping, the segments below repeat it.
A segment's tokens stand in depth-first order: token j is an ancestor of token i, or i itself, where j <= i < end[j].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What computing costs, in units of one token's way through the linears.

    Attributes:
        pair: one query that looks at one key.
        segment: one more segment, which has calls of its own for attention.
        wait: one kept prefix: what continues it cannot run in the same pack.
    """

    pair: float
    segment: float = 2.0
    wait: float = 64.0

    def of(self, size: int, prefix: int) -> float:
        """A segment of `size` tokens after `prefix` others; every pair is computed, masked or not."""
        return size * (1 + self.pair * (prefix + size)) + self.segment


@dataclass(frozen=True)
class Scored:
    """Where one sequence's hidden states are wanted.

    Attributes:
        sequence: its index.
        first: the first wanted position.
        nodes: index in the segment of each position from `first` on.
    """

    sequence: int
    first: int
    nodes: Sequence[int]


@dataclass(eq=False, kw_only=True)
class Segment:
    """A part of the trie that is run at once, in depth-first order.

    Attributes:
        prefix: the kept segment that these tokens continue; None where they begin a sequence.
        start: tokens before these: where the prefix ends.
        tokens: token ids.
        depth: of each token: its position in its sequences.
        end: of each token: the index after its last descendant.
        scored: where hidden states are wanted.
        num_finished: sequences whose last wanted token is here.
        num_children: segments that continue this one; above 0, its keys and values are kept until they have run.
    """

    prefix: Segment | None
    start: int
    tokens: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    num_finished: int = 0
    num_children: int = 0

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether no token has two children: a plain causal sequence."""
        return all(end == len(self.tokens) for end in self.end)


def segments_of(sequences: Sequence[Tokens], scored_from: Sequence[int], cost: Cost) -> list[Segment]:
    """Cut the trie of some sequences into segments, in an order in which prefixes come first.

    At each branching the cheapest of three is taken: the trie below is one segment; its branches are cut apart and each
    repeats what they share; or what they share becomes a kept prefix.

    Args:
        sequences: distinct, not empty, in ascending order.
        scored_from: per sequence, the first position whose hidden state is wanted.
        cost: of computing.
    """
    return list(_Planner(sequences, scored_from, cost).segments()) if sequences else []


def packs_of(segments: Iterable[Segment], max_tokens: int) -> Iterator[list[Segment]]:
    """Segments in their order, in packs of at most `max_tokens`; a longer one is a pack of its own.

    No pack holds a segment together with its own prefix, which must have run before.
    """
    pack: list[Segment] = []
    size = 0
    for segment in segments:
        if pack and (size + len(segment) > max_tokens or segment.prefix in pack):
            yield pack
            pack, size = [], 0
        pack.append(segment)
        size += len(segment)
    if pack:
        yield pack


def num_distinct_tokens(sequences: Sequence[Tokens]) -> int:
    """Tokens of the whole trie: the least that any plan computes. Sequences are in ascending order."""
    shared = _shared_with_previous(sequences)
    return sum(map(len, sequences)) - int(shared.sum())


def _shared_with_previous(sequences: Sequence[Tokens]) -> npt.NDArray[np.int64]:
    shared = np.zeros(len(sequences), dtype=np.int64)
    for index in range(1, len(sequences)):
        shared[index] = _common_length(sequences[index - 1], sequences[index])
    return shared


def _common_length(one: Tokens, other: Tokens) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices compare in C, so bisecting beats walking
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class _Part:
    """Sequences low to high - 1, whose first `start` tokens are the prefix's."""

    low: int
    high: int
    prefix: Segment | None
    start: int


class _Planner:
    def __init__(self, sequences: Sequence[Tokens], scored_from: Sequence[int], cost: Cost) -> None:
        self._sequences = sequences
        self._scored_from = scored_from
        self._cost = cost
        self._shared = _shared_with_previous(sequences)
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        self._added = np.concatenate([[0], np.cumsum(lengths - self._shared)])  # tokens that sequences before i add

    def segments(self) -> Iterator[Segment]:
        waiting = [_Part(0, len(self._sequences), None, 0)]
        while waiting:
            part = waiting.pop()
            if not self._size(part.low, part.high, part.start):
                continue  # a sequence that is all prefix
            bounds = self._branches(part)
            common = self._common(part)
            # The least of equals, so a single sequence (one branch) stays whole.
            whole, apart, kept = self._prices(part, bounds, common)
            if len(bounds) < 3 or whole <= min(apart, kept):
                yield self._grown(part)
                continue
            prefix, start = part.prefix, part.start
            if kept < apart:
                prefix, start = self._chain(part, common), common
                yield prefix
            for low, high in reversed(self._grouped(bounds, start, common)):
                waiting.append(_Part(low, high, prefix, start))

    def _size(self, low: int, high: int, start: int) -> int:
        """Distinct tokens of sequences low to high - 1 from position `start` on."""
        return len(self._sequences[low]) - start + int(self._added[high] - self._added[low + 1])

    def _common(self, part: _Part) -> int:
        """Tokens that all sequences of a part share."""
        if part.high - part.low == 1:
            return len(self._sequences[part.low])
        return int(self._shared[part.low + 1 : part.high].min())

    def _branches(self, part: _Part) -> list[int]:
        """Where the branches at the part's first branching begin, and where the last ends."""
        between = self._shared[part.low + 1 : part.high]
        cuts = np.flatnonzero(between == self._common(part)) + part.low + 1
        return [part.low, *(int(cut) for cut in cuts), part.high]

    def _prices(self, part: _Part, bounds: list[int], common: int) -> tuple[float, float, float]:
        cost, chain = self._cost, common - part.start
        whole = cost.of(self._size(part.low, part.high, part.start), part.start)
        sizes = [self._size(low, high, common) for low, high in pairwise(bounds)]
        apart = sum(cost.of(chain + size, part.start) for size in sizes)
        if not chain:
            return whole, apart, float("inf")
        kept = cost.of(chain, part.start) + cost.wait + sum(cost.of(size, common) for size in sizes)
        return whole, apart, kept

    def _grouped(self, bounds: list[int], start: int, common: int) -> list[tuple[int, int]]:
        """Neighbouring branches in one segment where that is cheaper than one each."""
        cost, chain = self._cost, common - start
        groups = [(bounds[0], bounds[1])]
        for low, high in pairwise(bounds[1:]):
            size, last = self._size(low, high, common), groups[-1]
            before = self._size(*last, common)
            together = cost.of(chain + before + size, start)
            if together <= cost.of(chain + before, start) + cost.of(chain + size, start):
                groups[-1] = (last[0], high)
            else:
                groups.append((low, high))
        return groups

    def _chain(self, part: _Part, common: int) -> Segment:
        """What all sequences of a part share, as a prefix to keep."""
        segment = self._open(part)
        segment.tokens = list(self._sequences[part.low][part.start : common])
        segment.depth = list(range(part.start, common))
        segment.end = [len(segment)] * len(segment)
        for index in range(part.low, part.high):
            first = max(self._scored_from[index], part.start)
            if first < common:
                segment.scored.append(Scored(index, first, range(first - part.start, common - part.start)))
            segment.num_finished += len(self._sequences[index]) == common
        return segment

    def _grown(self, part: _Part) -> Segment:
        """A part as one segment."""
        segment, path = self._open(part), list[int]()
        for index in range(part.low, part.high):
            tokens = self._sequences[index]
            shared = part.start if index == part.low else max(part.start, int(self._shared[index]))
            for node in path[shared - part.start :]:
                segment.end[node] = len(segment)
            del path[shared - part.start :]
            for position in range(shared, len(tokens)):
                path.append(len(segment))
                segment.tokens.append(tokens[position])
                segment.depth.append(position)
                segment.end.append(0)
            first = max(self._scored_from[index], part.start)
            if first < len(tokens):
                segment.scored.append(Scored(index, first, path[first - part.start :]))
            segment.num_finished += len(tokens) > part.start
        for node in path:
            segment.end[node] = len(segment)
        return segment

    def _open(self, part: _Part) -> Segment:
        if part.prefix is not None:
            part.prefix.num_children += 1
        return Segment(prefix=part.prefix, start=part.start)
