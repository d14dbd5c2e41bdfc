"""What is stored of a linear -> what an NPU's operators take, value for value.

Shape letters: O out_features, I in_features, G groups. The operators hold weights as [I, O].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.errors import NoKernelError
from quantizers.grid import SCALE_DTYPES
from quantizers.native_kernels import Kernel
from quantizers.uniform_weight import UniformWeight


@dataclass(frozen=True, kw_only=True)
class Operands:
    """The weight of a linear as signed integers, with what turns them into values: (integer + offset) * scale.

    Args:
        weight_IO: int8; int32 in [-8, 7] for `Kernel.W4A16`, which is still to be packed on the device.
        scale: of `Kernel.W8A8` float32 [O], otherwise [O], or [G, O] where there are groups, in the model's dtype.
        offset: like `scale`, whole numbers; None where there is nothing to add.
        group_size: input columns that share a scale; 0 is one per output channel.
    """

    kernel: Kernel
    weight_IO: Tensor
    scale: Tensor
    offset: Tensor | None = None
    group_size: int = 0

    def decode(self) -> Tensor:
        """The float32 [O, I] weight, by the operators' formula."""
        integers_IO, scale, offset = self.weight_IO.float(), self.scale.float(), self.offset
        in_features = integers_IO.shape[0]
        if self.group_size:
            scale = scale.repeat_interleave(self.group_size, 0)[:in_features]
            offset = None if offset is None else offset.repeat_interleave(self.group_size, 0)[:in_features]
        return ((integers_IO if offset is None else integers_IO + offset.float()) * scale).T


def operands_of(weight: UniformWeight, kernel: Kernel, dtype: torch.dtype) -> Operands:
    """The operands of a linear that has this kernel (see `choose_kernel`).

    A code q with the zero z becomes the integer q - m with the offset m - z, where m = 2**(bits-1). Both are exact: the
    largest of either is 2**(bits-1), and even bfloat16 holds every whole number up to 256.

    Args:
        dtype: what the model computes in.
    Raises:
        NoKernelError: a scale is no number of that dtype.
    """
    grid, middle = weight.grid, 1 << (weight.grid.bits - 1)
    integers_IO = (weight.codes_OI.to(torch.int16) - middle).T
    scale_GO = weight.scale_OG.T
    if kernel == Kernel.W8A8:
        return Operands(
            kernel=kernel, weight_IO=integers_IO.to(torch.int8).contiguous(), scale=scale_GO[0].contiguous()
        )
    narrow_GO = scale_GO.to(dtype)
    if not torch.equal(narrow_GO.float(), scale_GO):
        raise NoKernelError(f"a scale is no {dtype} number; set scale_dtype: {_name(dtype)}")
    offset_GO = None if weight.zero_OG is None else (middle - weight.zero_OG.T).to(dtype)
    grouped = len(scale_GO) > 1
    return Operands(
        kernel=kernel,
        weight_IO=integers_IO.to(torch.int32 if kernel == Kernel.W4A16 else torch.int8).contiguous(),
        scale=_shaped(narrow_GO, grouped=grouped),
        offset=None if offset_GO is None else _shaped(offset_GO, grouped=grouped),
        group_size=grid.group_size if grouped else 0,
    )


def _shaped(per_group_GO: Tensor, *, grouped: bool) -> Tensor:
    return per_group_GO.contiguous() if grouped else per_group_GO[0].contiguous()


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in SCALE_DTYPES.items() if known == dtype)
