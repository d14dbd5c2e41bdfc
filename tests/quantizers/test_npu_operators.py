"""The operators as torch has them: calls that fit torch_npu's schemas, and what its documentation refuses."""

import copy

import pytest
import torch
from torch import nn

from quantizers.activations import ActivationGrid, ActivationQuantizer
from quantizers.apply import StoredBlock, StoredLinear
from quantizers.errors import NoKernelError
from quantizers.grid import Grid
from quantizers.native import natively_installed
from quantizers.npu_operators import NAMES, NpuOperators
from quantizers.rtn import round_to_nearest
from tests.reference.npu_operators import SCHEMAS, ModelledOperators, npu_dynamic_quant, registered

MODEL = ModelledOperators()


@pytest.fixture
def operators():
    if any(hasattr(torch.ops.npu, name) for name in NAMES):
        pytest.skip("torch_npu is loaded")
    with registered():
        yield NpuOperators()


def blocks(linear, grid, *, quantize_inputs):
    inputs = ActivationQuantizer(grid=ActivationGrid(bits=8)) if quantize_inputs else None
    weight = round_to_nearest(linear.weight.float(), grid)
    return [StoredBlock(linears=[StoredLinear(name="0", weight=weight, inputs=inputs)])]


def test_the_names_are_those_of_the_schemas():
    assert set(NAMES) == set(SCHEMAS)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "grid",
    [
        Grid(bits=8, convention="sq-sym"),
        Grid(bits=8),
        Grid(bits=4, group_size=32),
        Grid(bits=4, group_size=32, convention="gptq-sym"),
    ],
    ids=str,
)
def test_calls_through_torch_fit_the_schemas(operators, grid, dtype, bias):
    name = str(dtype).removeprefix("torch.")
    grid = Grid(**{**vars(grid), "scale_dtype": name})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16, bias=bias, dtype=dtype)).requires_grad_(requires_grad=False)
    stored = blocks(model[0], grid, quantize_inputs=grid.convention == "sq-sym")
    inputs = torch.randn(3, 64, dtype=dtype)
    with natively_installed(model, stored, operators):
        through_torch = model(inputs)
        of_a_copy = copy.deepcopy(model)(inputs)  # as the search for what is not finite makes one
    with natively_installed(model, stored, MODEL):
        directly = model(inputs)
    assert torch.equal(through_torch, directly)
    assert torch.equal(of_a_copy, directly)


def test_without_torch_npu_the_missing_operator_is_named():
    with pytest.raises(NoKernelError, match=r"torch\.ops\.npu\.npu_dynamic_quant is not there; native execution needs"):
        NpuOperators()


def test_codes_per_token():
    codes, scale = npu_dynamic_quant(torch.tensor([[127.0, -63.6, 0.4], [-1.0, 0.5, 1.0]], dtype=torch.bfloat16))
    assert scale.tolist() == pytest.approx([1.0, 1 / 127])
    assert codes.tolist() == [[127, -64, 0], [-127, 64, 127]]
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)


def product(x=(2, 64), weight=(64, 16), scale=(16,), dtype=torch.bfloat16, kind=torch.int8, **given):
    offset = given.pop("offset", None)
    fill = torch.zeros(weight, dtype=kind)
    return MODEL.npu_weight_quant_batchmatmul(
        torch.ones(x, dtype=dtype),
        fill,
        torch.ones(scale, dtype=given.pop("scale_dtype", dtype)),
        None if offset is None else torch.ones(offset, dtype=dtype),
        **{"bias": None, "group_size": 0} | given,
    )


def test_offsets_are_added_before_scaling():
    outputs = product(offset=(16,), scale_dtype=torch.bfloat16)
    assert outputs.tolist() == [[64.0] * 16] * 2  # 64 times (0 + 1) * 1


@pytest.mark.parametrize(
    ("call", "refusal"),
    [
        (lambda: product(dtype=torch.float32), "x must be float16 or bfloat16"),
        (lambda: product(x=(1, 2, 64)), "of two dimensions"),
        (lambda: product(scale_dtype=torch.float16), "antiquant_scale must have the dtype of x"),
        (lambda: product(group_size=16, scale=(4, 16)), "multiple of 32 from 32 to k - 1"),
        (lambda: product(group_size=64, scale=(1, 16)), "multiple of 32 from 32 to k - 1"),
        (lambda: product(group_size=32, scale=(16, 2)), r"must be \(ceil\(k / group\), n\)"),
        (lambda: product(scale=(8,)), r"must be \(n,\) or \(1, n\)"),
        (lambda: product(offset=(1, 16)), "offset must be like scale"),
        (lambda: product(bias=torch.ones(16, dtype=torch.bfloat16)), r"bias must be torch\.float32"),
        (lambda: product(dtype=torch.float16, bias=torch.ones(16)), r"bias must be torch\.float16"),
        (lambda: product(x=(0, 64)), "empty tensors"),
        (lambda: product(x=(2, 65536), weight=(65536, 16)), "k and n end at 65535"),
        (lambda: MODEL.npu_convert_weight_to_int4pack(torch.full((2, 8), 8, dtype=torch.int32)), r"in \[-8, 7\]"),
        (lambda: MODEL.npu_convert_weight_to_int4pack(torch.zeros(2, 12, dtype=torch.int32)), "a multiple of 8"),
        (lambda: MODEL.npu_convert_weight_to_int4pack(torch.zeros(2, 8, dtype=torch.int8)), "must be int32"),
        (lambda: npu_dynamic_quant(torch.zeros(2, 8)), "float16 or bfloat16"),
    ],
)
def test_the_model_refuses_what_the_documentation_does(call, refusal):
    with pytest.raises(RuntimeError, match=refusal):
        call()


def full_product(out=torch.bfloat16, **given):
    operands = {
        "codes_TI": torch.ones(2, 64, dtype=torch.int8),
        "weight_IO": torch.ones(64, 16, dtype=torch.int8),
        "scale_O": torch.ones(16),
        "pertoken_scale": torch.ones(2),
        "bias": None,
    }
    return MODEL.npu_quant_matmul(**operands | given, output_dtype=out)


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        ({"weight_IO": torch.ones(64, 16, dtype=torch.int32)}, "must be int8"),
        ({"scale_O": torch.ones(16, dtype=torch.float16)}, "scale must be float32"),
        ({"scale_O": torch.ones(16, dtype=torch.bfloat16), "out": torch.float16}, "scale must be float32"),
        ({"scale_O": torch.ones(1, 16)}, r"scale must be \(1,\) or \(n,\)"),
        ({"pertoken_scale": torch.ones(2, 1)}, r"pertoken_scale must be \(m,\)"),
        ({"pertoken_scale": torch.ones(2, dtype=torch.float16)}, "pertoken_scale must be float32"),
        ({"bias": torch.ones(16, dtype=torch.float16)}, "bias must be int32, float32 or of the output's dtype"),
    ],
)
def test_the_model_of_the_int8_product_refuses_likewise(given, refusal):
    assert full_product().tolist() == [[64.0] * 16] * 2
    with pytest.raises(RuntimeError, match=refusal):
        full_product(**given)
