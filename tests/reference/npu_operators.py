"""torch_npu's low-bit operators as its documentation has them, in plain torch: formulas, dtypes, shapes and ranges.

Source: the operator documentation and `npu_native_functions_by_codegen.yaml` (for `SCHEMAS`) of torch_npu 2.13.0, and
CANN's of aclnnQuantMatmulV4 and aclnnWeightQuantBatchMatmulV2 (for the order of bias and scales), all for Atlas A2.
What is documented nowhere is made up here, and nothing may lean on it: the layout of packed int4 weights, and what
becomes of a row of zeros, or of one that is not finite. Nothing was compared with hardware. Shape letters: M tokens,
K in_features, N out_features, G groups.
"""

from contextlib import contextmanager

import torch

MOST = 65535
SCHEMAS = {
    "npu_dynamic_quant": "(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
    'str quant_mode="pertoken", float dst_type_max=0.0) -> (Tensor, Tensor)',
    "npu_quant_matmul": "(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
    "Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
    "int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
    "npu_weight_quant_batchmatmul": "(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? antiquant_offset=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, int antiquant_group_size=0, "
    "int inner_precise=0, int? weight_dtype=None) -> Tensor",
    "npu_convert_weight_to_int4pack": "(Tensor weight, int inner_k_tiles=0) -> Tensor",
}
_DTYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 15: torch.bfloat16}  # by torch's own numbers
_HALVES = (torch.float16, torch.bfloat16)


def check(holds, what):
    if not holds:
        raise RuntimeError(f"161002: {what}")


def npu_dynamic_quant(x_MK):
    check(x_MK.dtype in _HALVES, "x must be float16 or bfloat16")
    check(x_MK.dim() > 1, "x must have more than one dimension")
    wide = x_MK.float()
    scale_M = wide.abs().amax(-1) / 127
    codes = torch.round(wide / scale_M.unsqueeze(-1)).nan_to_num(0).clamp(-128, 127)
    return codes.to(torch.int8), torch.where(scale_M.isnan(), 1.0, scale_M)


def npu_quant_matmul(x1_MK, x2_KN, scale_N, *, pertoken_scale=None, bias=None, output_dtype=None):
    check(x1_MK.dtype == x2_KN.dtype == torch.int8, "x1 and x2 must be int8")
    check(2 <= x1_MK.dim() <= 6 and x2_KN.dim() == 2, "x1 must have 2 to 6 dimensions")
    check(x1_MK.shape[-1] == x2_KN.shape[0], "k dim of x1 and x2 need be same")
    check(x1_MK.numel() > 0 and max(*x1_MK.shape[-1:], *x2_KN.shape) <= MOST, "a dimension is out of range")
    check(x2_KN.is_contiguous() or x2_KN.T.is_contiguous(), "x2 may be transposed, nothing else")
    check(scale_N.dim() == 1 and len(scale_N) in {1, x2_KN.shape[1]}, "scale must be (1,) or (n,)")
    out = _DTYPES[output_dtype]
    check(pertoken_scale is not None and pertoken_scale.dtype == torch.float32, "pertoken_scale must be float32")
    check(pertoken_scale.shape == x1_MK.shape[:1], "pertoken_scale must be (m,)")
    check(out in _HALVES, "with pertoken_scale the output is float16 or bfloat16")
    scales = (torch.float32,) if out == torch.float16 else (torch.float32, torch.bfloat16)
    check(scale_N.dtype in scales, "scale must be float32 (or bfloat16 where the output is)")
    product_MN = (x1_MK.long() @ x2_KN.long()).float()  # exact: 65535 products of 127 and 128 fit int32
    if bias is None:
        return (product_MN * scale_N.float() * pertoken_scale[:, None]).to(out)
    check(bias.shape == x2_KN.shape[1:], "bias must be (n,)")
    if bias.dtype == torch.int32:
        return ((product_MN + bias) * scale_N.float() * pertoken_scale[:, None]).to(out)
    check(bias.dtype in {out, torch.float32}, "bias must be int32, float32 or of the output's dtype")
    return (product_MN * scale_N.float() * pertoken_scale[:, None] + bias.float()).to(out)


def npu_weight_quant_batchmatmul(x_MK, weight_KN, scale, offset=None, *, bias=None, group_size=0):
    check(x_MK.dtype in _HALVES and x_MK.dim() == 2, "x must be float16 or bfloat16, of two dimensions")
    check(x_MK.numel() > 0 and weight_KN.numel() > 0, "empty tensors are not supported")
    check(weight_KN.dtype in {torch.int8, torch.int32} and weight_KN.dim() == 2, "weight must be int8 or packed int32")
    check(weight_KN.is_contiguous() or weight_KN.T.is_contiguous(), "weight may be transposed, nothing else")
    if weight_KN.dtype == torch.int32:
        check(weight_KN.is_contiguous(), "this model unpacks weights that are not transposed")
        weight_KN = _unpacked(weight_KN)
    in_features, out_features = weight_KN.shape
    check(x_MK.shape[1] == in_features, "x and weight must have the same k")
    check(max(weight_KN.shape) <= MOST, "k and n end at 65535")
    check(scale.dtype == x_MK.dtype, "antiquant_scale must have the dtype of x")
    check(
        group_size == 0 or (group_size % 32 == 0 and 32 <= group_size <= in_features - 1),
        "antiquant_group_size must be a multiple of 32 from 32 to k - 1",
    )
    if group_size:
        check(
            scale.shape == (-(-in_features // group_size), out_features), "antiquant_scale must be (ceil(k / group), n)"
        )
    else:
        check(
            scale.shape in {(1,), (1, 1), (out_features,), (1, out_features)}, "antiquant_scale must be (n,) or (1, n)"
        )
    check(offset is None or (offset.shape, offset.dtype) == (scale.shape, scale.dtype), "offset must be like scale")
    needed = torch.float32 if x_MK.dtype == torch.bfloat16 else torch.float16
    check(bias is None or bias.dtype == needed, f"bias must be {needed}")
    check(bias is None or bias.shape in {(out_features,), (1, out_features)}, "bias must be (n,) or (1, n)")
    check(bias is None or bias.is_contiguous(), "bias must be contiguous")
    group_K = torch.arange(in_features) // group_size if group_size else torch.zeros(in_features, dtype=torch.long)
    scale_GN, offset_GN = (
        None if part is None else part.float().reshape(-1, part.shape[-1]) for part in (scale, offset)
    )
    values_KN = weight_KN.float() if offset_GN is None else weight_KN.float() + offset_GN[group_K]
    values_KN = (values_KN * scale_GN[group_K]).to(x_MK.dtype)
    product_MN = x_MK.float() @ values_KN.float()
    return (product_MN if bias is None else product_MN + bias.float()).to(x_MK.dtype)


def npu_convert_weight_to_int4pack(weight):
    check(weight.dtype == torch.int32 and weight.dim() == 2, "weight must be int32, of two dimensions")
    check(weight.is_contiguous(), "weight must be contiguous")
    check(weight.shape[1] % 8 == 0, "the last dimension must be a multiple of 8")
    check(bool((weight.abs() <= 8).all()) and bool((weight < 8).all()), "values must be in [-8, 7]")
    nibbles = (weight + 8).long().reshape(weight.shape[0], -1, 8)
    words = (nibbles << torch.tensor([4 * place for place in _PLACES])).sum(-1)
    return (words - (words >= 1 << 31).long() * (1 << 32)).to(torch.int32)


_PLACES = (3, 0, 6, 1, 7, 4, 2, 5)  # made up


def _unpacked(packed):
    words = packed.long() % (1 << 32)
    nibbles = (words.unsqueeze(-1) >> torch.tensor([4 * place for place in _PLACES])) % 16
    return (nibbles - 8).reshape(packed.shape[0], -1)


class ModelledOperators:
    """The operators by the functions above, with the arguments that `quantizers.native.NativeOperators` has."""

    def npu_dynamic_quant(self, inputs_TI):
        return npu_dynamic_quant(inputs_TI)

    def npu_quant_matmul(self, codes_TI, weight_IO, scale_O, *, pertoken_scale, bias, output_dtype):
        number = next(number for number, dtype in _DTYPES.items() if dtype == output_dtype)
        return npu_quant_matmul(
            codes_TI, weight_IO, scale_O, pertoken_scale=pertoken_scale, bias=bias, output_dtype=number
        )

    def npu_weight_quant_batchmatmul(self, inputs_TI, weight_IO, scale, offset, *, bias, group_size):
        return npu_weight_quant_batchmatmul(inputs_TI, weight_IO, scale, offset, bias=bias, group_size=group_size)

    def npu_convert_weight_to_int4pack(self, weight_IO):
        return npu_convert_weight_to_int4pack(weight_IO)


@contextmanager
def registered():
    """`torch.ops.npu` has these operators on the CPU, behind the schemas that torch_npu registers."""

    def quant_matmul(x1, x2, scale, *, pertoken_scale=None, bias=None, output_dtype=None, **unused):
        check(all(value is None for value in unused.values()), "an argument that this model does not know")
        return npu_quant_matmul(x1, x2, scale, pertoken_scale=pertoken_scale, bias=bias, output_dtype=output_dtype)

    def weight_quant_batchmatmul(  # torch hands on every argument before the last that is given
        x, weight, antiquant_scale, antiquant_offset=None, quant_scale=None, quant_offset=None, bias=None, group_size=0
    ):
        check(quant_scale is None and quant_offset is None, "quantized outputs are unknown to this model")
        return npu_weight_quant_batchmatmul(
            x, weight, antiquant_scale, antiquant_offset, bias=bias, group_size=group_size
        )

    calls = {
        "npu_dynamic_quant": npu_dynamic_quant,
        "npu_quant_matmul": quant_matmul,
        "npu_weight_quant_batchmatmul": weight_quant_batchmatmul,
        "npu_convert_weight_to_int4pack": npu_convert_weight_to_int4pack,
    }
    library = torch.library.Library("npu", "FRAGMENT")
    try:
        for name, schema in SCHEMAS.items():
            library.define(name + schema)
            library.impl(name, calls[name], "CPU")
        yield
    finally:
        library._destroy()
        for name in SCHEMAS:  # torch.ops remembers what it has looked up
            torch.ops.npu.__dict__.pop(name, None)
