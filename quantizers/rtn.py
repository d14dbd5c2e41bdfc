"""RTN: round each weight to the nearest value of its grid. The data-free baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantizers.grid import Grid, encode, expand_groups, fit_grid
from quantizers.method import LinearGroup, Method, MethodOutcome
from quantizers.uniform_weight import UniformWeight


@dataclass(frozen=True, kw_only=True)
class Rtn(Method):
    """Round-to-nearest; without folding it looks at no data. Options only: no tensors, devices, logs or IO."""

    name: ClassVar[str] = "rtn"
    code_version: ClassVar[str] = "rtn/2"

    def quantize(self, group: LinearGroup) -> MethodOutcome:
        """Quantize linears that share an input, of which nothing is looked at."""
        return MethodOutcome(weights=[round_to_nearest(weight, self.grid) for weight in group.weights])


def round_to_nearest(weight_OI: Tensor, grid: Grid) -> UniformWeight:
    """Fit min-max grids and round.

    Args:
        weight_OI: finite float32 weights.
    Raises:
        QuantizationError: a scale overflows `grid.scale_dtype`.
    """
    scale_OG, zero_OG = fit_grid(weight_OI, grid)
    in_features = weight_OI.shape[1]
    codes = encode(
        weight_OI, expand_groups(scale_OG, in_features, grid), expand_groups(zero_OG, in_features, grid), grid
    )
    return UniformWeight(
        grid=grid,
        codes_OI=codes.to(torch.uint8),
        scale_OG=scale_OG,
        zero_OG=None if grid.symmetric else zero_OG,
    )
