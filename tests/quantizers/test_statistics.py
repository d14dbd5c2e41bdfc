"""The Hessian: H = 2/n sum X X^T in float64, whatever the width, the batches and the type of the inputs."""

import pytest
import torch

from quantizers.exact_products import exact_products
from quantizers.statistics import Drift, Hessian


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
    # What adding up 1,024 products in float32 one after the other may lose, as exact products do on some processors.
    tolerance = 1024**0.5 * torch.finfo(torch.float32).eps * reference.abs().max().item()
    torch.testing.assert_close(value([inputs]).double(), reference, rtol=0, atol=tolerance)


def test_the_drift_of_bfloat16_inputs_is_that_of_float64():
    inputs, noise = inputs_of(96, sequences=16, tokens=64), inputs_of(95, sequences=16, tokens=64)
    float_inputs = inputs.clone()
    float_inputs[..., :95] += 0.1 * noise
    inputs, float_inputs = inputs.bfloat16(), float_inputs.bfloat16()
    drift = Drift(96, inputs.device)
    drift.update(inputs, float_inputs)
    flat, difference = inputs.flatten(0, 1).double(), (float_inputs.double() - inputs.double()).flatten(0, 1)
    reference = 2 / 16 * difference.T @ flat
    scale = 2 / 16 * difference.square().sum(0).sqrt()[:, None] * flat.square().sum(0).sqrt()
    assert ((drift.value().double() - reference).abs() <= 4e-6 * scale).all()
    assert not drift.value()[95].any()  # the channel that did not drift


def test_exact_products_leave_torch_s_precision_as_it_was():
    precision = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ValueError, match="in it"), exact_products(torch.zeros(1, dtype=torch.bfloat16)):
        raise ValueError("in it")
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
    with exact_products(torch.zeros(1)):
        assert torch.backends.mkldnn.matmul.fp32_precision == precision


def test_reading_does_not_change_it():
    hessian = Hessian(3, torch.device("cpu"))
    assert torch.equal(hessian.value(), torch.zeros(3, 3))
    first = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    hessian.update(first)
    assert torch.equal(hessian.value(), hessian.value())
    hessian.update(first)
    torch.testing.assert_close(hessian.value(), value([first]))
