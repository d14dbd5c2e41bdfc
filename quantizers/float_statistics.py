"""Statistics of the float model's inputs: they depend on no bits, so one pass serves every cell that needs them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantizers.block import check_weights_finite, enter, walk_block
from quantizers.block_source import BlockSource
from quantizers.errors import NumericalError
from quantizers.families import linear_at
from quantizers.progress import Progress
from quantizers.statistics import Hessian, InputStatistics, RangeTracker

VERSION = "float-statistics/1"


@torch.inference_mode()
def collect_float_statistics(
    source: BlockSource, windows: Tensor, *, hessians: bool, progress: Progress | None = None
) -> Iterator[list[InputStatistics]]:
    """Ranges (and Hessians) of the inputs of each stage, one decoder block at a time.

    Args:
        windows: int64 [windows, tokens] calibration tokens.
        hessians: collect Hessians too; they take 4 I^2 bytes per stage.
        progress: called with (blocks done, blocks).
    Raises:
        QuantizationError: the weight or the inputs of a linear are not finite; names it.
    """
    family = source.family
    hidden, arguments = enter(source, windows)
    for index in range(source.num_blocks):
        if progress:
            progress(index, source.num_blocks)
        block = source.block(index)
        stages: list[InputStatistics] = []
        prefix = f"{family.blocks}.{index}."
        for stage, inputs in walk_block(block, family, hidden, arguments[index]):
            check_weights_finite(block, stage, prefix)
            in_features = linear_at(block, stage[0]).in_features
            ranges = RangeTracker(in_features, source.device)
            hessian = Hessian(in_features, source.device) if hessians else None
            for batch in inputs:
                ranges.update(batch)
                if hessian is not None:
                    hessian.update(batch)
            value = ranges.value()
            if not torch.isfinite(value.mean_abs_I).all():
                raise NumericalError(f"the calibration inputs of {prefix}{stage[0]} hold NaN or infinity")
            stages.append(InputStatistics(ranges=value, hessian_II=hessian.value() if hessian else None))
        yield stages
    if progress:
        progress(source.num_blocks, source.num_blocks)
