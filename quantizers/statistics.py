"""What is remembered of the inputs of a linear while calibration data streams through it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.exact_products import exact_products

# Columns per tile of the symmetric update. Below this a tile is too thin for a fast matrix product.
_PANEL = 256


class Hessian:
    """H = (2/n) sum X X^T over the n calibration sequences, the Hessian of a linear's squared output error.

    Only the upper triangle is accumulated, in panels of rows: half the work of the full product. Sums are kept
    un-normalised in float32 and divided once, so the result depends on the order of the sequences alone.
    Source: Frantar et al. 2023, arXiv:2210.17323, section 3.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        """Start with no sequences."""
        self._sum_II = torch.zeros((in_features, in_features), dtype=torch.float32, device=device)
        self._num_sequences = 0

    def update(self, inputs_NTI: Tensor) -> None:
        """Add sequences: [sequences, tokens, in_features], any float dtype."""
        inputs = inputs_NTI.reshape(-1, inputs_NTI.shape[-1]).float()
        width = inputs.shape[1]
        with exact_products(inputs_NTI):
            for start in range(0, width, _PANEL):
                stop = min(start + _PANEL, width)
                self._sum_II[start:stop, start:].addmm_(inputs[:, start:stop].T, inputs[:, start:])
        self._num_sequences += inputs_NTI.shape[0]

    def value(self) -> Tensor:
        """The symmetric float32 [I, I] matrix."""
        upper = torch.triu(self._sum_II)
        full = upper + torch.triu(upper, 1).T
        return full.mul_(2.0 / max(self._num_sequences, 1))


class Drift:
    """D = (2/n) sum (Xf - X) X^T: how far the inputs X of the quantized model have drifted from the float ones Xf.

    Source: Li et al. 2025 (GPTAQ), arXiv:2504.02692; Arai and Ichikawa 2025 (QEP), arXiv:2504.09629.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        """Start with no sequences."""
        self._sum_II = torch.zeros((in_features, in_features), dtype=torch.float32, device=device)
        self._num_sequences = 0

    def update(self, inputs_NTI: Tensor, float_inputs_NTI: Tensor) -> None:
        """Add sequences: the same tokens in the quantized and in the float model, [sequences, tokens, in_features]."""
        inputs = inputs_NTI.reshape(-1, inputs_NTI.shape[-1]).float()
        drift = float_inputs_NTI.reshape(inputs.shape).float() - inputs
        # Not `exact_products`: the difference of two bfloat16 values need not be one, and processors with AMX round it.
        self._sum_II.addmm_(drift.T, inputs)
        self._num_sequences += inputs_NTI.shape[0]

    def value(self) -> Tensor:
        """The float32 [I, I] matrix; not symmetric."""
        return self._sum_II * (2.0 / max(self._num_sequences, 1))


@dataclass(frozen=True, kw_only=True)
class InputRanges:
    """How far each input channel of a stage ranges in the float model, over all calibration tokens.

    Args:
        low_I: the least value, float32.
        high_I: the largest value, float32.
        mean_abs_I: the mean magnitude, float32.
    """

    low_I: Tensor
    high_I: Tensor
    mean_abs_I: Tensor

    @property
    def max_abs_I(self) -> Tensor:  # noqa: N802 - the shape letter
        """The largest magnitude."""
        return torch.maximum(-self.low_I, self.high_I)


class RangeTracker:
    """Accumulates `InputRanges`; means are summed in float64 on the host, in the order of the batches."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        """Start with no tokens."""
        self._low_I = torch.full((in_features,), torch.inf, device=device)
        self._high_I = torch.full((in_features,), -torch.inf, device=device)
        self._sum_I = torch.zeros(in_features, dtype=torch.float64)
        self._num_tokens = 0

    def update(self, inputs_NTI: Tensor) -> None:
        """Add sequences: [sequences, tokens, in_features], any float dtype."""
        inputs = inputs_NTI.reshape(-1, inputs_NTI.shape[-1])
        self._low_I = torch.minimum(self._low_I, -(-inputs).amax(0).float())  # torch_npu lists no bfloat16 for `amin`
        self._high_I = torch.maximum(self._high_I, inputs.amax(0).float())
        self._sum_I += inputs.abs().sum(0, dtype=torch.float32).to("cpu", torch.float64)
        self._num_tokens += inputs.shape[0]

    def value(self) -> InputRanges:
        """What was seen."""
        mean = (self._sum_I / max(self._num_tokens, 1)).float().to(self._low_I.device)
        return InputRanges(low_I=self._low_I, high_I=self._high_I, mean_abs_I=mean)


class TokenSample:
    """The inputs of some tokens, evenly spread over all that pass: every k-th, however they are batched."""

    def __init__(self, num_tokens: int, size: int) -> None:
        """Expect `num_tokens` in all and keep about `size` of them."""
        self._stride = max(1, num_tokens // size)
        self._passed = 0
        self._kept: list[Tensor] = []

    def update(self, inputs_NTI: Tensor) -> None:
        """Pass sequences: [sequences, tokens, in_features], any float dtype."""
        inputs = inputs_NTI.reshape(-1, inputs_NTI.shape[-1])
        self._kept.append(inputs[-self._passed % self._stride :: self._stride].float())
        self._passed += inputs.shape[0]

    def value(self) -> Tensor:
        """float32 [tokens, in_features]."""
        return torch.cat(self._kept)


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """What a method is told of the inputs that the linears of one stage share; each only if its `needs` ask for it.

    Args:
        hessian_II: `Hessian.value()` of the inputs, by the method's path.
        drift_II: `Drift.value()`.
        sample_TI: float32 inputs of some calibration tokens, evenly spread over the windows.
        ranges: of the inputs in the float model.
    """

    hessian_II: Tensor | None = None
    drift_II: Tensor | None = None
    sample_TI: Tensor | None = None
    ranges: InputRanges | None = None

    def require_hessian(self) -> Tensor:
        """The Hessian of a method that asked for it."""
        if self.hessian_II is None:
            raise AssertionError("this method did not ask for the Hessian")
        return self.hessian_II
