"""The engine: what each linear is quantized against, and that the model is left as it was."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from quantizers import block as block_module
from quantizers.apply import installed
from quantizers.block_source import InMemory
from quantizers.errors import QuantizationError
from quantizers.families import family_of
from quantizers.gptq import Gptq, gptq
from quantizers.grid import Grid
from quantizers.method import Method, MethodOutcome, Needs
from quantizers.rtn import Rtn, round_to_nearest
from quantizers.stream import check_model, linears_of, quantize_blocks


@dataclass(frozen=True, kw_only=True)
class Watched(Method):
    """Rounds to nearest, which no Hessian can tip, and keeps the Hessians it was given."""

    grid: Grid = field(default_factory=lambda: Grid(bits=2))
    true_sequential: bool = True
    hessians: list = field(default_factory=list)

    name = "watched"
    code_version = "watched/1"
    needs = Needs(hessian=True)

    def quantize(self, group):
        self.hessians.append(group.statistics.hessian_II.clone())
        return MethodOutcome(weights=[round_to_nearest(weight, self.grid) for weight in group.weights], damping=0.25)


def slow(model, windows, method, quantize):
    """The same walk, spelt out: one whole forward of the model per stage, with a hook on the stage's first linear.

    Weights stay replaced. `quantize` gets the stage's weights and their float64 Hessian. Returns name -> artifact.
    """
    family, results = family_of(model), {}
    for index in range(model.config.num_hidden_layers):
        prefix = f"{family.blocks}.{index}."

        def hessian_of(stage, prefix=prefix):
            inputs = []
            linear = model.get_submodule(prefix + stage[0])
            handle = linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0].double()))
            with torch.no_grad():
                model(windows)
            handle.remove()
            flat = inputs[0].reshape(-1, linear.in_features)
            return 2 / len(windows) * flat.T @ flat

        def install(stage, hessian, prefix=prefix):
            names = [prefix + name for name in stage]
            weights = [model.get_submodule(name).weight.detach() for name in names]
            for name, artifact in zip(names, quantize(weights, hessian), strict=True):
                linear = model.get_submodule(name)
                linear.weight = nn.Parameter(artifact.decode().to(linear.weight.dtype), requires_grad=False)
                results[name] = artifact

        if method.true_sequential:
            for stage in family.stages:
                install(stage, hessian_of(stage))
        else:
            hessians = [hessian_of(stage) for stage in family.stages]
            for stage, hessian in zip(family.stages, hessians, strict=True):
                install(stage, hessian)
    return results


def weights_of(model):
    return {name: (id(parameter), parameter.detach().clone()) for name, parameter in model.named_parameters()}


def check_untouched(model, before):
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity
        assert torch.equal(after[name], value)


@pytest.fixture(params=[1, 48, 4096], ids=["window by window", "two windows", "at once"])
def tokens_per_batch(request, monkeypatch):
    monkeypatch.setattr(block_module, "_TOKENS_PER_BATCH", request.param)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_hessians_equal_those_of_whole_forwards(any_model, windows, true_sequential):
    """True-sequential: o_proj sees quantized q, k and v, and so on; otherwise the float block's own inputs.

    In both, a block sees what the quantized blocks before it put out.
    """
    before = weights_of(any_model)
    method = Watched(true_sequential=true_sequential)
    linears = [linear for block in quantize_blocks(InMemory(any_model), method, windows) for linear in block.linears]
    check_untouched(any_model, before)
    expected = []

    def quantize(weights, hessian):
        expected.append(hessian)
        return [round_to_nearest(weight, method.grid) for weight in weights]

    artifacts = slow(any_model, windows, method, quantize)
    assert [linear.name for linear in linears] == list(artifacts) == list(linears_of(any_model))
    for linear in linears:
        assert torch.equal(linear.weight.decode(), artifacts[linear.name].decode())
    assert len(method.hessians) == len(expected) == 8
    for hessian, reference in zip(method.hessians, expected, strict=True):
        assert (hessian.double() - reference).norm() <= 1e-5 * reference.norm()


def test_the_two_orders_differ_where_they_should(llama, windows):
    """The comparison above must be able to tell them apart."""
    sequential, parallel = Watched(true_sequential=True), Watched(true_sequential=False)
    for method in (sequential, parallel):
        list(quantize_blocks(InMemory(llama), method, windows))
    differ = [
        ((first - second).norm() / second.norm()).item() > 1e-2
        for first, second in zip(sequential.hessians, parallel.hessians, strict=True)
    ]
    assert differ[:4] == [False, True, True, True]
    assert (sequential.hessians[4] - parallel.hessians[4]).norm() <= 1e-5 * parallel.hessians[4].norm()


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.usefixtures("tokens_per_batch")
def test_batches_do_not_matter(llama, windows, true_sequential):
    method, expected = Watched(true_sequential=true_sequential), []
    list(quantize_blocks(InMemory(llama), method, windows))

    def quantize(weights, hessian):
        expected.append(hessian)
        return [round_to_nearest(weight, method.grid) for weight in weights]

    slow(llama, windows, method, quantize)
    for hessian, reference in zip(method.hessians, expected, strict=True):
        assert (hessian.double() - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize("true_sequential", [True, False])
def test_gptq_of_a_model_equals_the_slow_walk(make_model, windows, true_sequential):
    model = make_model("qwen2")
    method = Gptq(grid=Grid(bits=4, group_size=16), true_sequential=true_sequential)
    linears = [linear for block in quantize_blocks(InMemory(model), method, windows) for linear in block.linears]
    artifacts = slow(
        model,
        windows,
        method,
        lambda weights, hessian: [gptq(weight, hessian.float(), method)[0] for weight in weights],
    )
    # Hessians a rounding apart: a tie that falls the other way changes the codes after it in its row.
    same = [(part.weight.codes_OI == artifacts[part.name].codes_OI).float().mean() for part in linears]
    assert min(same) > 0.95
    assert sum(same) / len(same) > 0.99
    assert all(part.damping == 0.01 for part in linears)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_errors_are_those_of_the_artifacts(llama, windows, true_sequential):
    method = Watched(true_sequential=true_sequential)
    weights = {name: llama.get_submodule(name).weight.detach().double() for name in linears_of(llama)}
    blocks = list(quantize_blocks(InMemory(llama), method, windows))
    stages = family_of(llama).stages
    for block_index, block in enumerate(blocks):
        for part in block.linears:
            name = part.name.removeprefix(f"model.layers.{block_index}.")
            stage = next(index for index, names in enumerate(stages) if name in names)
            hessian = method.hessians[4 * block_index + stage].double()
            weight = weights[part.name]
            difference = weight - part.weight.decode().double()
            assert part.weight_error == pytest.approx((difference.norm() / weight.norm()).item() ** 2, rel=1e-4)
            output = ((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum()
            assert part.output_error == pytest.approx(output.item(), rel=1e-4)
            assert part.damping == 0.25
            assert part.seconds >= 0


def test_errors_of_a_linear_of_zeros_are_zero(llama, windows):
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.zero_()
    for method in (Rtn(grid=Grid(bits=4)), Gptq(grid=Grid(bits=4))):
        part = {part.name: part for part in next(quantize_blocks(InMemory(llama), method, windows)).linears}
        assert part["model.layers.0.mlp.up_proj"].weight_error == 0
        # and down_proj sees zeros only
        assert part["model.layers.0.mlp.down_proj"].output_error in (None, 0.0)


@pytest.mark.parametrize("method", [Rtn(grid=Grid(bits=4)), Gptq(grid=Grid(bits=4))])
def test_weights_are_put_back(any_model, windows, method):
    before = weights_of(any_model)
    with torch.no_grad():
        logits = any_model(windows).logits
    parts = [part for block in quantize_blocks(InMemory(any_model), method, windows) for part in block.linears]
    check_untouched(any_model, before)
    assert len(parts) == 14
    with torch.no_grad():
        assert torch.equal(any_model(windows).logits, logits)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_weights_are_put_back_when_the_walk_is_left_early(llama, windows, true_sequential):
    before = weights_of(llama)
    walk = quantize_blocks(InMemory(llama), Gptq(grid=Grid(bits=2), true_sequential=true_sequential), windows)
    next(walk)
    walk.close()
    check_untouched(llama, before)


@pytest.mark.parametrize("stage", range(8))
@pytest.mark.parametrize("true_sequential", [True, False])
def test_weights_are_put_back_after_an_exception(llama, windows, stage, true_sequential):
    before = weights_of(llama)
    modules = [id(module) for module in llama.modules()]

    class Failing(Watched):
        def quantize(self, group):
            if len(self.hessians) == stage:
                raise QuantizationError("this one fails")
            return super().quantize(group)

    names = " and ".join(family_of(llama).stages[stage % 4])
    with pytest.raises(QuantizationError, match=f"layers.{stage // 4}.{names}: this one fails"):
        list(quantize_blocks(InMemory(llama), Failing(true_sequential=true_sequential), windows))
    check_untouched(llama, before)
    assert [id(module) for module in llama.modules()] == modules


def test_narrow_models_are_quantized_in_float32(make_model, windows):
    model = make_model("llama").to(torch.bfloat16)
    before = weights_of(model)
    method = Watched()
    parts = [part for block in quantize_blocks(InMemory(model), method, windows) for part in block.linears]
    check_untouched(model, before)
    assert all(hessian.dtype == torch.float32 for hessian in method.hessians)
    for part in parts:
        assert torch.equal(
            part.weight.decode(), round_to_nearest(before[f"{part.name}.weight"][1].float(), method.grid).decode()
        )


def test_rtn_needs_no_data_and_runs_no_module(llama):
    def fail(*_):
        raise AssertionError("a module ran")

    for module in llama.modules():
        module.register_forward_pre_hook(fail)
    method = Rtn(grid=Grid(bits=3, group_size=16))
    parts = [part for block in quantize_blocks(InMemory(llama), method, None) for part in block.linears]
    assert [part.name for part in parts] == list(linears_of(llama))
    for part in parts:
        expected = round_to_nearest(llama.get_submodule(part.name).weight.detach(), method.grid)
        assert torch.equal(part.weight.decode(), expected.decode())
        assert part.output_error is None
        assert part.damping is None
        assert 0 < part.weight_error < 0.1


def test_gptq_without_data_is_refused(llama):
    with pytest.raises(QuantizationError, match="needs calibration data and none was given"):
        next(quantize_blocks(InMemory(llama), Gptq(grid=Grid(bits=4)), None))


METHODS = [
    Rtn(grid=Grid(bits=4)),
    Gptq(grid=Grid(bits=4)),
    Gptq(grid=Grid(bits=4), true_sequential=False),
]


@pytest.mark.parametrize("method", METHODS, ids=["rtn", "gptq", "gptq, not sequential"])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused_by_name(llama, windows, method, name, value):
    with torch.no_grad():
        llama.get_submodule(f"model.layers.1.{name}").weight[3, 5] = value
    before = llama.model.layers[0].mlp.up_proj.weight
    with pytest.raises(QuantizationError, match=rf"^model\.layers\.1\.{name}\.weight holds NaN or infinity$"):
        list(quantize_blocks(InMemory(llama), method, windows))
    assert llama.model.layers[0].mlp.up_proj.weight is before


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("embed_tokens", "layers.0.self_attn.q_proj"),
        ("layers.1.input_layernorm", "layers.1.self_attn.q_proj"),
        ("layers.1.post_attention_layernorm", "layers.1.mlp.gate_proj"),
    ],
)
def test_activations_that_are_not_finite_are_refused_by_name(llama, windows, true_sequential, broken, named):
    with torch.no_grad():
        llama.model.get_submodule(broken).weight[..., 2] = float("nan")
    with pytest.raises(QuantizationError, match=f"the calibration inputs of model.{named} hold NaN or infinity"):
        list(quantize_blocks(InMemory(llama), Gptq(grid=Grid(bits=4), true_sequential=true_sequential), windows))


def test_nothing_is_computed_for_a_group_size_that_does_not_fit(llama, windows):
    def fail(*_):
        raise AssertionError("a module ran")

    llama.model.embed_tokens.register_forward_pre_hook(fail)
    message = (
        r"group_size = 32 does not divide the 48 inputs of model\.layers\.0\.self_attn\.q_proj; "
        r"use 48 or 16 or 8 or per_channel, or set tail_group: true"
    )
    for method in (Rtn(grid=Grid(bits=4, group_size=32)), Gptq(grid=Grid(bits=4, group_size=32))):
        with pytest.raises(QuantizationError, match=message):
            next(quantize_blocks(InMemory(llama), method, windows))
        with pytest.raises(QuantizationError, match=message):
            check_model(llama, method)
    check_model(llama, Rtn(grid=Grid(bits=4, group_size=32, tail_group=True)))
    check_model(llama, Rtn(grid=Grid(bits=4, group_size=16)))


def test_tail_groups_work_through_the_engine(llama, windows):
    method = Gptq(grid=Grid(bits=4, group_size=32, tail_group=True))
    for part in next(quantize_blocks(InMemory(llama), method, windows)).linears:
        assert part.weight.scale_OG.shape[1] == -(-linears_of(llama)[part.name][1] // 32)
        assert part.output_error < 0.05


def test_linears_and_their_shapes(llama):
    shapes = linears_of(llama)
    assert len(shapes) == 14
    assert shapes["model.layers.1.self_attn.k_proj"] == (32, 48)
    assert shapes["model.layers.0.mlp.down_proj"] == (48, 80)
    llama.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj is a Identity, not a Linear"):
        linears_of(llama)


def test_a_meta_model_is_enough_to_check(make_model):
    with torch.device("meta"):
        model = make_model("llama")
    assert linears_of(model)["model.layers.1.self_attn.k_proj"] == (32, 48)
    check_model(model, Rtn(grid=Grid(bits=4, group_size=16)))


def test_progress_is_told(llama, windows):
    told = []
    for _ in quantize_blocks(InMemory(llama), Watched(), windows, progress=lambda *step: told.append(step)):
        told.append("block")
    assert told == [(0, 2), "block", (1, 2), "block", (2, 2)]


def divergence(model, windows, method):
    """KL of the quantized model's predictions from the model's own, per token."""
    blocks = list(quantize_blocks(InMemory(model), method, windows))
    with torch.no_grad():
        exact = model(windows).logits.double().log_softmax(-1)
        with installed(model, blocks):
            changed = model(windows).logits.double().log_softmax(-1)
    return (exact.exp() * (exact - changed)).sum(-1).mean().item()


@pytest.mark.parametrize("kind", [Rtn, Gptq])
def test_eight_bits_are_nearly_lossless_and_two_are_not(any_model, windows, kind):
    assert 0 < divergence(any_model, windows, kind(grid=Grid(bits=8))) < 1e-3
    assert divergence(any_model, windows, kind(grid=Grid(bits=2))) > 1e-2


@pytest.mark.parametrize("true_sequential", [True, False])
def test_gptq_predicts_better_than_rtn(llama, windows, true_sequential):
    grid = Grid(bits=3)
    nearest = divergence(llama, windows, Rtn(grid=grid))
    assert divergence(llama, windows, Gptq(grid=grid, true_sequential=true_sequential)) < nearest


def test_results_are_the_same_every_time(llama, windows):
    method = Gptq(grid=Grid(bits=3, group_size=16))
    first, second = (
        [part.weight.pack() for block in quantize_blocks(InMemory(llama), method, windows) for part in block.linears]
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
