"""Mixed encoding: what is stored decodes to the same bits, and costs what it says."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.grid import Grid, encode, fit_grid, fit_group
from quantizers.mixed_weight import MixedWeight
from quantizers.rtn import round_to_nearest


def rounded(weight, grid, group_bits):
    """Round every group to nearest with its own bits."""
    codes, scales, zeros = [], [], []
    for part, bits in zip(torch.split(weight, grid.group_columns(weight.shape[1]), 1), group_bits, strict=True):
        own = dataclasses.replace(grid, bits=bits)
        scale, zero = fit_group(part, own)
        codes.append(encode(part, scale[:, None], zero[:, None], own).to(torch.uint8))
        scales.append(scale)
        zeros.append(zero)
    return MixedWeight(
        grid=grid,
        group_bits=group_bits,
        codes_OI=torch.cat(codes, 1),
        scale_OG=torch.stack(scales, 1),
        zero_OG=torch.stack(zeros, 1),
    )


@st.composite
def mixed_weights(draw):
    grid = Grid(
        bits=draw(st.integers(2, 7)),
        group_size=draw(st.sampled_from([1, 3, 8, 16])),
        scale_dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        tail_group=True,
    )
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    groups = grid.num_groups(columns)
    group_bits = draw(st.lists(st.integers(1, 8), min_size=groups, max_size=groups))
    seed = draw(st.integers(0, 9))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.1 * seed
    return rounded(weight, grid, group_bits)


@given(mixed_weights())
def test_round_trip(weight):
    tensors, spec = weight.pack(), json.loads(json.dumps(weight.spec()))
    assert all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors.values())
    assert weight.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())
    restored = MixedWeight.unpack(tensors, spec, weight.shape)
    assert restored.shape == weight.shape
    assert restored.grid == weight.grid
    assert list(restored.group_bits) == list(weight.group_bits)
    for name in ("codes_OI", "scale_OG", "zero_OG"):
        assert torch.equal(getattr(restored, name), getattr(weight, name))
        assert getattr(restored, name).dtype == getattr(weight, name).dtype
    assert torch.equal(restored.decode(), weight.decode())


@given(mixed_weights())
def test_tensors_are_one_stream_per_bit_width(weight):
    widths = {f"{kind}_{bits}" for bits in set(weight.group_bits) for kind in ("codes", "zero")}
    assert set(weight.pack()) == {"group_bits", "scale"} | widths


@given(mixed_weights())
def test_decodes_each_column_by_its_group(weight):
    decoded, size = weight.decode(), weight.grid.group_size
    assert decoded.dtype == torch.float32
    for row, column in torch.cartesian_prod(*(torch.arange(length) for length in weight.shape)).tolist():
        scale, zero = weight.scale_OG[row, column // size], weight.zero_OG[row, column // size]
        assert decoded[row, column] == scale * (weight.codes_OI[row, column].float() - zero)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [24, 21])
def test_equal_bits_are_the_uniform_encoding(bits, columns):
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(bits))
    grid = Grid(bits=bits, group_size=8, tail_group=True)
    mixed, uniform = rounded(weight, grid, [bits] * 3), round_to_nearest(weight, grid)
    assert torch.equal(mixed.decode(), uniform.decode())
    assert mixed.stored_bytes == uniform.stored_bytes + 3  # the map of bits
    tensors, others = mixed.pack(), uniform.pack()
    assert torch.equal(tensors[f"codes_{bits}"], others["codes"])
    assert torch.equal(tensors[f"zero_{bits}"], others["zero"])
    assert torch.equal(tensors["scale"], others["scale"])
    assert mixed.published_bits_per_weight == bits


def test_bytes_by_hand():
    weight = rounded(torch.randn(3, 20), Grid(bits=2, group_size=8, tail_group=True), [3, 1, 2])
    # a row: 24 + 8 + 8 bits of codes, 3 x 2 bytes of scales, zeros of 3 bits, 2 bytes and 2 bits; and 3 bytes of map
    assert weight.stored_bytes == 3 * (3 + 1 + 1 + 6 + 1 + 2 + 1) + 3
    assert weight.published_bits_per_weight == (3 * 8 + 1 * 8 + 2 * 4) / 20


def test_zeros_of_one_bit_groups_keep_their_fraction():
    grid = Grid(bits=2, group_size=4)
    weight = rounded(torch.tensor([[0.1, 0.2, 0.7, 0.9, -1.0, 0.0, 1.0, 2.0]]), grid, [1, 3])
    assert weight.zero_OG[0, 0] % 1 != 0
    assert weight.zero_OG[0, 1] % 1 == 0
    restored = MixedWeight.unpack(weight.pack(), weight.spec(), weight.shape)
    assert torch.equal(restored.decode(), weight.decode())
    assert len(weight.decode()[0, :4].unique()) == 2


def test_uniform_grid_is_unaffected_by_nominal_bits():
    """The nominal bits are a name; codes, scales and zeros alone say what is decoded."""
    weight = torch.randn(2, 8)
    scale, zero = fit_grid(weight, Grid(bits=5, group_size=4))
    named = [rounded(weight, Grid(bits=bits, group_size=4), [5, 5]) for bits in (4, 5)]
    assert torch.equal(named[0].decode(), named[1].decode())
    assert torch.equal(named[0].scale_OG, scale)
    assert torch.equal(named[0].zero_OG, zero)
