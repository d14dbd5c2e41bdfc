"""The table of methods, and what each promises the engine."""

import dataclasses

import pytest
import torch

from quantizers.grid import Grid
from quantizers.methods import METHODS
from quantizers.quantized_weight import stored_bytes
from quantizers.statistics import InputStatistics


@pytest.mark.parametrize("name", METHODS)
def test_names_and_versions_agree(name):
    method = METHODS[name](grid=Grid(bits=4))
    assert method.name == name
    assert method.code_version.startswith(f"{name}/")


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_options_only(name):
    """Frozen, comparable and hashable, so that they can be part of a job's identity."""
    method = METHODS[name](grid=Grid(bits=4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.grid = Grid(bits=3)
    assert method == METHODS[name](grid=Grid(bits=4))
    assert hash(method) == hash(METHODS[name](grid=Grid(bits=4)))
    assert method != METHODS[name](grid=Grid(bits=3))
    with pytest.raises(TypeError):
        METHODS[name](Grid(bits=4))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
def test_every_method_keeps_the_contract(make_problem, name, bits, symmetric, group_size):
    weight, hessian = make_problem(0, 12, 48)
    method = METHODS[name](grid=Grid(bits=bits, group_size=group_size, symmetric=symmetric))
    weights = [weight[:8], weight[8:]]
    before = [part.clone() for part in weights], hessian.clone()
    drift = 0.1 * torch.randn(48, 48, generator=torch.Generator().manual_seed(1))
    statistics = InputStatistics(hessian_II=hessian, drift_II=drift if method.needs_drift else None)
    outcome = method.quantize(weights, statistics if method.needs_calibration else None)
    assert all(torch.equal(part, old) for part, old in zip(weights, before[0], strict=True))
    assert torch.equal(hessian, before[1])
    assert (outcome.damping is not None) == method.needs_calibration
    for part, quantized in zip(weights, outcome.weights, strict=True):
        assert quantized.grid == method.grid
        assert quantized.codes_OI.dtype == torch.uint8
        assert quantized.decode().dtype == torch.float32
        assert quantized.decode().shape == part.shape
        assert (quantized.column_group_I is not None) == method.stores_column_groups(48)
        assert quantized.stored_bytes == stored_bytes(
            method.grid, *part.shape, permuted=method.stores_column_groups(48)
        )
