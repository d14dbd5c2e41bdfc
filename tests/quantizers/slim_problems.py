"""Linears for the tests of SliM-LLM: random, with groups of columns that matter unequally."""

import dataclasses

import torch

from quantizers.grid import Grid
from quantizers.linalg import inverse_cholesky
from quantizers.method import LinearGroup
from quantizers.slim_llm import SlimLlm, allocation_errors, rank_groups
from quantizers.statistics import InputStatistics
from tests.reference import slim_llm as reference

PRESETS = list(SlimLlm.presets)
SETTINGS = {field.name for field in dataclasses.fields(reference.Settings)}


def options(bits, group_size=8, preset="corrected", scale_dtype="float16", **fields):
    grid = Grid(bits=bits, group_size=group_size, scale_dtype=scale_dtype, tail_group=True)
    return SlimLlm(grid=grid, **(dict(SlimLlm.presets[preset]) | fields))


def settings(method):
    grid = method.grid
    shared = {name: getattr(method, name) for name in SETTINGS - {"bits", "group_size", "scale_dtype"}}
    return reference.Settings(bits=grid.bits, group_size=grid.group_size, scale_dtype=grid.scale_dtype, **shared)


@dataclasses.dataclass
class Problem:
    """A linear whose groups of 8 columns matter unequally, and the inputs that calibrate it."""

    weight: torch.Tensor
    bias: torch.Tensor
    hessian: torch.Tensor
    sample: torch.Tensor

    def quantize(self, method, bias=True):
        outcome = self.outcome(method, bias)
        assert outcome.damping == method.damping
        return outcome.weights[0]

    def outcome(self, method, bias=True):
        statistics = InputStatistics(hessian_II=self.hessian, sample_TI=self.sample)
        group = LinearGroup(
            names=["q"], weights=[self.weight], biases=[self.bias if bias else None], statistics=statistics
        )
        return method.quantize(group)

    def slowly(self, method, bias=True):
        return reference.quantize(
            self.weight.numpy(),
            self.bias.numpy() if bias else None,
            self.hessian.numpy(),
            self.sample.numpy(),
            settings(method),
        )

    def errors(self, method, bias=True):
        weight = self.weight.masked_fill(self.hessian.diagonal() == 0, 0.0)
        diagonal = self.diagonal(method, None if method.damped_count else 0.0)
        ranking = rank_groups(weight, diagonal, method.grid.group_size)
        return allocation_errors(weight, self.bias if bias else None, self.sample, ranking, method)

    def diagonal(self, method, damping=None):
        unseen = (self.hessian.diagonal() == 0).float()
        hessian = self.hessian + torch.diag(unseen + method.absolute_damping)
        return inverse_cholesky(hessian, method.damping if damping is None else damping)[0].diagonal()


def problem(seed, rows=8, columns=72, *, tokens=24, spread=1.0, dead=()):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.exp(spread * torch.randn(-(-columns // 8), generator=generator))
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    mixing = torch.eye(columns) + 0.6 * torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(3 * columns + tokens, columns, generator=generator) @ mixing
    inputs *= importance.repeat_interleave(8)[:columns]
    inputs[:, list(dead)] = 0.0
    hessian = 2 / 8 * inputs.double().T @ inputs.double()
    bias = torch.randn(rows, generator=generator)
    return Problem(weight, bias, ((hessian + hessian.T) / 2).float(), inputs[:tokens].contiguous())
