"""Which of an NPU's low-bit operators computes a quantized linear, or why none does. Pure.

The operators are torch_npu's, and the rules here are their documented ones for the Ascend 910B (Atlas A2) in torch_npu
2.13: its own operator documentation, and CANN's of aclnnQuantMatmulV4 and aclnnWeightQuantBatchMatmulV2. Not run on
hardware.

    W8A8    npu_dynamic_quant, npu_quant_matmul     int8 x int8, one scale per token and one per output channel
    W8A16   npu_weight_quant_batchmatmul            int8 weights, per channel or in groups of columns
    W4A16   npu_weight_quant_batchmatmul            int4 weights, likewise, packed by npu_convert_weight_to_int4pack
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from quantizers.activations import ActivationGrid
from quantizers.apply import StoredLinear
from quantizers.errors import NoKernelError
from quantizers.grid import Grid
from quantizers.uniform_weight import UniformWeight

_MOST_FEATURES = 65535
_GROUP_MULTIPLE = 32
_PACKED_TOGETHER = 8  # int4 weights in one int32


class Kernel(StrEnum):
    """What the operators that compute a linear are called here."""

    W8A8 = "w8a8"
    W8A16 = "w8a16"
    W4A16 = "w4a16"


@dataclass(frozen=True, kw_only=True)
class LinearForm:
    """What decides on a linear's kernel.

    Args:
        grid: of its weights.
        shape: (out_features, in_features).
        dtype: what the model computes in: "bfloat16", "float16" or "float32".
        inputs: the grid of its inputs; None where they are left alone.
        quantized_outputs: whether what leaves it is quantized too.
        permuted: whether its groups are not consecutive columns.
    """

    grid: Grid
    shape: tuple[int, int]
    dtype: str
    inputs: ActivationGrid | None = None
    quantized_outputs: bool = False
    permuted: bool = False

    @property
    def num_groups(self) -> int:
        """Scales per output channel."""
        return self.grid.num_groups(self.shape[1])


def form_of(linear: StoredLinear, dtype: str) -> LinearForm:
    """The form of an artifact's linear.

    Raises:
        NoKernelError: its weights are of an encoding that no operator reads.
    """
    weight = linear.weight
    check_encoding(weight.encoding)
    if not isinstance(weight, UniformWeight):
        raise AssertionError("one class has the uniform encoding")
    return LinearForm(
        grid=weight.grid,
        shape=weight.shape,
        dtype=dtype,
        inputs=None if linear.inputs is None else linear.inputs.grid,
        quantized_outputs=linear.outputs is not None,
        permuted=weight.column_group_I is not None,
    )


def check_encoding(encoding: str) -> None:
    """Raise unless the operators read weights of this encoding.

    Raises:
        NoKernelError: they do not.
    """
    if encoding != UniformWeight.encoding:
        raise NoKernelError(
            f"weights in the {encoding} encoding have no kernel; use a method that stores uniform grids"
        )


def choose_kernel(form: LinearForm) -> Kernel:
    """The kernel of a linear.

    Raises:
        NoKernelError: there is none; says why and what would have one.
    """
    if form.dtype not in {"bfloat16", "float16"}:
        raise NoKernelError(f"a model in {form.dtype} has no kernel; set its dtype to bfloat16 or float16")
    if max(form.shape) > _MOST_FEATURES:
        raise NoKernelError(f"a linear of shape {form.shape} has no kernel; the operators end at {_MOST_FEATURES}")
    if form.quantized_outputs:
        raise NoKernelError("quantized outputs have no kernel; leave quantize_qkv_outputs out")
    return _weight_only(form) if form.inputs is None else _both(form, form.inputs)


def _both(form: LinearForm, inputs: ActivationGrid) -> Kernel:
    grid = form.grid
    if grid.bits != 8 or inputs.bits != 8:
        raise NoKernelError(
            f"weight_bits = {grid.bits} with activation_bits = {inputs.bits} has no kernel here; use 8 and 8, or leave "
            "activations alone"
        )
    if inputs.granularity != "per_token" or not inputs.symmetric or inputs.clip_ratio != 1:
        raise NoKernelError(
            "activations are quantized per token and symmetrically over their whole range by npu_dynamic_quant; leave "
            "activation_granularity, activation_symmetric and activation_clip_ratio at their defaults"
        )
    if not grid.symmetric:
        raise NoKernelError("weights with zeros have no kernel with quantized activations; set symmetric: true")
    if form.num_groups > 1:
        raise NoKernelError(
            f"group_size = {grid.group_size} has no kernel with quantized activations; use per_channel, as "
            "npu_quant_matmul has one scale per output channel"
        )
    return Kernel.W8A8


def _weight_only(form: LinearForm) -> Kernel:
    grid, out_features = form.grid, form.shape[0]
    if grid.bits not in {4, 8}:
        raise NoKernelError(f"weight_bits = {grid.bits} has no kernel; use 8 or 4")
    if form.num_groups > 1 and form.permuted:
        raise NoKernelError("groups of columns that do not follow one another have no kernel; set static_groups: true")
    if form.num_groups > 1 and grid.group_size % _GROUP_MULTIPLE:
        raise NoKernelError(
            f"group_size = {grid.group_size} has no kernel; use a multiple of {_GROUP_MULTIPLE}, or per_channel"
        )
    if grid.bits == 4 and out_features % _PACKED_TOGETHER:
        raise NoKernelError(
            f"4-bit weights of {out_features} output channels have no kernel; {_PACKED_TOGETHER} are packed together"
        )
    # The operator takes scales in the dtype of the inputs. Rounding them again would run other weights than were
    # stored and exported, so that this is refused instead; stored so from the start, methods correct for it.
    if grid.scale_dtype != form.dtype:
        raise NoKernelError(
            f"scale_dtype = {grid.scale_dtype} has no kernel in a model that computes in {form.dtype}; set "
            f"scale_dtype: {form.dtype}"
        )
    return Kernel.W4A16 if grid.bits == 4 else Kernel.W8A16
