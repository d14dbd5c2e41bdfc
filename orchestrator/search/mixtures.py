"""Mixtures of a bank's variants in a model: of each only the linears that differ from the last one are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.search.space import LEFT_ALONE, Space
from quantizers.bank import Bank, Variant

Key = tuple[int, int]
"""(weight_bits, group_size)."""
Mixture = tuple[int | None, ...]
"""Of each group the index of its choice, or None for its float weights: an allocation is one without None."""


class Mixtures:
    """One model and what may be in it.

    Attributes:
        model: a transformers causal LM.
        space: whose groups and choices mixtures speak of.
    """

    def __init__(self, model: Any, space: Space, variants: Mapping[str, Mapping[Key, Variant]]) -> None:
        """Take a model with its float weights in place; nobody else changes its weights until `close`.

        Args:
            variants: linear, or matrix over the vocabulary -> (weight_bits, group_size) -> as it is stored; one for
                each choice of its group.
        """
        self.model, self.space = model, space
        self._bank: Bank[Key] = Bank(model, variants)

    def apply(self, mixture: Mixture) -> None:
        """Have a mixture in the model."""
        choice: dict[str, Key | None] = {}
        for group, index in zip(self.space.groups, mixture, strict=True):
            found = None if index is None else group.choices[index]
            if found is not None and found.weight_bits != LEFT_ALONE:
                choice |= dict.fromkeys(group.linears, (found.weight_bits, found.group_size))
        self._bank.apply(choice)

    def close(self) -> None:
        """Put the float weights back."""
        self._bank.apply({})
