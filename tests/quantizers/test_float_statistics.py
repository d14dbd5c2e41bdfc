"""Statistics of the float model: what whole forwards of it would show, and shared by methods on the float path."""

import pytest
import torch

from quantizers import block as block_module
from quantizers.block_source import InMemory
from quantizers.errors import QuantizationError
from quantizers.families import family_of
from quantizers.float_statistics import collect_float_statistics
from quantizers.gptq import Gptq
from quantizers.grid import Grid
from quantizers.stream import quantize_blocks


def inputs_of(model, windows, name):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0].double()))
    with torch.no_grad():
        model(windows)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


@pytest.mark.parametrize("tokens_per_batch", [1, 48, 4096])
def test_statistics_equal_those_of_whole_forwards(any_model, windows, monkeypatch, tokens_per_batch):
    monkeypatch.setattr(block_module, "_TOKENS_PER_BATCH", tokens_per_batch)
    family = family_of(any_model)
    collected = list(collect_float_statistics(InMemory(any_model), windows, hessians=True))
    assert len(collected) == 2
    for index, stages in enumerate(collected):
        for stage, statistics in zip(family.stages, stages, strict=True):
            inputs = inputs_of(any_model, windows, f"{family.blocks}.{index}.{stage[0]}")
            ranges = statistics.ranges
            assert torch.allclose(ranges.low_I.double(), inputs.amin(0), rtol=1e-4, atol=1e-5)
            assert torch.allclose(ranges.high_I.double(), inputs.amax(0), rtol=1e-4, atol=1e-5)
            assert torch.allclose(ranges.max_abs_I.double(), inputs.abs().amax(0), rtol=1e-4, atol=1e-5)
            assert torch.allclose(ranges.mean_abs_I.double(), inputs.abs().mean(0), rtol=1e-4, atol=1e-6)
            hessian = 2 / len(windows) * inputs.T @ inputs
            assert (statistics.hessian_II.double() - hessian).norm() <= 1e-5 * hessian.norm()


def test_hessians_are_collected_only_where_asked(llama, windows):
    stages = next(collect_float_statistics(InMemory(llama), windows, hessians=False))
    assert all(stage.hessian_II is None for stage in stages)


@pytest.mark.parametrize(
    ("broken", "named"),
    [("embed_tokens", "layers.0.self_attn.q_proj"), ("layers.1.input_layernorm", "layers.1.self_attn.q_proj")],
)
def test_activations_that_are_not_finite_are_refused_by_name(llama, windows, broken, named):
    with torch.no_grad():
        llama.model.get_submodule(broken).weight[..., 2] = float("nan")
    with pytest.raises(QuantizationError, match=f"the calibration inputs of model.{named} hold NaN or infinity"):
        list(collect_float_statistics(InMemory(llama), windows, hessians=False))


def test_the_float_path_quantizes_for_the_float_models_inputs(llama, windows):
    """The same Hessian for every bit-width, and no quantized block in sight; the first stage sees no difference."""
    stored = list(collect_float_statistics(InMemory(llama), windows, hessians=True))
    asked = []

    def shared(index):
        asked.append(index)
        return stored[index]

    method = Gptq(grid=Grid(bits=3), path="float")
    given = list(quantize_blocks(InMemory(llama), method, windows, shared=shared))
    alone = list(quantize_blocks(InMemory(llama), method, windows))
    other = list(quantize_blocks(InMemory(llama), Gptq(grid=Grid(bits=3)), windows))
    assert asked == [0, 1]
    for one, two in zip(given, alone, strict=True):
        for first, second in zip(one.linears, two.linears, strict=True):
            assert torch.equal(first.weight.codes_OI, second.weight.codes_OI)
            assert first.output_error == second.output_error
    assert torch.equal(given[0].linears[0].weight.codes_OI, other[0].linears[0].weight.codes_OI)
    assert not torch.equal(given[1].linears[6].weight.codes_OI, other[1].linears[6].weight.codes_OI)


def test_the_float_path_runs_no_module_when_statistics_are_known(llama, windows):
    stored = list(collect_float_statistics(InMemory(llama), windows, hessians=True))

    def fail(*_):
        raise AssertionError("a module ran")

    for module in llama.modules():
        module.register_forward_pre_hook(fail)
    method = Gptq(grid=Grid(bits=3), path="float")
    assert len(list(quantize_blocks(InMemory(llama), method, windows, shared=stored.__getitem__))) == 2
