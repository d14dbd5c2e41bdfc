"""The low-bit operators of torch_npu, under the names they have once it is loaded. Not run on hardware.

They are called where torch registers them, so that nothing here imports torch_npu: whoever claims an NPU loads it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.errors import NoKernelError

NAMES = (
    "npu_dynamic_quant",
    "npu_quant_matmul",
    "npu_weight_quant_batchmatmul",
    "npu_convert_weight_to_int4pack",
)


class NpuOperators:
    """`NativeOperators` by torch_npu. Holds nothing, so that a model that holds it can be copied."""

    def __init__(self) -> None:
        """Look whether the operators are there.

        Raises:
            NoKernelError: one is not registered in this process.
        """
        for name in NAMES:
            if not hasattr(torch.ops.npu, name):
                raise NoKernelError(
                    f"torch.ops.npu.{name} is not there; native execution needs a torch_npu that offers it, loaded in "
                    "the worker"
                )

    def npu_dynamic_quant(self, inputs_TI: Tensor) -> tuple[Tensor, Tensor]:
        """Per-token symmetric int8 codes and their scales."""
        codes_TI, scale_T = torch.ops.npu.npu_dynamic_quant(inputs_TI)
        return codes_TI, scale_T

    def npu_quant_matmul(
        self,
        codes_TI: Tensor,
        weight_IO: Tensor,
        scale_O: Tensor,
        *,
        pertoken_scale: Tensor,
        bias: Tensor | None,
        output_dtype: torch.dtype,
    ) -> Tensor:
        """The int8 product, scaled."""
        product: Tensor = torch.ops.npu.npu_quant_matmul(
            codes_TI, weight_IO, scale_O, pertoken_scale=pertoken_scale, bias=bias, output_dtype=output_dtype
        )
        return product

    def npu_weight_quant_batchmatmul(
        self,
        inputs_TI: Tensor,
        weight_IO: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        *,
        bias: Tensor | None,
        group_size: int,
    ) -> Tensor:
        """The product with int8 or packed int4 weights."""
        product: Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(
            inputs_TI, weight_IO, scale, antiquant_offset=offset, bias=bias, antiquant_group_size=group_size
        )
        return product

    def npu_convert_weight_to_int4pack(self, weight_IO: Tensor) -> Tensor:
        """Pack int4 weights for the operator above."""
        packed: Tensor = torch.ops.npu.npu_convert_weight_to_int4pack(weight_IO)
        return packed
