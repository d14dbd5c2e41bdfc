"""The two modules of a Llama block in float64, spelt out: attention with rotary positions and grouped queries, and MLP.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; Su et al. 2021, arXiv:2104.09864, with channel j of a head
paired with channel j + half, as the released checkpoints are laid out for transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Linears = Mapping[str, tuple[Tensor, Tensor | None]]  # name within the module -> weight [O, I] and bias [O], float64


def linears_of(module: torch.nn.Module) -> Linears:
    """A module's linears in float64."""
    return {
        name: (linear.weight.detach().double(), None if linear.bias is None else linear.bias.detach().double())
        for name, linear in module.named_children()
        if isinstance(linear, torch.nn.Linear)
    }


def apply(linear: tuple[Tensor, Tensor | None], inputs: Tensor) -> Tensor:
    """inputs W^T + b."""
    weight, bias = linear
    return inputs @ weight.T if bias is None else inputs @ weight.T + bias


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Each token over its root mean square, times the weight."""
    return hidden / (hidden.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def mixed(linears: Linears, inputs_NTI: Tensor, heads: int, groups: int, head_dim: int, theta: float) -> Tensor:
    """What the attention hands to o: each head's values, mixed over this token and the earlier ones."""
    windows, tokens, _ = inputs_NTI.shape

    def split(name: str, count: int) -> Tensor:
        return apply(linears[name], inputs_NTI).reshape(windows, tokens, count, head_dim)

    query = rotated(split("q_proj", heads), theta)
    key, value = rotated(split("k_proj", groups), theta), split("v_proj", groups)
    outputs = []
    for head in range(heads):
        group = head * groups // heads
        scores = query[:, :, head] @ key[:, :, group].transpose(1, 2) / head_dim**0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value[:, :, group])
    return torch.cat(outputs, -1)


def rotated(vectors: Tensor, theta: float) -> Tensor:
    """Turn pair j of each head of token t by t theta^(-2j/d)."""
    tokens, head_dim = vectors.shape[1], vectors.shape[3]
    half = head_dim // 2
    angles = torch.arange(tokens).double()[:, None] * theta ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def gated(linears: Linears, inputs: Tensor) -> Tensor:
    """What the MLP hands to down: silu(gate) * up."""
    gate = apply(linears["gate_proj"], inputs)
    return gate / (1 + (-gate).exp()) * apply(linears["up_proj"], inputs)
