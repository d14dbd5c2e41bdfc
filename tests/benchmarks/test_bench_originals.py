"""The parts of the comparison with the original implementations that need none of them."""

import subprocess

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.scheme import parse_scheme
from quantizers.families import FAMILIES
from tests.benchmarks.bench_originals import compare, mean_ratios
from tests.benchmarks.originals import methods
from tests.benchmarks.originals.in_step import InStep
from tests.benchmarks.originals.layers import ALL_AT_ONCE, TRUE_SEQUENTIAL, first_inputs, heard, walk
from tests.benchmarks.originals.releases import RELEASES, check
from tests.benchmarks.originals.settings import IN_STEP, SETTINGS


def test_every_setting_has_a_function_a_release_and_a_scheme_of_ours():
    for setting in SETTINGS.values():
        assert callable(getattr(methods, setting.function))
        assert setting.release in RELEASES
        assert parse_scheme(dict(setting.scheme), "test").build()


def test_a_clone_at_another_commit_is_refused_with_the_command_that_makes_it(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path / "gptq"], check=True)
    with pytest.raises(SystemExit, match=r"git clone https://github.com/IST-DASLab/gptq .* checkout 2d65066"):
        check(tmp_path)


def test_ratios_are_ours_by_the_originals_and_choices_are_counted():
    def side(error, choices):
        return {"perplexity": 20.0, "errors": {"mlp.up_proj": error}, "choices": choices, "in_step": []}

    found = compare(side(0.5, [1, 2, 3]), side(0.6, [1, 2, 4]), side(0.5, [1, 2, 3]))
    assert found["error_ratios"] == {"mlp.up_proj": pytest.approx(1.2)}
    assert found["float32_error_ratios"] == {"mlp.up_proj": 1.0}
    assert (found["choices_equal"], found["float32_choices_equal"]) == ([2, 3], [3, 3])


def test_seeds_are_put_together_by_the_mean_of_their_ratios():
    of_one_block = {"perplexity": None, "ours": None}
    figures = {
        0: {"GPTQ W3": {"perplexity": 40.0, "ours": 42.0}, "GPTQ W3, first block": of_one_block},
        1: {"GPTQ W3": {"perplexity": 50.0, "ours": 47.5}, "GPTQ W3, first block": of_one_block},
    }
    assert mean_ratios(figures) == {"GPTQ W3": pytest.approx(1.0)}


def test_the_walk_hands_on_what_quantized_layers_put_out_and_tells_what_the_float_ones_did():
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 16}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape)).eval()
    windows = torch.arange(8).reshape(2, 4)
    first, second = model.model.layers
    stages, seen = [], []

    def quantize(stage):
        stages.append(stage)
        with heard(stage.linears, lambda _, given, __: seen.append(given.clone())):
            stage.run()
        for linear in stage.linears.values():
            linear.weight.zero_()

    with torch.no_grad():
        states, arguments = first_inputs(model, windows[:, None])
        of_float = second.input_layernorm(first(states[1], **arguments))
        walk(model, windows, (("self_attn.q_proj",), ("mlp.down_proj",)), quantize, blocks=2, float_inputs=True)
        of_quantized = second.input_layernorm(first(states[1], **arguments))
    assert [(stage.layer, *stage.linears) for stage in stages] == [
        *((0, "self_attn.q_proj"), (0, "mlp.down_proj")),
        *((1, "self_attn.q_proj"), (1, "mlp.down_proj")),
    ]
    torch.testing.assert_close(stages[2].float_inputs[1], of_float)
    torch.testing.assert_close(seen[5], of_quantized)  # two windows a stage: the second one's of the third stage
    assert not torch.allclose(of_float, of_quantized)


@pytest.mark.parametrize("function", IN_STEP)
def test_in_step_a_method_is_compared_with_a_release_on_its_inputs(function):
    """The release here is ours in another place, and one of its linears is then rounded worse."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 16}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape)).eval()
    windows = torch.randint(16, (3, 8))
    setting = next(each for each in SETTINGS.values() if each.function == function)
    scheme = dict(setting.scheme) | {"scale_dtype": "float32"}
    if scheme["weight_bits"] > 1:
        scheme["group_size"] = 16
    method = parse_scheme(scheme, "test").build()
    stages = ALL_AT_ONCE if function in ("billm", "slim_llm") else TRUE_SEQUENTIAL
    theirs, ours = InStep(method), InStep(method)

    def quantize(stage):
        made = {}
        for names in (each for each in FAMILIES["llama"].stages if each[0] in stage.linears):
            made |= theirs.quantize({name: stage.linears[name] for name in names}, stage)
        for name, (_, _, quantized) in made.items():
            stage.linears[name].weight.data = quantized.clone()
        if stage.layer == 1 and "mlp.up_proj" in stage.linears:
            weight, _, quantized = made["mlp.up_proj"]
            stage.linears["mlp.up_proj"].weight.data[3] = 2 * quantized[3] - weight[3]

    with torch.no_grad():
        walk(model, windows, stages, quantize, blocks=2, watch=ours.watch, float_inputs=function == "gptaq")
    found = {(each["layer"], each["linear"]): each for each in ours.records}
    assert len(found) == 14
    worse = found.pop((1, "mlp.up_proj"))
    assert worse["ratio"] < 0.99
    assert worse["equal"] == pytest.approx(1 - 1 / 96, abs=1e-6)
    for each in found.values():
        assert each["ratio"] == pytest.approx(1, abs=1e-9)
        assert each["equal"] == 1
