"""Where groups of linears lie in a model: a grid of kinds (rows) by blocks (columns). Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from orchestrator.atlas import labels
from orchestrator.atlas.layer_figures import layer_place
from orchestrator.search.space import LEFT_ALONE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.search.space import Allocation, Choice, Space


@dataclass(frozen=True)
class Grid:
    """Groups by name, each in its square; experts of one block share a square.

    Args:
        names: of the groups, in the model's order.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, space: Space) -> Grid:
        """The grid of a space's groups."""
        return cls(tuple(group.name for group in space.groups))

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Kind as in the names -> as a reader sees it: "self_attn.q_proj+k_proj" is "q+k" where nothing else is."""
        full = dict.fromkeys(kind for block, kind in map(layer_place, self.names) if block is not None)
        short = [_short(kind) for kind in full]
        return {kind: one if short.count(one) == 1 else kind for kind, one in zip(full, short, strict=True)}

    @cached_property
    def blocks(self) -> list[int]:
        """Their numbers, rising."""
        return sorted({block for block, _ in map(layer_place, self.names) if block is not None})

    @cached_property
    def squares(self) -> Mapping[tuple[str, int], list[str]]:
        """(kind as a reader sees it, block) -> names of its groups."""
        found: dict[tuple[str, int], list[str]] = {}
        for name in self.names:
            block, kind = layer_place(name)
            if block is not None:
                found.setdefault((self.kinds[kind], block), []).append(name)
        return found

    @cached_property
    def outside(self) -> list[str]:
        """Groups that lie in no block."""
        return [name for name in self.names if layer_place(name)[0] is None]

    def label(self, name: str) -> str:
        """ "block 1 down"; the full name where that says too little."""
        block, kind = layer_place(name)
        if block is None or len(self.squares[self.kinds[kind], block]) > 1:
            return labels.plain(name)
        return f"block {block} {self.kinds[kind]}"


def _short(kind: str) -> str:
    return "+".join(part.removesuffix("_proj") for part in kind.rpartition(".")[2].split("+"))


@dataclass(frozen=True, kw_only=True)
class BitsSquare:
    """What an allocation gives the groups of one square."""

    text: str  # bits of the codes; of several groups the mean
    stored_bits: float  # per weight
    stored_bytes: int
    share: float  # of all weights
    choices: tuple[Choice, ...]


def bits_squares(space: Space, grid: Grid, allocation: Allocation) -> dict[tuple[str, int], BitsSquare]:
    """An allocation on the grid of its space's groups."""
    given = {group.name: (group, choice) for group, choice in zip(space.groups, space.choices(allocation), strict=True)}
    found = {}
    for place, names in grid.squares.items():
        pairs = [given[name] for name in names]
        weights = sum(group.num_weights for group, _ in pairs)
        stored = sum(choice.stored_bytes for _, choice in pairs)
        mean = sum(group.num_weights * choice.weight_bits for group, choice in pairs) / weights
        found[place] = BitsSquare(
            text=f"{mean:.1f}".removesuffix(".0"),
            stored_bits=8 * stored / weights,
            stored_bytes=stored,
            share=weights / space.num_weights,
            choices=tuple(dict.fromkeys(choice for _, choice in pairs)),
        )
    return found


def compact(grid: Grid, texts: Mapping[tuple[str, int], str], width: int | None = None) -> list[list[tuple[str, str]]]:
    """Lines of (label, squares), a heading and one per kind, all of one length; more than one such list where narrow.

    Args:
        grid: of the groups.
        texts: of each square; a square that has none is a dot.
        width: of a line; None is as long as it takes.
    """
    size = max((len(text) for text in texts.values()), default=1)
    size += size > 1  # digits of one square stand together, those of two apart
    margin = max((len(kind) for kind in grid.kinds.values()), default=0)
    room = len(grid.blocks) if width is None else max(1, (width - margin - 2) // size)
    pieces = []
    for start in range(0, len(grid.blocks), room):
        blocks = grid.blocks[start : start + room]
        lines = [("", _ruler(blocks, size))]
        for kind in grid.kinds.values():
            lines.append((kind, "".join(texts.get((kind, block), "·").rjust(size) for block in blocks)))
        pieces.append(lines)
    return pieces


def _ruler(blocks: Sequence[int], size: int) -> str:
    """Every tenth block's number, over its square or from there on."""
    line = [" "] * (size * len(blocks))
    for index, block in enumerate(blocks):
        if block % 10 == 0 or index == 0:
            text, start = str(block), index * size + size - 1
            if start + len(text) <= len(line) and all(char == " " for char in line[max(0, start - 1) : start]):
                line[start : start + len(text)] = text
    return "".join(line)


def short_choice(weight_bits: int, group_size: int) -> str:
    """ "3-g64", as the search names its uniform starts; "3-pc" is per channel, "16" left alone."""
    if weight_bits == LEFT_ALONE:
        return str(LEFT_ALONE)
    return f"{weight_bits}-{f'g{group_size}' if group_size else 'pc'}"


def choice_name(weight_bits: int, group_size: int) -> str:
    """ "3 bits, g64"; an embedding or a head may be "left alone"."""
    if weight_bits == LEFT_ALONE:
        return "left alone"
    return f"{labels.counted(weight_bits, 'bit')}, {f'g{group_size}' if group_size else 'per channel'}"
