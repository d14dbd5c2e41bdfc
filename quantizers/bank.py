"""Many quantized variants of a model's linears, resident, of which one at a time is in the model.

A search asks for hundreds of allocations that differ in a few linears each: only what changed is decoded. Variants are
kept as they are stored (packed where they come from an artifact), so that a bank of six bit-widths takes little more
than their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from quantizers.errors import QuantizationError
from quantizers.families import holders

Key = TypeVar("Key")


class Decodable(Protocol):
    """A `QuantizedWeight`, or what stands for one."""

    def decode(self) -> Tensor:
        """The float32 [O, I] weight that it stands for."""


Variant = Callable[[], Decodable]
"""Gives a variant when it is asked for: as it lies in memory, or read from where it is stored."""


class Bank(Generic[Key]):
    """The variants of one model; the float weights are kept, to be put back."""

    def __init__(self, model: nn.Module, variants: Mapping[str, Mapping[Key, Variant]]) -> None:
        """Take a model with its float weights in place.

        Args:
            model: whose weights are replaced, in its own dtype and on its own device.
            variants: full name of a linear, or of the embedding -> its variants by any key: bits and group size, say.
        Raises:
            QuantizationError: a name is neither a linear nor an embedding.
        """
        self._variants = variants
        self._holders = {name: holders(model, name) for name in variants}
        self._originals: dict[str, Any] = {name: modules[0].weight for name, modules in self._holders.items()}
        self._chosen: dict[str, Key | None] = dict.fromkeys(variants)

    @property
    def chosen(self) -> Mapping[str, Key | None]:
        """What is in the model: a linear's key, or None for its float weight."""
        return self._chosen

    @torch.inference_mode()
    def apply(self, choice: Mapping[str, Key | None]) -> list[str]:
        """Put variants into the model; linears that are not named get their float weights back.

        Args:
            choice: linear -> key of its variant; None is the float weight.
        Returns:
            the linears whose weights changed, in the order of the variants.
        Raises:
            QuantizationError: a linear or a variant that the bank does not have; nothing is changed then.
        """
        for name, key in choice.items():
            if name not in self._variants:
                raise QuantizationError(f"the bank has no linear {name}")
            if key is not None and key not in self._variants[name]:
                raise QuantizationError(f"the bank has no variant {key!r} of {name}")
        changed = [name for name in self._variants if choice.get(name) != self._chosen[name]]
        for name in changed:
            key = choice.get(name)
            weight = self._originals[name] if key is None else self._decoded(name, self._variants[name][key]())
            parameter = nn.Parameter(weight, requires_grad=False)
            for module in self._holders[name]:
                module.weight = parameter
            self._chosen[name] = key
        return changed

    def _decoded(self, name: str, variant: Decodable) -> Tensor:
        original, value = self._originals[name], variant.decode()
        if value.shape != original.shape:
            raise QuantizationError(f"{name}: a variant of shape {tuple(value.shape)}, not {tuple(original.shape)}")
        return value.to(original.device, original.dtype)
