"""The binarized encoding: what is stored decodes to the same bits, and costs what it says."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.binarized_weight import BinarizedBlock, BinarizedWeight, level, stored_level
from quantizers.errors import QuantizationError
from quantizers.grid import SCALE_DTYPES


def random_block(generator, rows, columns, num_salient, scale_dtype):
    def bits(width):
        return torch.randint(0, 2, (rows, width), generator=generator).to(torch.uint8)

    salient = torch.zeros(columns, dtype=torch.bool)
    salient[torch.randperm(columns, generator=generator)[:num_salient]] = True
    return BinarizedBlock(
        salient_B=salient,
        sign_OB=bits(columns),
        second_sign_OS=bits(num_salient),
        sparse_ON=bits(columns - num_salient),
        mean_PO=stored_level(torch.randn(4, rows, generator=generator), scale_dtype),
        scale_PO=stored_level(torch.rand(4, rows, generator=generator), scale_dtype),
    )


@st.composite
def weights(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    rows, columns, block_size = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.integers(1, 20))
    scale_dtype = draw(st.sampled_from(list(SCALE_DTYPES)))
    blocks = []
    for start in range(0, columns, block_size):
        width = min(block_size, columns - start)
        blocks.append(random_block(generator, rows, width, draw(st.integers(0, width)), scale_dtype))
    return BinarizedWeight(blocks=blocks, block_size=block_size, scale_dtype=scale_dtype)


@given(weights())
def test_round_trip(weight):
    tensors = weight.pack()
    assert all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors.values())
    spec = json.loads(json.dumps(weight.spec()))
    restored = BinarizedWeight.unpack(tensors, spec, weight.shape)
    assert restored.shape == weight.shape
    assert torch.equal(restored.decode(), weight.decode())
    assert restored.spec() == weight.spec()
    for block, original in zip(restored.blocks, weight.blocks, strict=True):
        for name in ("salient_B", "sign_OB", "second_sign_OS", "sparse_ON", "mean_PO", "scale_PO"):
            assert torch.equal(getattr(block, name), getattr(original, name)), name
            assert getattr(block, name).dtype == getattr(original, name).dtype, name
    again = restored.pack()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@given(weights())
def test_bytes_are_those_of_the_tensors(weight):
    assert weight.stored_bytes == sum(tensor.nbytes for tensor in weight.pack().values())


def test_bytes_by_hand():
    generator = torch.Generator().manual_seed(0)
    blocks = [random_block(generator, 3, width, count, "float16") for width, count in ((8, 2), (8, 0), (4, 1))]
    weight = BinarizedWeight(blocks=blocks, block_size=8, scale_dtype="float16")
    # 3 rows of 20 signs, 3 second signs and 17 splits (3 + 1 + 3 bytes) and 3 blocks of 8 levels; 20 salient bits.
    assert weight.stored_bytes == 3 * (7 + 3 * 16) + 3
    assert weight.shape == (3, 20)
    assert weight.num_salient == 3
    assert weight.published_bits_per_weight == pytest.approx(2 * 3 / 20 + 17 / 20)


def test_whole_blocks_of_128_take_three_bits():
    generator = torch.Generator().manual_seed(0)
    blocks = [random_block(generator, 1024, 128, 8, "float16") for _ in range(2)]
    weight = BinarizedWeight(blocks=blocks, block_size=128, scale_dtype="float16")
    assert weight.stored_bytes * 8 / (1024 * 256) == pytest.approx(3.0 + 1 / 1024)
    assert weight.published_bits_per_weight == 1 + 8 / 128


def test_decode_by_hand():
    block = BinarizedBlock(
        salient_B=torch.tensor([False, True, False, True, False]),
        sign_OB=torch.tensor([[1, 1, 0, 0, 1]], dtype=torch.uint8),
        second_sign_OS=torch.tensor([[0, 1]], dtype=torch.uint8),
        sparse_ON=torch.tensor([[0, 1, 1]], dtype=torch.uint8),
        mean_PO=torch.tensor([[100.0], [10.0], [1.0], [-1.0]]),
        scale_PO=torch.tensor([[50.0], [5.0], [0.5], [4.0]]),
    )
    assert block.decode().tolist() == [[1.5, 155.0, -5.0, 65.0, 3.0]]
    both = BinarizedWeight(blocks=[block, block], block_size=5, scale_dtype="float16")
    assert torch.equal(both.decode(), torch.cat([block.decode()] * 2, 1))


def test_levels():
    assert level(torch.tensor([1, 0]), torch.tensor(3.0), torch.tensor(0.5)).tolist() == [3.5, 2.5]
    assert stored_level(torch.tensor([0.0, -(1 + 2**-12)]), "float16").tolist() == [0.0, -1.0]


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (-1e5, "float16"), (float("inf"), "float32")])
def test_overflow_is_refused(value, dtype):
    with pytest.raises(QuantizationError, match=f"does not fit {dtype}; use scale_dtype: float32"):
        stored_level(torch.tensor([1.0, value]), dtype)
