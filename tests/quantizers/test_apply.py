"""Putting decoded weights into a model for a while."""

import pytest
import torch

from quantizers.apply import StoredBlock, StoredLinear, installed
from quantizers.errors import QuantizationError
from quantizers.grid import Grid
from quantizers.rtn import round_to_nearest

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def block(name, weight):
    return StoredBlock(linears=[StoredLinear(name=name, weight=weight)])


def artifacts(model, names=NAMES, bits=4):
    for name in names:
        weight = round_to_nearest(model.get_submodule(name).weight.detach().float(), Grid(bits=bits))
        yield block(name, weight)


def snapshot(model):
    return {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}


def check_restored(model, before):
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_put_in_and_restored(llama, windows, dtype):
    llama = llama.to(dtype)
    before = snapshot(llama)
    expected = {part.linears[0].name: part.linears[0].weight.decode().to(dtype) for part in artifacts(llama)}
    with torch.no_grad():
        logits = llama(windows).logits
    with installed(llama, artifacts(llama)) as quantized:
        assert quantized is llama
        for name, parameter in llama.named_parameters():
            linear = name.removesuffix(".weight")
            assert torch.equal(parameter, expected.get(linear, before[name][1]))
            assert parameter.dtype == dtype
        with torch.no_grad():
            changed = llama(windows).logits
    check_restored(llama, before)
    assert not torch.equal(logits, changed)
    with torch.no_grad():
        assert torch.equal(llama(windows).logits, logits)


def test_restored_after_an_exception(llama):
    before = snapshot(llama)
    with pytest.raises(RuntimeError, match="inside"), installed(llama, artifacts(llama)):
        raise RuntimeError("inside")
    check_restored(llama, before)


def test_restored_when_an_artifact_cannot_be_read(llama):
    before = snapshot(llama)

    def broken():
        yield from artifacts(llama)
        raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"), installed(llama, broken()):
        pytest.fail("entered")
    check_restored(llama, before)


def test_wrong_shape_is_refused_and_undone(llama):
    before = snapshot(llama)
    weights = [*artifacts(llama), block("model.layers.0.mlp.up_proj", round_to_nearest(torch.ones(2, 3), Grid(bits=4)))]
    with (
        pytest.raises(ValueError, match=r"mlp\.up_proj\.weight: artifact of shape \(2, 3\), model has \(80, 48\)"),
        installed(llama, weights),
    ):
        pytest.fail("entered")
    check_restored(llama, before)


def test_a_name_that_is_no_linear_is_refused(llama):
    weight = round_to_nearest(torch.ones(2, 3), Grid(bits=4))
    with (
        pytest.raises(QuantizationError, match=r"model\.norm is a LlamaRMSNorm, not a Linear"),
        installed(llama, [block("model.norm", weight)]),
    ):
        pytest.fail("entered")


def test_a_linear_given_twice_is_restored_too(llama):
    before = snapshot(llama)
    with installed(llama, [*artifacts(llama), *artifacts(llama, bits=2)]):
        pass
    check_restored(llama, before)


def test_weights_are_consumed_one_at_a_time(llama):
    put_in = []

    def watched():
        for part in artifacts(llama):
            yield part
            (linear,) = part.linears
            put_in.append(torch.equal(llama.get_submodule(linear.name).weight, linear.weight.decode()))

    with installed(llama, watched()):
        assert put_in == [True, True]
