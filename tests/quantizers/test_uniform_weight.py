"""Artifacts: what is stored decodes to the same bits, and costs what it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.gptq import Gptq, gptq
from quantizers.grid import CONVENTIONS, Grid
from quantizers.rtn import round_to_nearest
from quantizers.uniform_weight import UniformWeight, stored_bytes
from tests.reference.grids import CONVENTION

GRIDS = st.builds(
    Grid,
    bits=st.integers(1, 8),
    group_size=st.sampled_from([0, 1, 5, 8]),
    convention=st.sampled_from(CONVENTIONS),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    tail_group=st.just(True),
)


def check_round_trip(weight, grid):
    tensors = weight.pack()
    assert all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors.values())
    restored = UniformWeight.unpack(tensors, weight.spec(), weight.shape)
    assert torch.equal(restored.decode(), weight.decode())
    assert torch.equal(restored.codes_OI, weight.codes_OI)
    assert torch.equal(restored.scale_OG, weight.scale_OG)
    assert (restored.zero_OG is None) == grid.symmetric
    if weight.zero_OG is not None:
        assert torch.equal(restored.zero_OG, weight.zero_OG)
    assert weight.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


@given(GRIDS, st.integers(1, 5), st.integers(8, 30), st.integers(0, 9))
def test_round_trip(grid, rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.1 * seed
    quantized = round_to_nearest(weight, grid)
    tensors = check_round_trip(quantized, grid)
    assert set(tensors) == ({"codes", "scale"} if grid.symmetric else {"codes", "scale", "zero"})
    assert quantized.stored_bytes == stored_bytes(grid, rows, columns)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_round_trip_of_permuted_groups(make_problem, bits, symmetric):
    weight, hessian = make_problem(0, 6, 40)
    options = Gptq(
        grid=Grid(bits=bits, group_size=16, convention=CONVENTION[symmetric], tail_group=True),
        static_groups=False,
    )
    quantized, _ = gptq(weight, hessian, options)
    assert quantized.column_group_I is not None
    tensors = check_round_trip(quantized, options.grid)
    assert tensors["column_group"].dtype == torch.int32
    assert quantized.stored_bytes == stored_bytes(options.grid, 6, 40, permuted=True)
    assert quantized.stored_bytes == stored_bytes(options.grid, 6, 40) + 4 * 40


def test_decode_uses_the_group_of_each_column():
    grid = Grid(bits=2, group_size=2)
    weight = UniformWeight(
        grid=grid,
        codes_OI=torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8),
        scale_OG=torch.tensor([[1.0, 10.0]]),
        zero_OG=torch.tensor([[1.0, 2.0]]),
        column_group_I=torch.tensor([1, 0, 1, 0], dtype=torch.int32),
    )
    assert weight.decode().tolist() == [[-20.0, 0.0, 0.0, 2.0]]


def test_bytes_by_hand():
    # 3 rows of 20 codes of 3 bits: 8 bytes; 3 groups: 3 x 2 bytes of scales and 9 bits, so 2 bytes, of zeros.
    assert stored_bytes(Grid(bits=3, group_size=8, tail_group=True), 3, 20) == 3 * (8 + 6 + 2)
    assert stored_bytes(Grid(bits=3, group_size=8, tail_group=True, convention="gptq-sym"), 3, 20) == 3 * (8 + 6)
    assert stored_bytes(Grid(bits=1, group_size=10, scale_dtype="float32"), 3, 20) == 3 * (3 + 8 + 8)
    assert stored_bytes(Grid(bits=8), 3, 20) == 3 * (20 + 2 + 1)
