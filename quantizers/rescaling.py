"""Function-preserving rescalings of a float block: a producer's channels are divided by s, its consumers' multiplied.

norm -> linears    norm weight and bias / s, the linears' input columns * s
v -> o             v's rows and bias / s, o's columns * s; only where each has its own channel (no grouped queries)
up -> down         up's rows and bias / s, down's columns * s; exact, since act(gate) * up is linear in up

Norms and biases are stored in the model's dtype. So that rounding them changes nothing, the scale that the consumers
get is taken from the rounded norm: s_eff = norm / rounded(norm / s).
Sources: Xiao et al. 2023 (SmoothQuant), arXiv:2211.10438, eq. 3; Lin et al. 2023 (AWQ), arXiv:2306.00978, eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantizers.errors import QuantizationError
from quantizers.families import Family, linear_at
from quantizers.method import BlockTransform
from quantizers.quantized_weight import QuantizedWeight


@dataclass
class Rescaling:
    """A block being rewritten; the block itself is not touched.

    Args:
        weights: linear -> its float32 weight so far, for those that changed.
        dense: parameter within the block -> its changed value in the model's dtype.
        input_scales: linear -> what its inputs are divided by.
        output_scales: linear -> what its outputs are divided by.
    """

    block: nn.Module
    family: Family
    weights: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    output_scales: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """A linear's float32 [O, I] weight as rewritten so far."""
        return self.weights[name] if name in self.weights else linear_at(self.block, name).weight.float()

    def norm_to_linears(self, norm: str, linears: tuple[str, ...], scale_I: Tensor) -> None:
        """Divide what a norm puts out by `scale_I` (float32, above 0); the linears that read it make up for it."""
        module = self.block.get_submodule(norm)
        offset = self.family.norm_offset
        weight = _parameter(module, norm, "weight")
        old = weight.float() + offset
        # A scale of one leaves the very weight, which adding and taking away the offset need not.
        new = torch.where(scale_I == 1, weight, (old / scale_I - offset).to(weight.dtype))
        changed = new.float() + offset
        # Where a channel is switched off, or rounds to nothing, any scale will do.
        usable = (old != 0) & (changed != 0)
        effective = torch.where(usable, old / torch.where(usable, changed, 1.0), scale_I)
        self.dense[f"{norm}.weight"] = new
        bias = getattr(module, "bias", None)
        if bias is not None:
            self.dense[f"{norm}.bias"] = (bias.float() / effective).to(bias.dtype)
        for name in linears:
            self._multiply_columns(name, effective)

    def linear_to_linear(self, producer: str, consumer: str, scale_O: Tensor) -> None:
        """Divide what a linear puts out by `scale_O` (float32, above 0) and make up for it in the one that reads it."""
        self.weights[producer] = self.weight(producer) / scale_O[:, None]
        self.output_scales[producer] = self.output_scales.get(producer, torch.ones_like(scale_O)) * scale_O
        bias = linear_at(self.block, producer).bias
        if bias is not None:
            self.dense[f"{producer}.bias"] = (bias.float() / scale_O).to(bias.dtype)
        self._multiply_columns(consumer, scale_O)

    def _multiply_columns(self, name: str, scale_I: Tensor) -> None:
        self.weights[name] = self.weight(name) * scale_I
        self.input_scales[name] = self.input_scales.get(name, torch.ones_like(scale_I)) * scale_I

    def transform(self, targets: dict[str, Tensor] | None = None) -> BlockTransform:
        """What the engine needs to know of it."""
        return BlockTransform(
            references=self.weights,
            targets=targets or {},
            dense=self.dense,
            input_scales=self.input_scales,
            output_scales=self.output_scales,
        )


@dataclass(frozen=True, kw_only=True)
class RestoredWeight:
    """A linear of a rescaled block as it acts in the block as it was: among linears that were rescaled otherwise, or
    not at all.

    Args:
        weight: of the rescaled block.
        input_scale_I: what its inputs were divided by; None is ones.
        output_scale_O: what its outputs were divided by, likewise.
    """

    weight: QuantizedWeight
    input_scale_I: Tensor | None = None
    output_scale_O: Tensor | None = None

    def decode(self) -> Tensor:
        """The float32 [O, I] weight that computes, on the block's own inputs, what this one did on rescaled ones."""
        value_OI = self.weight.decode()
        if self.input_scale_I is not None:
            value_OI = value_OI / self.input_scale_I
        return value_OI if self.output_scale_O is None else value_OI * self.output_scale_O[:, None]


def value_reaches_output_unmixed(block: nn.Module, family: Family) -> bool:
    """Whether channel j of v's output is channel j of o's input, as without grouped queries."""
    value, output = linear_at(block, family.attention_inputs[2]), linear_at(block, family.attention_output)
    return value.out_features == output.in_features


def _parameter(module: nn.Module, name: str, field_name: str) -> Tensor:
    value = getattr(module, field_name, None)
    if not isinstance(value, Tensor):
        raise QuantizationError(f"{name} ({type(module).__name__}) has no {field_name} to rescale")
    if not torch.isfinite(value).all():
        raise QuantizationError(f"{name}.{field_name} holds NaN or infinity")
    return value
