"""RTN: every weight alone, to the nearest value of its grid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.errors import QuantizationError
from quantizers.grid import CONVENTIONS, Grid
from quantizers.method import LinearGroup
from quantizers.rtn import Rtn, round_to_nearest
from tests.reference import grids
from tests.reference.grids import CONVENTION


@given(
    st.integers(2, 8),
    st.sampled_from(CONVENTIONS),
    st.sampled_from([0, 1, 7, 8]),
    st.lists(st.lists(st.integers(-2048, 2048), min_size=24, max_size=24), min_size=1, max_size=4),
)
def test_equals_the_reference(bits, convention, group_size, rows):
    weight = torch.tensor(rows) / 1024
    grid = Grid(bits=bits, convention=convention, group_size=group_size, tail_group=True)
    codes, scales, zeros = grids.round_to_nearest(weight.tolist(), bits, group_size, convention)
    quantized = round_to_nearest(weight, grid)
    assert quantized.codes_OI.dtype == torch.uint8
    assert quantized.codes_OI.tolist() == codes
    assert quantized.scale_OG.tolist() == scales
    assert (None if grid.symmetric else zeros) == (
        quantized.zero_OG.tolist() if quantized.zero_OG is not None else None
    )
    assert quantized.column_group_I is None


def test_each_linear_alone_and_no_hessian():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 32, generator=generator) for rows in (4, 2)]
    method = Rtn(grid=Grid(bits=3, group_size=16))
    outcome = method.quantize(LinearGroup.of(weights))
    assert outcome.damping is None
    for weight, quantized in zip(weights, outcome.weights, strict=True):
        assert torch.equal(quantized.decode(), round_to_nearest(weight, method.grid).decode())
    assert not method.needs.calibration
    assert not method.stores_column_groups(32)


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_and_smaller_groups_are_closer(symmetric):
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))

    def error(bits, group_size):
        quantized = round_to_nearest(weight, Grid(bits=bits, group_size=group_size, convention=CONVENTION[symmetric]))
        return (weight - quantized.decode()).square().sum().item()

    per_bits = [error(bits, 0) for bits in range(1, 9)]
    assert per_bits == sorted(per_bits, reverse=True)
    per_size = [error(4, size) for size in (0, 64, 32, 16)]
    assert per_size == sorted(per_size, reverse=True)


def test_quantizing_twice_changes_nothing():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    grid = Grid(bits=4, group_size=16, scale_dtype="float32")
    once = round_to_nearest(weight, grid).decode()
    torch.testing.assert_close(round_to_nearest(once, grid).decode(), once, rtol=1e-5, atol=1e-6)


def test_overflow_is_refused():
    with pytest.raises(QuantizationError, match="use scale_dtype: float32"):
        round_to_nearest(torch.tensor([[1e7, 0.0]]), Grid(bits=4))
