"""AWQ: per-channel scales, searched so that the quantized block's outputs stay close, then clipping, then rounding.

s = x^r (released), or x^r / w^(1-r) (duo scaling), with x_j the mean magnitude of input channel j and r on a grid from
0 to 1; r = 0 leaves the weights alone. Each r is judged by the squared error of the output of the module that reads the
channels: the whole attention for q, k, v, the whole MLP for gate and up, the linear itself for o and down.
Source: Lin et al. 2023, arXiv:2306.00978, section 3.2, and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantizers.errors import QuantizationError
from quantizers.families import linear_at
from quantizers.grid import Grid, decode, encode, fit_group, round_to_grid
from quantizers.linalg import quadratic_form
from quantizers.method import BlockTransform, FloatBlock, LinearGroup, Method, MethodOutcome, Needs
from quantizers.rescaling import Rescaling, value_reaches_output_unmixed
from quantizers.rtn import round_to_nearest
from quantizers.statistics import Hessian, TokenSample

_FLOOR = 1e-4
_CLIP_DEPTH = 20  # bounds are m (1 - i / 20)


@dataclass(frozen=True, kw_only=True)
class Awq(Method):
    """AWQ's options.

    Args:
        duo_scaling: weigh the activations' magnitude against the weights' (newer implementations).
        clip: search a clipping bound per row and group after scaling, for all linears but q and k.
        num_ratios: candidates r = i / num_ratios.
        num_clips: candidate bounds m (1 - i / 20).
        clip_tokens: tokens on which clipping is judged.
        search_windows: calibration windows on which scales and clipping are judged; 0 is all of them. Mean magnitudes
            are always of all.
    """

    path: str = "float"
    duo_scaling: bool = False
    clip: bool = True
    num_ratios: int = 20
    num_clips: int = 10
    clip_tokens: int = 512
    search_windows: int = 2

    name: ClassVar[str] = "awq"
    code_version: ClassVar[str] = "awq/4"
    only_rescales: ClassVar[bool] = True
    default_convention: ClassVar[str] = "awq-asym"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"corrected": {}, "as_published": {"search_windows": 0}}

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            QuantizationError: a value outside its rule.
        """
        super().__post_init__()
        if self.path != "float":
            raise QuantizationError("options.path = 'quantized': awq calibrates on the float path; leave it out")
        for field, least, most in (
            ("num_ratios", 1, 1000),
            ("num_clips", 1, _CLIP_DEPTH),
            ("clip_tokens", 1, 1 << 20),
            ("search_windows", 0, 1 << 20),
        ):
            if not least <= getattr(self, field) <= most:
                raise QuantizationError(f"options.{field} = {getattr(self, field)} must be from {least} to {most}")

    @property
    def needs(self) -> Needs:
        """The block itself, the mean magnitudes of its inputs, and some tokens to judge by."""
        return replace(super().needs, block=True, ranges=True, sample=self.clip_tokens, windows=self.search_windows)

    def transform(self, block: FloatBlock) -> BlockTransform:
        """Search scales for the four places of a block in turn, each on the float block's own inputs; then clipping.

        As in the released code a later search sees the weights that earlier ones rescaled (up, whose rows the last
        one divides), and v -> o is left out where queries are grouped.
        """
        search = _Search(block, self)
        family = block.family
        means = [ranges.mean_abs_I for ranges in block.ranges]
        rescaling = search.rescaling
        searched = [not self.leaves_alone(block.prefix + stage[0]) for stage in family.stages]
        if searched[0]:
            rescaling.norm_to_linears(family.attention_norm, family.stages[0], search.attention_scale(means[0]))
        if searched[1] and value_reaches_output_unmixed(block.block, family):
            value = family.attention_inputs[2]
            rescaling.linear_to_linear(value, family.attention_output, search.linear_scale(1, means[1]))
        if searched[2]:
            rescaling.norm_to_linears(family.mlp_norm, family.stages[2], search.mlp_scale(means[2]))
        if searched[3]:
            rescaling.linear_to_linear(family.mlp_inputs[1], family.mlp_output, search.linear_scale(3, means[3]))
        return rescaling.transform(search.clipped() if self.clip else None)

    def quantize(self, group: LinearGroup) -> MethodOutcome:
        """Round each weight to nearest."""
        return MethodOutcome(weights=[round_to_nearest(weight, self.grid) for weight in group.weights])


class _Search:
    """One block's search: its activations, computed once, and the candidates' losses."""

    def __init__(self, block: FloatBlock, options: Awq) -> None:
        self._block, self._family, self._options, self._prefix = block.block, block.family, options, block.prefix
        self.rescaling = Rescaling(block.block, block.family)
        self._arguments = block.arguments
        self._inputs: dict[int, list[Tensor]] = {0: [], 2: []}  # of attention and MLP, to run them again
        self._samples: list[Tensor] = []  # of each stage's inputs, for clipping
        self._hessians: dict[int, Tensor] = {}  # of the stages whose module is the linear itself
        for number, (stage, inputs) in enumerate(block.walk):
            batches = list(inputs)
            sample = TokenSample(sum(batch.shape[0] * batch.shape[1] for batch in batches), options.clip_tokens)
            for batch in batches:
                sample.update(batch)
            self._samples.append(sample.value())
            if number in self._inputs:
                self._inputs[number] = batches
            else:
                weight = linear_at(block.block, stage[0]).weight
                hessian = Hessian(weight.shape[1], weight.device)
                for batch in batches:
                    hessian.update(batch)
                self._hessians[number] = hessian.value()

    def attention_scale(self, mean_abs_I: Tensor) -> Tensor:
        attention = self._block.get_submodule(self._family.attention)

        def run() -> Iterable[Tensor]:
            for batch, extra in zip(self._inputs[0], self._arguments, strict=True):
                yield attention(hidden_states=batch, **extra)[0]

        return self._by_forward(self._family.stages[0], mean_abs_I, run)

    def mlp_scale(self, mean_abs_I: Tensor) -> Tensor:
        mlp = self._block.get_submodule(self._family.mlp)
        return self._by_forward(self._family.stages[2], mean_abs_I, lambda: (mlp(batch) for batch in self._inputs[2]))

    def linear_scale(self, stage: int, mean_abs_I: Tensor) -> Tensor:
        """For a linear on its own the summed squared error is tr(D H D^T), with no forward."""
        (name,) = self._family.stages[stage]
        weight, hessian = self.rescaling.weight(name), self._hessians[stage]

        def loss(scale_I: Tensor) -> float:
            return float(quadratic_form(self._rounded(name, weight, scale_I) - weight, hessian))

        return self._least([name], [weight], mean_abs_I, loss)

    def _by_forward(self, stage: Sequence[str], mean_abs_I: Tensor, run: Callable[[], Iterable[Tensor]]) -> Tensor:
        modules = [linear_at(self._block, name) for name in stage]
        originals = [module.weight for module in modules]
        weights = [original.float() for original in originals]
        expected = [output.clone() for output in run()]

        def loss(scale_I: Tensor) -> float:
            for name, module, weight in zip(stage, modules, weights, strict=True):
                rounded = self._rounded(name, weight, scale_I).to(originals[0].dtype)
                module.weight = nn.Parameter(rounded, requires_grad=False)
            outputs = zip(run(), expected, strict=True)
            return sum(float((output.float() - wanted.float()).square().sum()) for output, wanted in outputs)

        try:
            return self._least(stage, weights, mean_abs_I, loss)
        finally:
            for module, original in zip(modules, originals, strict=True):
                module.weight = original

    def _least(
        self,
        stage: Sequence[str],
        weights: Sequence[Tensor],
        mean_abs_I: Tensor,
        loss: Callable[[Tensor], float],
    ) -> Tensor:
        candidates = candidate_scales(mean_abs_I, weights, self._options.of(self._prefix + stage[0]))
        losses = [loss(scale) for scale in candidates]
        finite = [value for value in losses if not math.isnan(value)]
        if not finite:
            raise QuantizationError("no scale gives a finite output: weights or activations hold NaN or infinity")
        return candidates[losses.index(min(finite))]

    def _grid(self, name: str) -> Grid:
        return self._options.of(self._prefix + name).grid

    def _rounded(self, name: str, weight: Tensor, scale_I: Tensor) -> Tensor:
        return round_to_grid(weight * scale_I, self._grid(name)).div_(scale_I)

    def clipped(self) -> dict[str, Tensor]:
        """Every linear but q and k, clipped on the inputs that it now gets."""
        targets: dict[str, Tensor] = {}
        for number, stage in enumerate(self._family.stages):
            if self._options.leaves_alone(self._prefix + stage[0]):
                continue
            for name in stage:
                if name in self._family.attention_inputs[:2]:
                    continue
                weight = self.rescaling.weight(name)
                scale = self.rescaling.input_scales.get(name)
                sample = self._samples[number] if scale is None else self._samples[number] / scale
                targets[name] = clip(weight, sample, self._grid(name), self._options.num_clips)
        return targets


def candidate_scales(mean_abs_I: Tensor, weights: Sequence[Tensor], options: Awq) -> list[Tensor]:
    """The scales of all ratios r = i / num_ratios, each float32 [I] and centred: s / sqrt(max s * min s).

    Args:
        mean_abs_I: mean magnitude of each input channel.
        weights: [O, I] of the linears that read them; looked at for duo scaling alone.
        options: of the method.
    """
    if options.duo_scaling:
        stacked = torch.cat(list(weights)).abs()
        size = options.grid.group_columns(stacked.shape[1])
        parts = [part / part.amax(1, keepdim=True).clamp(min=_FLOOR) for part in torch.split(stacked, size, dim=1)]
        weight_mean_I = torch.cat(parts, 1).mean(0)
    scales = []
    for step in range(options.num_ratios):
        ratio = step / options.num_ratios
        scale = mean_abs_I.pow(ratio)
        if options.duo_scaling:
            scale = scale / (weight_mean_I.pow(1 - ratio) + _FLOOR)
        scale = scale.clamp(min=_FLOOR)
        scales.append(scale / (scale.max() * scale.min()).sqrt())
    return scales


def clip(weight_OI: Tensor, sample_TI: Tensor, grid: Grid, num_clips: int) -> Tensor:
    """Clamp each group of each row to the bound that keeps its share of the output closest.

    Args:
        weight_OI: float32 weights.
        sample_TI: float32 inputs; the error of a group is that of the sum over its columns alone, averaged over tokens.
        grid: of the weights.
        num_clips: bounds max|w| (1 - i / 20), i = 0, 1, ...; the first of equals wins.
    Returns:
        float32 weights within their bounds.
    """
    size = grid.group_columns(weight_OI.shape[1])
    clipped = [
        _clip_group(part_OK, sample_TK, grid, num_clips)
        for part_OK, sample_TK in zip(
            torch.split(weight_OI, size, dim=1), torch.split(sample_TI, size, dim=1), strict=True
        )
    ]
    return torch.cat(clipped, 1)


def _clip_group(weight_OK: Tensor, sample_TK: Tensor, grid: Grid, num_clips: int) -> Tensor:
    # The error of a row is d^T (X^T X) d with d its change: no outputs per token are needed.
    second_moment_KK = sample_TK.T @ sample_TK / sample_TK.shape[0]
    reach_O = weight_OK.abs().amax(1)
    best, least = weight_OK, torch.full_like(reach_O, torch.inf)
    for step in range(num_clips):
        bound = (reach_O * (1 - step / _CLIP_DEPTH))[:, None]
        candidate = torch.minimum(torch.maximum(weight_OK, -bound), bound)
        scale, zero = fit_group(candidate, grid)
        scale, zero = scale[:, None], zero[:, None]
        change = decode(encode(candidate, scale, zero, grid), scale, zero) - weight_OK
        error = ((change @ second_moment_KK) * change).sum(1)
        better = error < least
        best, least = torch.where(better[:, None], candidate, best), torch.where(better, error, least)
    return best
