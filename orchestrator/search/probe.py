"""How far a mixed model is from the float one: losses on some windows, with everything in memory.

The float model's most likely tokens are known; of a forward pass only those blocks are run that come from the first one
on that differs from a base whose hidden states are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from evaluators.divergence import token_losses
from evaluators.head import hidden_states, split, target_chunks
from orchestrator.search.mixtures import Mixture, Mixtures
from quantizers.families import blocks_of, family_of
from quantizers.vocabulary import EMBEDDING

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from evaluators.divergence import TopTokens
    from orchestrator.search.space import Group

_PREFIX_BYTES = 4 << 30


class WindowLoss(NamedTuple):
    """Means over the predicted tokens of a window, in nats: KL(float || mixture), and the negative log-likelihood."""

    divergence: float
    nll: float


class Probe:
    """Measures mixtures of one model, and gives it back as it was."""

    def __init__(
        self,
        mixtures: Mixtures,
        windows: NDArray[np.int64],
        reference: Callable[[int], TopTokens],
        *,
        prefix_bytes: int = _PREFIX_BYTES,
    ) -> None:
        """Take a model with its float weights in place.

        Args:
            mixtures: of the model.
            windows: int64 [W, T], whole ones.
            reference: window -> what the float model finds likely there.
            prefix_bytes: the most that hidden states of a base may take; windows beyond that are run whole.
        """
        self._parts = split(mixtures.model)
        family = family_of(mixtures.model)
        self._blocks = blocks_of(mixtures.model, family)
        self._mixtures, self._windows, self._reference = mixtures, windows, reference
        self._first_block = [_first_block(group, family.blocks, len(self._blocks)) for group in mixtures.space.groups]
        self._base: Mixture | None = None
        self._prefixes: dict[int, list[Tensor]] = {}  # of the base: window -> hidden states before each block
        self._prefix_bytes, self._held_bytes = prefix_bytes, 0

    def close(self) -> None:
        """Put the float weights back."""
        self._mixtures.close()
        self._prefixes.clear()

    @torch.inference_mode()
    def losses(self, mixture: Mixture, windows: Sequence[int], *, base: Mixture | None = None) -> list[WindowLoss]:
        """Measure one mixture.

        Args:
            windows: indices of windows.
            base: a mixture that it shares its first blocks with, and others after it will; None runs all blocks. What
                is measured is the same to the bit.
        """
        start = 0
        if base is not None:
            start = self._shared_blocks(mixture, base)
            if start:
                self._keep(base, windows)
        self._mixtures.apply(mixture)
        return [self._loss(window, start if window in self._prefixes else 0) for window in windows]

    def _shared_blocks(self, mixture: Mixture, base: Mixture) -> int:
        """How many blocks from the first on are the same."""
        triples = zip(self._first_block, mixture, base, strict=True)
        return min((block for block, one, other in triples if one != other), default=len(self._blocks))

    def _keep(self, base: Mixture, windows: Sequence[int]) -> None:
        """Have the base's hidden states of these windows, as far as there is room."""
        if base != self._base:
            self._prefixes.clear()
            self._base, self._held_bytes = base, 0
        missing = [window for window in windows if window not in self._prefixes]
        if not missing or self._held_bytes >= self._prefix_bytes:
            return
        self._mixtures.apply(base)
        for window in missing:
            if self._held_bytes >= self._prefix_bytes:
                return
            with self._recorded() as hidden:
                self._forward(window)
            self._prefixes[window] = hidden
            self._held_bytes += sum(states.nbytes for states in hidden)

    def _loss(self, window: int, start: int) -> WindowLoss:
        with self._begun(window, start):
            hidden_NH = self._forward(window)
        reference, ids_N = self._reference(window), torch.tensor(self._windows[window, 1:])
        divergences, nlls = [], []
        for first, logits, _, targets in target_chunks(self._parts, hidden_NH, torch.arange(len(ids_N)), ids_N):
            own = reference.rows(first, first + len(logits))
            divergence_N, nll_N = token_losses(own, logits.float(), targets)
            divergences.append(divergence_N)
            nlls.append(nll_N)
        return WindowLoss(float(torch.cat(divergences).mean()), float(torch.cat(nlls).mean()))

    def _forward(self, window: int) -> Tensor:
        """Hidden states [T - 1, H] of all positions that have a token after them."""
        ids_BT = torch.tensor(self._windows[window : window + 1]).to(self._parts.device)
        return hidden_states(self._parts, ids_BT)[0, :-1]

    @contextmanager
    def _recorded(self) -> Iterator[list[Tensor]]:
        """What goes into each block, and out of the last one, of the forward pass within."""
        hidden: list[Tensor] = []
        with ExitStack() as undo:
            for block in self._blocks:
                hook = block.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
                undo.callback(hook.remove)
            last = self._blocks[-1].register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
            undo.callback(last.remove)
            yield hidden

    @contextmanager
    def _begun(self, window: int, start: int) -> Iterator[None]:
        """Of the forward pass within, the first `start` blocks do nothing, and the last of them gives what is kept.

        A block's own `forward` is covered, so that its other attributes, which decoders ask for, stay what they are.
        """
        if not start:
            yield
            return
        kept = self._prefixes[window][start]
        with ExitStack() as undo:
            for index, block in enumerate(self._blocks[:start]):
                value = kept if index == start - 1 else None
                block.forward = _passing(value)
                undo.callback(delattr, block, "forward")
            yield


def _passing(value: Tensor | None) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states if value is None else value

    return forward


def _first_block(group: Group, blocks: str, num_blocks: int) -> int:
    """The first block whose output depends on a group: all blocks on the embedding, none on the head."""
    if group.role:
        return 0 if group.role == EMBEDDING else num_blocks
    return int(group.linears[0].removeprefix(f"{blocks}.").partition(".")[0])
