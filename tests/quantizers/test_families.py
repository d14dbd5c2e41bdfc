"""The table of families: every row describes the modules that transformers builds."""

import pytest
import torch
from torch import nn

from quantizers.errors import QuantizationError
from quantizers.families import FAMILIES, blocks_of, family_of, linear_at


def test_every_family_has_a_model_here(make_model):
    from tests.quantizers.conftest import MODELS

    built = {make_model(case).config.model_type for case in MODELS}
    assert built == set(FAMILIES)


def test_rows_name_every_linear_of_a_block_in_order(any_model):
    family = family_of(any_model)
    blocks = blocks_of(any_model, family)
    assert len(blocks) == any_model.config.num_hidden_layers
    names = [name for stage in family.stages for name in stage]
    for block in blocks:
        linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert set(names) == linears
        assert len(names) == len(linears)
        for stage in family.stages:  # linears of one stage share their inputs
            assert len({linear_at(block, name).in_features for name in stage}) == 1
        norms = {family.attention_norm, family.mlp_norm, family.after_attention, family.after_mlp} - {None}
        children = {name for name, _ in block.named_children()}
        assert children == norms | {family.attention, family.mlp}


def test_stages_come_in_the_order_of_the_forward(any_model, windows):
    family = family_of(any_model)
    called = []
    for name in (name for stage in family.stages for name in stage):
        linear = linear_at(blocks_of(any_model, family)[0], name)
        linear.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.inference_mode():
        any_model(windows[:1])
    stage_of = {name: index for index, stage in enumerate(family.stages) for name in stage}
    stages = [stage_of[name] for name in called]
    assert stages == sorted(stages)
    assert set(called) == set(stage_of)


def test_unknown_family_names_the_nearest(llama):
    llama.config.model_type = "qwen22"
    with pytest.raises(QuantizationError, match=r"model_type 'qwen22' has no row .*\(nearest: qwen2\); known: gemma, "):
        family_of(llama)
    llama.config.model_type = "zzz"
    with pytest.raises(QuantizationError, match=r"families.py; known: "):
        family_of(llama)


def test_something_else_in_place_of_a_linear(llama):
    with pytest.raises(QuantizationError, match=r"self_attn is a LlamaAttention, not a Linear"):
        linear_at(llama.model.layers[0], "self_attn")


def test_something_else_in_place_of_the_blocks(llama):
    family = family_of(llama)
    llama.model.layers = nn.Sequential(*llama.model.layers)
    with pytest.raises(QuantizationError, match=r"model\.layers is a Sequential, not a list of decoder blocks"):
        blocks_of(llama, family)
