"""The allocations of bits that a search may choose among, and what each takes, to the byte. Pure.

Linears that share their input are one group and share a choice: q, k and v; o; gate and up; down of each block.
Embedding and head, where they are searched too, are groups of their own. An allocation is one index per group, into the
group's choices in their order of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

from orchestrator.errors import BitatlasError

if TYPE_CHECKING:
    from orchestrator.scheme import Scheme
    from quantizers.grid import Grid
    from quantizers.vocabulary import VocabularyMatrix

Allocation = tuple[int, ...]
LEFT_ALONE = 16


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to quantize a group.

    Args:
        weight_bits: bits per code; 16 leaves the weights as they are.
        group_size: 0 is per channel.
        stored_bytes: of the group's linears together, scales and zeros included.
    """

    weight_bits: int
    group_size: int
    stored_bytes: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Linears that share a choice.

    Args:
        linears: full names.
        num_weights: of all of them.
        choices: in rising order of bytes; one alone where the group is pinned.
        role: "embedding" or "head"; empty of the decoder's linears.
    """

    linears: tuple[str, ...]
    num_weights: int
    choices: tuple[Choice, ...]
    role: str = ""

    @property
    def name(self) -> str:
        """`model.layers.3.self_attn.q_proj+k_proj+v_proj`."""
        return "+".join([self.linears[0], *(name.rpartition(".")[2] for name in self.linears[1:])])


@dataclass(frozen=True)
class Space:
    """All groups of a model, in order."""

    groups: tuple[Group, ...]

    @cached_property
    def num_weights(self) -> int:
        """Weights of all groups."""
        return sum(group.num_weights for group in self.groups)

    @cached_property
    def least(self) -> Allocation:
        """The allocation of the fewest bytes."""
        return (0,) * len(self.groups)

    @cached_property
    def most(self) -> Allocation:
        """The allocation of the most bytes."""
        return tuple(len(group.choices) - 1 for group in self.groups)

    def choices(self, allocation: Allocation) -> list[Choice]:
        """What each group gets."""
        return [group.choices[index] for group, index in zip(self.groups, allocation, strict=True)]

    def stored_bytes(self, allocation: Allocation) -> int:
        """Of all groups, scales and zeros included."""
        return sum(choice.stored_bytes for choice in self.choices(allocation))

    def bits_per_weight(self, allocation: Allocation) -> float:
        """Stored bits of each weight, on average."""
        return 8 * self.stored_bytes(allocation) / self.num_weights

    def budget(self, bits_per_weight: float, where: str) -> int:
        """The bytes of a budget in stored bits per weight.

        Raises:
            BitatlasError: nothing fits it, or there is nothing to choose.
        """
        return self.check_budget(int(bits_per_weight * self.num_weights / 8), where)

    def check_budget(self, budget_bytes: int, where: str) -> int:
        """The budget, if an allocation fits it and there is something to choose.

        Raises:
            BitatlasError: names the least that is possible, or says that every group has one choice.
        """
        if all(len(group.choices) == 1 for group in self.groups):
            raise BitatlasError(
                f"{where}: every group of linears has one choice alone, so that there is nothing to search; give more "
                "weight_bits, or pin fewer layers"
            )
        least = self.stored_bytes(self.least)
        if budget_bytes < least:
            raise BitatlasError(
                f"{where} of {budget_bytes} bytes ({8 * budget_bytes / self.num_weights:.3f} bits per weight) is below "
                f"the least possible: {least} bytes ({self.bits_per_weight(self.least):.3f} bits per weight)"
            )
        return budget_bytes

    def entry(self, scheme: Scheme, allocation: Allocation) -> dict[str, Any]:
        """A grid entry of a sweep file that quantizes so.

        Args:
            scheme: the method, whose bits and groups hold where nothing else is said.
        """
        layers: dict[str, dict[str, Any]] = {}
        matrices: dict[str, dict[str, Any]] = {}
        for group, choice in zip(self.groups, self.choices(allocation), strict=True):
            if group.role:
                if choice.weight_bits != LEFT_ALONE:
                    matrices[group.role] = _as_written(choice)
            elif (choice.weight_bits, choice.group_size) != (scheme.weight_bits, scheme.group_size):
                layers |= dict.fromkeys(group.linears, _as_written(choice))
        return scheme.as_entry() | ({"layers": layers} if layers else {}) | matrices


def _as_written(choice: Choice) -> dict[str, Any]:
    """A choice as a sweep file says it of single weights."""
    if choice.weight_bits == LEFT_ALONE:
        return {"weight_bits": LEFT_ALONE}
    return {"weight_bits": choice.weight_bits, "group_size": choice.group_size or "per_channel"}


def make_space(
    linears: Mapping[str, tuple[int, int]],
    schemes: Sequence[Scheme],
    pinned: Mapping[str, Scheme | None] | None = None,
    matrices: Sequence[Group] = (),
    *,
    bits_per_value: int = LEFT_ALONE,
) -> Space:
    """The space of a model.

    Args:
        linears: full name -> (out_features, in_features), in order.
        schemes: the choices: one method with several bits or groups.
        pinned: pattern of full names -> the one scheme that these linears get, or None, which leaves them alone; the
            first that fits counts.
        matrices: embedding and head, where they are searched.
        bits_per_value: of the model's dtype.
    Raises:
        BitatlasError: a pattern names no linear, or some of a group alone; or a scheme does not fit a linear.
    """
    from quantizers.errors import QuantizationError
    from quantizers.families import fused_groups

    pinned = pinned or {}
    for pattern in pinned:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise BitatlasError(f"pinned: {pattern!r} names no linear; full names are like {next(iter(linears))!r}")
    groups = []
    for names in fused_groups(linears):
        patterns = {next((pattern for pattern in pinned if fnmatchcase(name, pattern)), None) for name in names}
        if len(patterns) > 1:
            raise BitatlasError(
                f"pinned: {', '.join(names)} share their input and must share their choice; pin all of them or none"
            )
        (pin,) = patterns
        offered = schemes if pin is None else [pinned[pin]]
        shapes = {name: linears[name] for name in names}
        try:
            choices = {_choice(scheme, shapes, bits_per_value) for scheme in offered}
        except QuantizationError as error:
            raise BitatlasError(str(error)) from error
        groups.append(
            Group(
                linears=tuple(names),
                num_weights=sum(rows * columns for rows, columns in shapes.values()),
                choices=tuple(sorted(choices, key=lambda choice: (choice.stored_bytes, choice.weight_bits))),
            )
        )
    if all(choice.weight_bits == LEFT_ALONE for group in groups for choice in group.choices):
        raise BitatlasError("pinned: every linear is left alone, so that nothing is quantized")
    return Space((*groups, *matrices))


def matrix_group(role: str, matrix: VocabularyMatrix, grids: Sequence[Grid | None], bits_per_value: int) -> Group:
    """The embedding or the head with its choices.

    Args:
        grids: None leaves it alone.
        bits_per_value: of the model's dtype.
    """
    from quantizers.vocabulary import vocabulary_bytes

    num_weights = matrix.shape[0] * matrix.shape[1]
    choices = set()
    for grid in grids:
        if grid is None:
            choices.add(_left_alone(num_weights, bits_per_value))
        else:
            stored = vocabulary_bytes({role: grid}, {role: matrix})
            choices.add(Choice(weight_bits=grid.bits, group_size=grid.group_size, stored_bytes=stored))
    return Group(
        linears=(matrix.name,),
        num_weights=num_weights,
        choices=tuple(sorted(choices, key=lambda choice: (choice.stored_bytes, choice.weight_bits))),
        role=role,
    )


def _left_alone(num_weights: int, bits_per_value: int) -> Choice:
    return Choice(weight_bits=LEFT_ALONE, group_size=0, stored_bytes=num_weights * bits_per_value // 8)


def _choice(scheme: Scheme | None, shapes: Mapping[str, tuple[int, int]], bits_per_value: int) -> Choice:
    from quantizers.method import check_grids, total_stored_bytes

    if scheme is None:
        return _left_alone(sum(rows * columns for rows, columns in shapes.values()), bits_per_value)
    method = scheme.build()
    check_grids(method, shapes)
    return Choice(
        weight_bits=scheme.weight_bits,
        group_size=scheme.group_size,
        stored_bytes=total_stored_bytes(method, shapes),
    )
