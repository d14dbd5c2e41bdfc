"""Handing out a model in parts."""

import torch
from torch import nn

from quantizers.block_source import InMemory, private_copy


def test_a_copy_shares_its_tensors_and_none_of_its_modules(llama):
    block = llama.model.layers[1]
    copied = private_copy(block)
    assert [id(tensor) for tensor in copied.parameters()] == [id(tensor) for tensor in block.parameters()]
    assert not set(map(id, copied.modules())) & set(map(id, block.modules()))


def test_replacing_a_copys_weight_leaves_the_model_alone(llama):
    source = InMemory(llama)
    before = llama.model.layers[0].mlp.up_proj.weight
    source.block(0).mlp.up_proj.weight = nn.Parameter(torch.zeros(80, 48))
    assert llama.model.layers[0].mlp.up_proj.weight is before
    assert source.num_blocks == 2
    assert source.device == before.device
    with source.shell() as shell:
        assert shell is llama
