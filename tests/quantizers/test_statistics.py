"""The Hessian: H = 2/n sum X X^T in float64, whatever the width, the batches and the type of the inputs."""

import pytest
import torch

from quantizers.statistics import Hessian


def inputs_of(width, sequences=5, tokens=7):
    generator = torch.Generator().manual_seed(width)
    return torch.randn(sequences, tokens, width, generator=generator) * (1 + torch.arange(width) % 7)


def exact(inputs):
    flat = inputs.reshape(-1, inputs.shape[-1]).double()
    return 2 / inputs.shape[0] * flat.T @ flat


def value(batches):
    hessian = Hessian(batches[0].shape[-1], batches[0].device)
    for batch in batches:
        hessian.update(batch)
    return hessian.value()


@pytest.mark.parametrize("width", [1, 2, 255, 256, 257, 300, 512, 576])
def test_equals_float64(width):
    inputs = inputs_of(width)
    hessian = value([inputs])
    assert hessian.dtype == torch.float32
    assert hessian.shape == (width, width)
    assert torch.equal(hessian, hessian.T)
    reference = exact(inputs)
    scale = reference.diagonal().sqrt()
    assert ((hessian.double() - reference).abs() <= 1e-6 * scale[:, None] * scale[None, :]).all()


def test_batches_do_not_matter():
    inputs = inputs_of(300, sequences=12)
    together = value([inputs])
    reference = exact(inputs)
    for sizes in ([1] * 12, [5, 7], [11, 1]):
        split = value(list(torch.split(inputs, sizes)))
        torch.testing.assert_close(split, together, rtol=0, atol=1e-6 * reference.abs().max().item())


def test_counts_sequences_and_not_tokens():
    inputs = torch.ones(2, 10, 3)
    assert value([inputs]).unique().item() == 2 / 2 * 20
    assert value([inputs, torch.ones(3, 10, 3)]).unique().item() == 2 / 5 * 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_summed_in_float32(dtype):
    inputs = inputs_of(48, sequences=16, tokens=64).to(dtype)
    reference = exact(inputs)
    torch.testing.assert_close(value([inputs]).double(), reference, rtol=0, atol=1e-6 * reference.abs().max().item())


def test_reading_does_not_change_it():
    hessian = Hessian(3, torch.device("cpu"))
    assert torch.equal(hessian.value(), torch.zeros(3, 3))
    first = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    hessian.update(first)
    assert torch.equal(hessian.value(), hessian.value())
    hessian.update(first)
    torch.testing.assert_close(hessian.value(), value([first]))
