"""SmoothQuant: move the size of activation outliers into the weights, then round both to nearest.

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) for each channel j between a norm and the linears that read it
(q, k, v; gate, up). o and down are quantized but not smoothed.
Source: Xiao et al. 2023, arXiv:2211.10438, eq. 4, and the released code's floors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantizers.errors import QuantizationError
from quantizers.families import linear_at
from quantizers.method import BlockTransform, FloatBlock, LinearGroup, Method, MethodOutcome, Needs
from quantizers.rescaling import Rescaling
from quantizers.rtn import round_to_nearest

_FLOOR = 1e-5


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Method):
    """SmoothQuant's options.

    Args:
        alpha: how much of the activations' range moves into the weights, 0 to 1 (0.5; 0.85 for Llama 2 and 3).
        smooth: whether to smooth at all; a sibling study of this one ran without it, and called it SmoothQuant.
        quantize_qkv_outputs: quantize what q, k and v put out, as the released Llama evaluation does.
    """

    path: str = "float"
    alpha: float = 0.5
    smooth: bool = True
    quantize_qkv_outputs: bool = False

    name: ClassVar[str] = "smoothquant"
    code_version: ClassVar[str] = "smoothquant/1"
    default_convention: ClassVar[str] = "sq-sym"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "corrected": {},
        "as_published": {"quantize_qkv_outputs": True},
        "unsmoothed": {"smooth": False, "quantize_qkv_outputs": True},
    }

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            QuantizationError: a value outside its rule.
        """
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise QuantizationError(f"options.alpha = {self.alpha} must be from 0 to 1")
        if self.path != "float":
            raise QuantizationError(
                "options.path = 'quantized': smoothquant calibrates on the float path; leave it out"
            )
        if self.quantized_outputs and self.activations is not None and self.activations.static:
            raise QuantizationError(
                "options.quantize_qkv_outputs has no static scales; use activation_granularity: per_token, or set it "
                "to false"
            )

    @property
    def needs(self) -> Needs:
        """How far the inputs of each linear range."""
        return replace(super().needs, ranges=True)

    @property
    def quantized_outputs(self) -> bool:
        """By option."""
        return self.quantize_qkv_outputs

    def transform(self, block: FloatBlock) -> BlockTransform:
        """Smooth what the two norms put out."""
        if not self.smooth:
            return BlockTransform()
        family = block.family
        rescaling = Rescaling(block.block, family)
        for norm, stage in ((family.attention_norm, 0), (family.mlp_norm, 2)):
            linears = family.stages[stage]
            if self.leaves_alone(block.prefix + linears[0]):
                continue
            weights = [linear_at(block.block, name).weight for name in linears]
            scale_I = smoothing_scale(block.ranges[stage].max_abs_I, weights, self.alpha)
            rescaling.norm_to_linears(norm, linears, scale_I)
        return rescaling.transform()

    def quantize(self, group: LinearGroup) -> MethodOutcome:
        """Round each weight to nearest."""
        return MethodOutcome(weights=[round_to_nearest(weight, self.grid) for weight in group.weights])


def smoothing_scale(max_abs_I: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """s of eq. 4, float32 [I], at least 1e-5.

    Args:
        max_abs_I: largest magnitude of each input channel over the calibration tokens.
        weights: [O, I] of all linears that read these channels.
        alpha: migration strength.
    """
    weight_I = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0).clamp(min=_FLOOR)
    return (max_abs_I.clamp(min=_FLOOR).pow(alpha) / weight_I.pow(1 - alpha)).clamp(min=_FLOOR)
