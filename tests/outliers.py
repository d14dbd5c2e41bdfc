"""Activation outliers like those of large models, put into a model without changing what it computes."""

import torch


def make_outliers(model, channels, factor, seed=0):
    """Multiply some channels of every norm's output by `factor` and divide the columns that read them, in place.

    Returns the channels, the same for all blocks, as in real models.
    """
    chosen = torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(seed))[:channels]
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm, linears in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[chosen] *= factor
                for linear in linears:
                    linear.weight[:, chosen] /= factor
    return chosen
