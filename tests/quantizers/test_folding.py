"""Error folding: an orthogonal projection, and an option of every method that has no correction of its own."""

import pytest
import torch

from quantizers.block_source import InMemory
from quantizers.errors import QuantizationError
from quantizers.folding import fold_errors
from quantizers.gptq import Gptq
from quantizers.grid import Grid
from quantizers.rtn import Rtn
from quantizers.statistics import Drift, Hessian, InputStatistics
from quantizers.stream import quantize_blocks

IN, OUT = 32, 12


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    float_inputs = torch.randn(4, 64, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    inputs = 0.8 * float_inputs + torch.randn(float_inputs.shape, generator=generator)
    hessian, drift = Hessian(IN, inputs.device), Drift(IN, inputs.device)
    hessian.update(inputs)
    drift.update(inputs, float_inputs)
    statistics = InputStatistics(hessian_II=hessian.value(), drift_II=drift.value())
    return torch.randn(OUT, IN, generator=generator), statistics, inputs.reshape(-1, IN), float_inputs.reshape(-1, IN)


def test_whole_projection_is_least_squares(problem):
    weight, statistics, inputs, float_inputs = problem
    folded = fold_errors(weight, statistics, 1.0, 1e-9)
    expected = torch.linalg.lstsq(inputs.double(), float_inputs.double() @ weight.double().T).solution.T
    assert torch.allclose(folded.double(), expected, atol=1e-4)


def test_strength_is_linear_and_zero_is_nothing(problem):
    weight, statistics, *_ = problem
    whole, half = (fold_errors(weight, statistics, strength, 1.0) for strength in (1.0, 0.5))
    assert torch.equal(fold_errors(weight, statistics, 0.0, 1.0), weight)
    assert torch.allclose(half - weight, (whole - weight) / 2, atol=1e-6)


def test_no_drift_changes_nothing(problem):
    weight, statistics, *_ = problem
    still = InputStatistics(hessian_II=statistics.hessian_II, drift_II=torch.zeros(IN, IN))
    assert torch.equal(fold_errors(weight, still, 1.0, 0.01), weight)


def test_statistics_are_left_alone(problem):
    weight, statistics, *_ = problem
    before = statistics.hessian_II.clone()
    fold_errors(weight, statistics, 1.0, 1.0)
    assert torch.equal(statistics.hessian_II, before)


@pytest.mark.parametrize("kind", [Rtn, Gptq])
def test_folding_brings_the_model_nearer_to_the_float_one(llama, windows, kind):
    """With all of the projection, on the very tokens that it was fitted to."""
    from quantizers.apply import installed

    expected = llama(windows).logits

    def distance(fold):
        method = kind(grid=Grid(bits=3), fold=fold, fold_damping=0.01)
        with installed(llama, list(quantize_blocks(InMemory(llama), method, windows))):
            return (llama(windows).logits - expected).square().mean().item()

    assert distance(1.0) < distance(0.0)


@pytest.mark.parametrize("options", [{"fold": -0.1}, {"fold": 1.1}, {"fold": 0.5, "fold_damping": 0.0}])
@pytest.mark.parametrize("kind", [Rtn, Gptq])
def test_bad_options(kind, options):
    with pytest.raises(QuantizationError, match="fold"):
        kind(grid=Grid(bits=4), **options)


def test_data_is_needed_only_to_fold():
    assert not Rtn(grid=Grid(bits=4)).needs.calibration
    assert Rtn(grid=Grid(bits=4), fold=0.5).needs.calibration
    assert not Gptq(grid=Grid(bits=4)).needs.drift
    assert Gptq(grid=Grid(bits=4), fold=0.5).needs.drift
