"""An artifact in a model whose linears are computed by an NPU's low-bit operators instead of on decoded weights.

Shape letters: T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from quantizers.apply import StoredBlock, StoredLinear, install_matrix, replace_parameter
from quantizers.errors import NoKernelError
from quantizers.families import linear_at
from quantizers.native_kernels import Kernel, choose_kernel, form_of
from quantizers.native_operands import Operands, operands_of
from quantizers.uniform_weight import UniformWeight


class NativeOperators(Protocol):
    """The operators, named as in torch_npu and with no more arguments than are used. See `npu_operators.py`."""

    def npu_dynamic_quant(self, inputs_TI: Tensor) -> tuple[Tensor, Tensor]:
        """int8 codes round(x / scale) and the float32 [T] scales max|x| / 127 of their rows."""

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
        """codes @ weight * scale * pertoken_scale + bias, the product in int32."""

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
        """inputs @ ((weight + offset) * scale) + bias, in the inputs' dtype."""

    def npu_convert_weight_to_int4pack(self, weight_IO: Tensor) -> Tensor:
        """int32 in [-8, 7] -> int32 [I, O / 8], in a layout of the device's own."""


class NativeLinear:
    """What a linear computes, natively. A plain callable, so that it can stand in for a module's `forward`."""

    def __init__(
        self, operands: Operands, bias: Tensor | None, operators: NativeOperators, device: torch.device
    ) -> None:
        """Bring the operands to the device.

        Args:
            bias: of the linear, in the model's dtype.
        """
        self._operators = operators
        self._kernel, self._group_size = operands.kernel, operands.group_size
        self._weight_IO = operands.weight_IO.to(device)
        if self._kernel == Kernel.W4A16:
            self._weight_IO = operators.npu_convert_weight_to_int4pack(self._weight_IO)
        self._scale = operands.scale.to(device)
        self._offset = None if operands.offset is None else operands.offset.to(device)
        self._bias = bias
        # As npu_weight_quant_batchmatmul wants it: float32 beside bfloat16, float16 beside float16.
        if bias is not None and self._kernel != Kernel.W8A8 and bias.dtype == torch.bfloat16:
            self._bias = bias.float()

    def __call__(self, inputs: Tensor) -> Tensor:
        """The outputs, in the inputs' dtype; any leading shape."""
        inputs_TI = inputs.reshape(-1, inputs.shape[-1]).contiguous()
        outputs_TO = self._both(inputs_TI) if self._kernel == Kernel.W8A8 else self._weight_only(inputs_TI)
        # No integer says NaN, and inputs become integers: in W8A8 always, in CANN's kernels for few tokens also with
        # weights alone. What they make of one that is not finite is documented nowhere; it must not leave as one that
        # is, so its token gets NaN added, and every other token 0.
        outputs_TO = outputs_TO + (inputs_TI * 0).sum(-1, keepdim=True)
        return outputs_TO.reshape(*inputs.shape[:-1], -1)

    def _both(self, inputs_TI: Tensor) -> Tensor:
        codes_TI, scale_T = self._operators.npu_dynamic_quant(inputs_TI)
        return self._operators.npu_quant_matmul(
            codes_TI,
            self._weight_IO,
            self._scale,
            pertoken_scale=scale_T,
            bias=self._bias,
            output_dtype=inputs_TI.dtype,
        )

    def _weight_only(self, inputs_TI: Tensor) -> Tensor:
        return self._operators.npu_weight_quant_batchmatmul(
            inputs_TI, self._weight_IO, self._scale, self._offset, bias=self._bias, group_size=self._group_size
        )


@contextmanager
def natively_installed(
    model: nn.Module, blocks: Iterable[StoredBlock], operators: NativeOperators
) -> Iterator[nn.Module]:
    """The model with an artifact in it, its linears computed by `operators`; changed norms and biases as in
    `apply.installed`; restored on leaving.

    The modules stay where they are and keep their float weights, which nothing reads meanwhile.

    Args:
        blocks: consumed one at a time.
    Raises:
        NoKernelError: a linear has none; names it.
    """
    with ExitStack() as undo:
        for block in blocks:
            for name, value in block.dense.items():  # first, because the operators take the biases
                replace_parameter(model, name, value, undo)
            for linear in block.linears:
                _install_linear(model, linear, operators, undo)
            for matrix in block.vocabulary:  # decoded: no kernel looks up rows of codes
                install_matrix(model, matrix, undo)
        yield model


def _install_linear(model: nn.Module, linear: StoredLinear, operators: NativeOperators, undo: ExitStack) -> None:
    module = linear_at(model, linear.name)
    dtype, device = module.weight.dtype, module.weight.device
    if linear.weight.shape != tuple(module.weight.shape):
        raise ValueError(
            f"{linear.name}: artifact of shape {linear.weight.shape}, model has {tuple(module.weight.shape)}"
        )
    try:
        kernel = choose_kernel(form_of(linear, str(dtype).removeprefix("torch.")))
        if not isinstance(linear.weight, UniformWeight):
            raise AssertionError("what has a kernel is uniform")
        operands = operands_of(linear.weight, kernel, dtype)
    except NoKernelError as error:
        raise NoKernelError(f"{linear.name}: {error}") from error
    bias = None if module.bias is None else module.bias.detach()
    module.__dict__["forward"] = NativeLinear(operands, bias, operators, device)
    undo.callback(module.__dict__.pop, "forward", None)
