"""How far an allocation's model is from the float one: the divergence on some windows, with everything in memory.

The float model's most likely tokens are recorded once; then only the linears that an allocation changes are decoded,
and each probe is one pass over its windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.search.space import Allocation, Space

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evaluators.divergence import TopTokens
    from quantizers.bank import Bank, Variant

    Key = tuple[int, int]
    Variants = Mapping[str, Mapping[Key, Variant]]


class Probe:
    """Measures allocations of one model."""

    def __init__(self, model: Any, space: Space, variants: Variants, windows: NDArray[np.int64]) -> None:
        """Record what the float model finds likely.

        Args:
            model: a transformers causal LM with its float weights; the probe owns it from now on.
            space: whose allocations are measured.
            variants: linear -> (weight_bits, group_size) -> as it is stored; one for each choice of its group.
            windows: int64 [W, T], which calibration did not see.
        """
        from evaluators.divergence import Recorder
        from evaluators.perplexity import perplexity, window_tokens
        from quantizers.bank import Bank

        self._model, self._space, self._windows = model, space, windows
        self._tokens = window_tokens(windows)
        self._reference: list[TopTokens] = []
        recorder = Recorder(self._tokens, lambda _, found: self._reference.append(found))
        self.float_perplexity = perplexity(model, windows, observe=recorder).perplexity
        self._bank: Bank[Key] = Bank(model, variants)

    def divergence(self, allocation: Allocation, *, first: int = 0, count: int | None = None) -> float:
        """KL(float || allocation) in nats, averaged over the tokens of `count` windows from the `first` one on."""
        return self._of(self._choice(allocation), first, count)

    def divergence_of_one(self, place: int, index: int, base: Allocation | None, *, count: int | None = None) -> float:
        """The same with one group's choice in an otherwise float model (`base` None) or on top of an allocation."""
        choice = {} if base is None else self._choice(base)
        one = self._space.groups[place]
        found = one.choices[index]
        return self._of(choice | dict.fromkeys(one.linears, (found.weight_bits, found.group_size)), 0, count)

    def _choice(self, allocation: Allocation) -> dict[str, Key]:
        pairs = zip(self._space.groups, self._space.choices(allocation), strict=True)
        return {name: (choice.weight_bits, choice.group_size) for group, choice in pairs for name in group.linears}

    def _of(self, choice: Mapping[str, Key], first: int, count: int | None) -> float:
        from evaluators.divergence import Comparison
        from evaluators.perplexity import perplexity

        self._bank.apply(choice)
        part = slice(first, None if count is None else first + count)
        comparison = Comparison(self._tokens[part], self._reference[part].__getitem__)
        perplexity(self._model, self._windows[part], observe=comparison)
        return comparison.result().kl_divergence
