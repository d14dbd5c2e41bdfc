"""Packing: a little-endian bit stream per row, and nothing lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.packing import pack, packed_columns, unpack


def stream(codes, bits):
    """One row packed by the definition, in plain Python: code i occupies bits [i*b, (i+1)*b)."""
    number = sum(code << (index * bits) for index, code in enumerate(codes))
    return list(number.to_bytes((len(codes) * bits + 7) // 8, "little"))


@given(st.data(), st.integers(1, 8), st.integers(1, 4), st.integers(1, 40))
def test_round_trip_is_the_bit_stream(data, bits, rows, columns):
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    codes = data.draw(st.lists(row, min_size=rows, max_size=rows))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_columns(columns, bits))
    assert packed.tolist() == [stream(row, bits) for row in codes]
    assert unpack(packed, bits, columns).tolist() == codes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [8, 576, 1023])
def test_byte_counts(bits, columns):
    codes = torch.full((3, columns), 2**bits - 1, dtype=torch.uint8)
    assert pack(codes, bits).numel() == 3 * ((columns * bits + 7) // 8)
    assert torch.equal(unpack(pack(codes, bits), bits, columns), codes)
    assert packed_columns(8, bits) == bits


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0b10000001, 0b1]),
        (2, [1, 2, 3, 0, 3], [0b00111001, 0b11]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11010001, 0b01011000, 0b00011111]),
        (4, [1, 15, 2], [0xF1, 0x02]),
        (5, [31, 0, 31], [0b00011111, 0b01111100]),
        (7, [127, 1], [0b11111111, 0b0]),
        (8, [1, 255], [1, 255]),
    ],
)
def test_by_hand(bits, codes, expected):
    packed = pack(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.tolist() == [expected]
    assert unpack(packed, bits, len(codes)).tolist() == [codes]


def test_rows_end_on_a_byte_boundary_with_zero_padding():
    packed = pack(torch.tensor([[7, 7, 7], [0, 0, 1]], dtype=torch.uint8), 3)
    assert packed.tolist() == [[0xFF, 0x01], [0b01000000, 0]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_views_and_their_results_are_contiguous(bits):
    codes = torch.randint(0, 2**bits, (10, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack(pack(codes.T, bits), bits, 10), codes.T)
    assert pack(codes.T, bits).is_contiguous()
    assert unpack(pack(codes, bits), bits, 6).is_contiguous()
