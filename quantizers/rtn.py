"""RTN: round each weight to the nearest value of its grid. The data-free baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantizers.grid import Grid, encode, expand_groups, fit_grid
from quantizers.method import Folding, MethodOutcome
from quantizers.quantized_weight import QuantizedWeight
from quantizers.statistics import InputStatistics


@dataclass(frozen=True, kw_only=True)
class Rtn(Folding):
    """Round-to-nearest; without folding it looks at no data. Options only: no tensors, devices, logs or IO."""

    grid: Grid

    name: ClassVar[str] = "rtn"
    code_version: ClassVar[str] = "rtn/1"
    true_sequential: ClassVar[bool] = True

    @property
    def needs_calibration(self) -> bool:
        """Only to fold errors."""
        return self.fold > 0

    @property
    def needs_drift(self) -> bool:
        """Only to fold errors."""
        return self.fold > 0

    def stores_column_groups(self, in_features: int) -> bool:
        """Never: groups are consecutive columns."""
        return False

    def quantize(self, weights: Sequence[Tensor], statistics: InputStatistics | None) -> MethodOutcome:
        """Quantize linears that share an input, of which nothing is looked at."""
        del statistics
        return MethodOutcome(weights=[round_to_nearest(weight, self.grid) for weight in weights], damping=None)


def round_to_nearest(weight_OI: Tensor, grid: Grid) -> QuantizedWeight:
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
    return QuantizedWeight(
        grid=grid,
        codes_OI=codes.to(torch.uint8),
        scale_OG=scale_OG,
        zero_OG=None if grid.symmetric else zero_OG,
    )
