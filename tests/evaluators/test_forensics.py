import copy
import json

import numpy as np
import pytest
import torch

from evaluators.errors import EvaluationError
from evaluators.forensics import CATEGORIES, examine
from evaluators.perplexity import perplexity

DTYPES = ("bfloat16", "float16", "float32")


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, 300, size=(3, 24))


def tiny(make_llama, dtype=torch.float32, **overrides):
    return make_llama(vocab_size=300, max_position_embeddings=64, num_hidden_layers=3, **overrides).to(dtype)


def change(model, name, function):
    with torch.no_grad():
        parameter = model.get_parameter(name)
        parameter.copy_(function(parameter))


def set_one(value):
    def function(parameter):
        changed = parameter.clone()
        changed.view(-1)[5] = value
        return changed

    return function


def fake_quantized(scale):
    return lambda values: (torch.round(values.float() / scale).clamp(-127, 127) * scale).to(values.dtype)


def quantize_inputs(module, scale):
    quantize = fake_quantized(scale)
    return module.register_forward_pre_hook(lambda _, given: (quantize(given[0]),))


def quantize_outputs(module, scale):
    quantize = fake_quantized(scale)
    return module.register_forward_hook(lambda _, __, output: quantize(output))


def everything(model):
    """All that an examination might leave behind in a model."""
    hooks = [
        (
            name,
            list(module._forward_hooks.items()),
            list(module._forward_pre_hooks.items()),
            list(module._forward_hooks_with_kwargs),
            list(module._forward_pre_hooks_with_kwargs),
        )
        for name, module in model.named_modules()
    ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    identities = [(name, id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad) for name, tensor in tensors]
    return hooks, identities, model.training


def found_in(examined, dtype):
    return examined.runs[dtype].first_break


def test_a_finite_model(make_llama, windows):
    model = tiny(make_llama)
    found = examine(model, windows)
    nlls = perplexity(model, windows).window_nlls
    assert (found.category, found.dtype, found.agree) == ("finite", "float32", True)
    assert found.window == int(np.argmax(nlls))
    assert found.own.nll == pytest.approx(max(nlls), abs=1e-12)
    assert found.float32_magnitude is None
    assert set(found.runs) == set(DTYPES)
    for run in found.runs.values():
        assert (run.finite, run.first_break, run.error) == (True, None, None)
        assert run.nll == pytest.approx(max(nlls), rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_stream_is_that_of_the_model(make_llama, windows, dtype):
    model = tiny(make_llama, getattr(torch, dtype))
    found = examine(model, windows[:1])
    outputs = []
    handles = [block.register_forward_hook(lambda *call: outputs.append(call[2])) for block in model.model.layers]
    with torch.inference_mode():
        model(input_ids=torch.tensor(windows[:1]), use_cache=False)
    for handle in handles:
        handle.remove()
    assert list(found.own.block_magnitudes) == [output.abs().max().item() for output in outputs]
    assert len(found.own.block_magnitudes) == 3


def test_a_residual_sum_that_leaves_float16(make_llama, windows):
    """Two finite outputs whose sum is too large: the block itself is where it breaks."""
    model = tiny(make_llama, torch.float16)
    for block in model.model.layers[:2]:
        block.mlp.register_forward_hook(lambda _, __, output: torch.full_like(output, 40000))
    found = examine(model, windows)
    first = found.own.first_break
    assert (found.category, first.module, first.block) == ("overflow_of_dtype", "model.layers.1", 1)
    assert (first.kind, first.where, first.num_nan) == ("LlamaDecoderLayer", "module", 0)
    assert found.float32_magnitude == pytest.approx(80000, rel=1e-3)
    assert found.own.block_magnitudes[0] == pytest.approx(40000, rel=1e-2)


@pytest.mark.parametrize(
    ("parameter", "factor", "module", "block", "kind"),
    [
        ("model.layers.1.mlp.down_proj.weight", 1e6, "model.layers.1.mlp.down_proj", 1, "Linear"),
        ("model.layers.2.self_attn.o_proj.weight", 3e6, "model.layers.2.self_attn.o_proj", 2, "Linear"),
        ("model.layers.0.mlp.up_proj.weight", 1e6, "model.layers.0.mlp.up_proj", 0, "Linear"),
        ("model.norm.weight", 6e4, "model.norm", None, "LlamaRMSNorm"),
    ],
)
def test_float16_overflows_where_the_others_do_not(make_llama, windows, parameter, factor, module, block, kind):
    model = tiny(make_llama, torch.float16)
    limit = torch.finfo(torch.float16).max
    change(model, parameter, lambda weight: (weight.float() * factor).clamp(-limit, limit))
    found = examine(model, windows)
    first = found.own.first_break
    assert found.category == "overflow_of_dtype"
    assert (first.module, first.block, first.kind, first.where) == (module, block, kind, "module")
    assert first.weights_finite
    assert first.num_inf > 0
    assert (found.runs["bfloat16"].finite, found.runs["float32"].finite, found.own.finite) == (True, True, False)
    assert not found.agree
    assert found.dtype_max == limit
    assert found.float32_magnitude > limit
    assert found.window == 0
    assert found.own.nll is None


def test_a_product_inside_the_mlp(make_llama, windows):
    """gate and up are finite, their product is not: that is the arithmetic of the MLP, no linear's."""
    model = tiny(make_llama, torch.float16)
    for name in ("gate_proj", "up_proj"):
        change(model, f"model.layers.1.mlp.{name}.weight", lambda weight: weight * 500)
    found = examine(model, windows)
    first = found.own.first_break
    assert (first.module, first.kind, first.block) == ("model.layers.1.mlp", "LlamaMLP", 1)
    assert found.category == "overflow_of_dtype"
    # what overflowed is the input of down_proj, which the float32 run saw
    assert found.float32_magnitude == found.runs["float32"].module_magnitudes["model.layers.1.mlp.down_proj"]
    assert found.float32_magnitude > found.dtype_max


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.2.self_attn.k_proj", "model.layers.0.mlp.gate_proj", "lm_head"])
def test_a_bad_weight(make_llama, windows, name, value, dtype):
    model = tiny(make_llama, getattr(torch, dtype))
    change(model, f"{name}.weight", set_one(value))
    found = examine(model, windows)
    assert found.category == "nan_in_weights"
    assert found.agree
    for run in found.runs.values():
        assert (run.first_break.module, run.first_break.where) == (name, "module")
        assert not run.first_break.weights_finite
    assert found.own.first_break.block == (int(name.split(".")[2]) if "layers" in name else None)


def test_a_bad_row_of_the_embedding_that_is_not_used(make_llama, windows):
    model = tiny(make_llama, tie_word_embeddings=False)
    unused = next(token for token in range(300) if token not in windows[0] and token in windows[1])

    def spoil(weight):
        changed = weight.clone()
        changed[unused] = float("nan")
        return changed

    change(model, "model.embed_tokens.weight", spoil)
    found = examine(model, windows)
    assert (found.category, found.window, found.own.first_break.module) == ("nan_in_weights", 1, "model.embed_tokens")
    assert examine(model, windows[:1]).category == "finite"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
@pytest.mark.parametrize(("install", "where"), [(quantize_inputs, "input hook"), (quantize_outputs, "output hook")])
def test_a_bad_activation_scale(make_llama, windows, install, where, scale, dtype):
    model = tiny(make_llama, getattr(torch, dtype))
    for block in model.model.layers[:2]:
        install(block.self_attn.v_proj, 0.05)
    install(model.model.layers[1].mlp.down_proj, torch.tensor(scale))
    found = examine(model, windows)
    assert found.category == "nan_in_scale"
    assert found.agree
    for run in found.runs.values():  # the copies carry the hooks too
        assert (run.first_break.module, run.first_break.where) == ("model.layers.1.mlp.down_proj", where)
        assert run.first_break.weights_finite


def test_copies_keep_the_hooks(make_llama, windows):
    model = tiny(make_llama)
    plain = examine(model, windows).runs
    quantize_inputs(model.model.layers[0].mlp.down_proj, 3.0)
    coarse = examine(model, windows).runs
    for dtype in DTYPES:
        assert abs(coarse[dtype].nll - plain[dtype].nll) > 0.01
    assert coarse["bfloat16"].nll == pytest.approx(coarse["float32"].nll, rel=0.05)


def test_a_hook_that_is_a_method_of_a_module_with_a_tensor(make_llama, windows):
    class Static(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(float("inf")))

        def hook(self, _, given):
            return ((torch.round(given[0] / self.scale) * self.scale).to(given[0].dtype),)

    model = tiny(make_llama, torch.bfloat16)
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(Static().hook)
    found = examine(model, windows)
    assert found.category == "nan_in_scale"
    assert {run.first_break.where for run in found.runs.values()} == {"input hook"}


def test_a_kernel_that_fails_in_one_dtype(make_llama, windows):
    """A module that yields NaN from small finite values in bfloat16 alone: no dtype's range explains that."""

    class Faulty(torch.nn.Linear):
        def forward(self, values):
            result = super().forward(values)
            return torch.full_like(result, float("nan")) if values.dtype == torch.bfloat16 else result

    model = tiny(make_llama, torch.bfloat16)
    model.model.layers[1].self_attn.q_proj.__class__ = Faulty
    found = examine(model, windows)
    assert found.category == "kernel/unknown"
    assert found.own.first_break.module == "model.layers.1.self_attn.q_proj"
    assert found.runs["float32"].finite
    assert found.float32_magnitude < found.dtype_max
    with_half = examine(model.to(torch.float32), windows)
    assert with_half.category == "finite"
    assert not with_half.agree


def test_a_kernel_that_fails_in_every_dtype(make_llama, windows):
    class Faulty(torch.nn.Linear):
        def forward(self, values):
            return super().forward(values) * float("nan")

    model = tiny(make_llama, torch.bfloat16)
    model.model.layers[1].self_attn.o_proj.__class__ = Faulty
    assert examine(model, windows).category == "kernel/unknown"


def test_a_loss_that_overflows_float64_alone_is_finite(make_llama, windows):
    """exp(nll) is infinite from nll = 710 on; the model is fine then."""
    model = tiny(make_llama)
    change(model, "lm_head.weight", lambda weight: weight * 1000)
    assert perplexity(model, windows).perplexity == float("inf")
    assert examine(model, windows).category == "finite"


@pytest.mark.parametrize("break_it", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_left_as_it_was(make_llama, windows, dtype, tied, break_it):
    model = tiny(make_llama, getattr(torch, dtype), tie_word_embeddings=tied)
    own = [quantize_inputs(model.model.layers[0].mlp.up_proj, 0.1), quantize_outputs(model.lm_head, 0.1)]
    if break_it:
        change(model, "model.layers.1.mlp.up_proj.weight", set_one(float("nan")))
    before, weights = everything(model), copy.deepcopy(model.state_dict())
    examine(model, windows)
    assert everything(model) == before
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0, equal_nan=True)
    assert len(own) == 2


def test_an_examination_that_fails_leaves_no_hooks(make_llama, windows):
    model = tiny(make_llama)

    def refuse(*_):
        if counted.append(0) or len(counted) > 9:
            raise RuntimeError("no more")

    counted = []
    model.model.layers[2].mlp.register_forward_hook(refuse)
    before = everything(model)
    with pytest.raises(RuntimeError, match="no more"):
        examine(model, windows)
    assert everything(model) == before


def test_rotary_frequencies_stay_as_they_are(make_llama, windows):
    """bfloat16 frequencies would make another model of it."""
    seen = []
    model = tiny(make_llama, torch.bfloat16)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float()
    model.model.rotary_emb.register_forward_hook(lambda module, *_: seen.append(module.inv_freq.dtype))
    examine(model, windows)
    assert set(seen) == {torch.float32}


def test_a_dtype_that_the_device_refuses_is_recorded(make_llama, windows):
    model = tiny(make_llama, torch.float16)
    change(model, "model.layers.1.mlp.down_proj.weight", lambda weight: weight * 1e4)

    def refuse(_, given):
        if given[0].dtype == torch.float32:
            raise RuntimeError('"linear" not implemented for float32\nmore')

    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(refuse)
    found = examine(model, windows)
    assert found.runs["float32"].error == '"linear" not implemented for float32'
    assert not found.runs["float32"].finite
    assert found.category == "overflow_of_dtype"  # bfloat16 is finite
    assert found.float32_magnitude is None
    alone = examine(model, windows, dtypes=())
    assert set(alone.runs) == {"float16"}
    assert alone.category == "kernel/unknown"  # nothing to tell by


def test_known_losses_spare_the_search(make_llama, windows):
    model = tiny(make_llama)
    change(model, "model.layers.1.mlp.up_proj.weight", set_one(float("nan")))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(0))
    assert examine(model, windows).window == 0
    searched = len(calls)
    calls.clear()
    assert examine(model, windows, window_nlls=[3.0, float("nan"), float("inf")]).window == 1
    assert len(calls) < searched
    assert examine(model, windows, window_nlls=[3.0, 5.0, 4.0]).window == 1
    with pytest.raises(EvaluationError, match="2 window_nlls for 3 windows"):
        examine(model, windows, window_nlls=[1.0, 2.0])


def test_the_record_is_strict_json(make_llama, windows):
    model = tiny(make_llama, torch.float16)
    change(model, "model.layers.1.mlp.up_proj.weight", set_one(float("inf")))
    found = examine(model, windows)
    record = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert record["category"] in CATEGORIES
    assert record["first_break"]["module"] == "model.layers.1.mlp.up_proj"
    assert record["first_break"] == record["runs"]["float16"]["first_break"]
    assert record["block_magnitudes"][0] > 0
    assert set(record["runs"]) == set(DTYPES)
    for run in record["runs"].values():
        assert set(run) == {"finite", "nll", "first_break", "block_magnitudes", "error"}


def test_nothing_finite_is_left(make_llama, windows):
    model = tiny(make_llama)
    change(model, "model.layers.1.input_layernorm.weight", lambda weight: torch.full_like(weight, float("nan")))
    found = examine(model, windows)
    assert found.own.block_magnitudes[0] > 0
    assert list(found.own.block_magnitudes[1:]) == [None, None]
    assert found.own.first_break.module == "model.layers.1.input_layernorm"
    assert found.own.first_break.block == 1


def test_a_model_without_a_list_of_blocks_is_refused(make_llama, windows):
    model = tiny(make_llama)
    model.config.num_hidden_layers = 7
    with pytest.raises(EvaluationError, match="no list of 7 decoder blocks"):
        examine(model, windows)
