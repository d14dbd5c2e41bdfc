"""Where the engine takes a model's parts from, so that only the block at work needs to be on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from quantizers.families import Family, blocks_of, family_of


class BlockSource(Protocol):
    """A causal language model, handed out in parts."""

    @property
    def family(self) -> Family:
        """Where things are inside a block."""

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""

    @property
    def device(self) -> torch.device:
        """Where the parts are handed out."""

    def block(self, index: int) -> nn.Module:
        """A private copy of a block with its float weights, on the device: its parameters may be replaced (not
        written to)."""

    def shell(self) -> AbstractContextManager[nn.Module]:
        """The model with everything but its blocks in place on the device: embeddings, positions, final norm."""


class InMemory:
    """A model that is in memory already, all of it on one device; it is left as it is."""

    def __init__(self, model: nn.Module) -> None:
        """Take a transformers causal LM whose `config.model_type` has a row in `families.py`.

        Raises:
            QuantizationError: unknown family.
        """
        self._model = model
        self.family = family_of(model)
        self._blocks = blocks_of(model, self.family)

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return len(self._blocks)

    @property
    def device(self) -> torch.device:
        """The model's own."""
        return next(self._model.parameters()).device

    def block(self, index: int) -> nn.Module:
        """A copy that shares its tensors with the model."""
        return private_copy(self._blocks[index])

    @contextmanager
    def shell(self) -> Iterator[nn.Module]:
        """The model itself."""
        yield self._model


def private_copy(block: nn.Module) -> nn.Module:
    """The same modules again around the very same tensors."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})
