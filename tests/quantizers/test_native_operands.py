"""What the operators are given stands for exactly what was stored."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.errors import NoKernelError
from quantizers.grid import CONVENTIONS, SCALE_DTYPES, Grid
from quantizers.native_kernels import Kernel
from quantizers.native_operands import operands_of
from quantizers.rtn import round_to_nearest


def stored(grid, shape=(16, 80), seed=0, shift=0.0):
    weight = 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift
    return round_to_nearest(weight, grid)


@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([0, 32, 64, 80]),
    convention=st.sampled_from(CONVENTIONS),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    shift=st.sampled_from([-0.4, 0.0, 0.02, 0.4]),
    seed=st.integers(0, 9),
)
def test_weights_alone_are_kept_to_the_last_bit(bits, group_size, convention, dtype, shift, seed):
    grid = Grid(bits=bits, group_size=group_size, convention=convention, scale_dtype=dtype, tail_group=True)
    weight = stored(grid, seed=seed, shift=shift)
    kernel = Kernel.W4A16 if bits == 4 else Kernel.W8A16
    operands = operands_of(weight, kernel, SCALE_DTYPES[dtype])
    assert torch.equal(operands.decode(), weight.decode())
    assert operands.weight_IO.shape == (80, 16)
    assert operands.weight_IO.is_contiguous()
    assert operands.weight_IO.dtype == (torch.int32 if bits == 4 else torch.int8)
    assert int(operands.weight_IO.min()) >= -(1 << (bits - 1))
    assert int(operands.weight_IO.max()) < 1 << (bits - 1)
    groups = grid.num_groups(80)
    assert operands.scale.shape == ((groups, 16) if groups > 1 else (16,))
    assert operands.group_size == (group_size if groups > 1 else 0)
    assert (operands.offset is None) == grid.symmetric
    for part in (operands.scale, operands.offset):
        assert part is None or (part.dtype == SCALE_DTYPES[dtype] and part.is_contiguous())


@given(convention=st.sampled_from(["gptq-sym", "gptaq-sym", "sq-sym"]), dtype=st.sampled_from(sorted(SCALE_DTYPES)))
def test_with_quantized_activations_scales_stay_float32(convention, dtype):
    weight = stored(Grid(bits=8, convention=convention, scale_dtype=dtype))
    operands = operands_of(weight, Kernel.W8A8, torch.bfloat16)
    assert torch.equal(operands.decode(), weight.decode())
    assert (operands.weight_IO.dtype, operands.scale.dtype, operands.offset) == (torch.int8, torch.float32, None)
    assert operands.scale.shape == (16,)
    assert operands.scale.is_contiguous()


def test_the_ends_of_both_ranges_are_exact():
    grid = Grid(bits=8, scale_dtype="bfloat16")
    weight = stored(grid, shape=(2, 4))
    codes = torch.tensor([[0, 255, 1, 254], [0, 255, 1, 254]], dtype=torch.uint8)
    for zero in (0.0, 255.0):
        ends = dataclasses.replace(weight, codes_OI=codes, zero_OG=torch.full((2, 1), zero))
        operands = operands_of(ends, Kernel.W8A16, torch.bfloat16)
        assert operands.weight_IO.T.tolist() == [[-128, 127, -127, 126]] * 2
        assert operands.offset.tolist() == [128.0 - zero] * 2
        assert torch.equal(operands.decode(), ends.decode())


def test_a_scale_that_the_operator_would_round_is_refused():
    weight = stored(Grid(bits=8, scale_dtype="float16"))
    assert operands_of(weight, Kernel.W8A16, torch.float16).scale.dtype == torch.float16
    with pytest.raises(NoKernelError, match=r"a scale is no torch\.bfloat16 number; set scale_dtype: bfloat16"):
        operands_of(weight, Kernel.W8A16, torch.bfloat16)
