"""SliM-LLM: GPTQ whose groups of columns have bits of their own, more where weights matter more.

Bit allocation ranks the groups of a linear by salience and gives some of the least salient ones a bit less and as many
of the most salient ones a bit more. Calibration then searches each scale around the one that fits the range.
Source: Huang et al. 2024, arXiv:2405.14917. Shape letters: O out_features, I in_features, G groups, K columns of a
group, B columns of a block, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantizers.errors import NumericalError, QuantizationError
from quantizers.gptq import quantize_columns
from quantizers.grid import PER_CHANNEL, SCALE_DTYPES, Grid, decode, encode, fit_group, stored_scale
from quantizers.linalg import check_factorization, inverse_cholesky, without_unseen
from quantizers.method import ALL_TOKENS, LinearGroup, Method, MethodOutcome, Needs
from quantizers.mixed_weight import MixedWeight

# Of the error that the search for a scale minimizes, as in GPTQ's own search.
_ERROR_EXPONENT = 2.4
# Standard deviations above the mean from which a weight's salience sets it apart.
_SALIENT_DEVIATIONS = 2.0


@dataclass(frozen=True, kw_only=True)
class SlimLlm(Method):
    """SliM-LLM's options.

    What the released code does besides its options here is not reproduced under any preset: it keeps the weights of
    inputs that were always zero; a 1-bit weight equal to the mean decodes to the mean, a third level; and a smaller
    last group may change its bits, so that the average is no longer the grid's.

    Args:
        damping: fraction of the mean Hessian diagonal added to the diagonal.
        factorization: `host` in float64, or `device` in float32; see `linalg.inverse_cholesky`.
        absolute_damping: added to the Hessian's diagonal before that; the released code adds 0.01 whatever the
            Hessian's size.
        true_sequential: within a decoder block, later linears see the quantized earlier ones; as released, all are
            quantized at once.
        block_size: columns whose corrections are applied to the rest of the matrix at once; speed only.
        bit_allocation: otherwise every group has the bits of the grid.
        allocation_tokens: about how many calibration tokens bits are allocated by; 0 is all of them, as released.
        damped_count: groups are ranked once, by the damped Hessian. The released code ranks them twice: how many
            change is chosen with `absolute_damping` alone, and those are then picked with `damping` too.
        include_uniform: equal bits are one of the allocations tried; the released code always changes some groups
            where it can (from 4 groups on).
        bias_in_allocation: compare outputs with the bias on both sides; as released, only the float side has it.
        probability_floor: probabilities are raised to this before they are compared; 1e-6 in the released code.
        centred_binary: the two levels of a 1-bit group are mean -+ mean|w - mean|; as released, mean -+ mean|w|.
        search_range: scales are tried from 1 - this to 1 + this times the one that fits the range.
        search_steps: scales tried on each side; 0 keeps the one that fits the range.
        salient_weight: weight of salient elements in the error of a scale. 1, as released, treats all alike. Salient is
            what lies 2 standard deviations above the mean salience of its group.
        stale_symmetry: as released, groups of fewer bits get the zero of a symmetric grid, though not its scale, as
            long as no group with the grid's bits or more has come before them in their linear.
    """

    damping: float = 0.01
    factorization: str = "host"
    absolute_damping: float = 0.0
    true_sequential: bool = True
    block_size: int = 128
    bit_allocation: bool = True
    allocation_tokens: int = 4096
    damped_count: bool = True
    include_uniform: bool = True
    bias_in_allocation: bool = True
    probability_floor: float = 0.0
    centred_binary: bool = True
    search_range: float = 0.1
    search_steps: int = 50
    salient_weight: float = 1.0
    stale_symmetry: bool = False

    name: ClassVar[str] = "slim_llm"
    code_version: ClassVar[str] = "slim_llm/3"
    encoding: ClassVar[str] = MixedWeight.encoding
    weight_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "corrected": {
            "allocation_tokens": 4096,
            "true_sequential": True,
            "absolute_damping": 0.0,
            "damped_count": True,
            "include_uniform": True,
            "bias_in_allocation": True,
            "probability_floor": 0.0,
            "centred_binary": True,
            "stale_symmetry": False,
        },
        "as_published": {
            "allocation_tokens": 0,
            "true_sequential": False,
            "absolute_damping": 0.01,
            "damped_count": False,
            "include_uniform": False,
            "bias_in_allocation": False,
            "probability_floor": 1e-6,
            "centred_binary": False,
            "stale_symmetry": True,
        },
    }

    @property
    def needs(self) -> Needs:
        """The Hessian, and inputs to allocate bits by."""
        sample = (self.allocation_tokens or ALL_TOKENS) if self.bit_allocation else 0
        return replace(super().needs, hessian=True, sample=sample)

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            QuantizationError: a value outside its rule.
        """
        super().__post_init__()
        check_factorization(self.factorization)
        if self.grid.group_size == PER_CHANNEL:
            raise QuantizationError(
                f"group_size = {self.grid.group_size}: slim_llm gives each group its own bits; set group_size"
            )
        if self.grid.symmetric:
            raise QuantizationError("slim_llm fits a zero to every group; leave the symmetric convention out")
        for option, met, rule in (
            ("damping", 0 < self.damping <= 1, "above 0 and at most 1"),
            ("absolute_damping", 0 <= self.absolute_damping < math.inf, "at least 0 and finite"),
            ("block_size", self.block_size >= 1, "at least 1"),
            ("probability_floor", 0 <= self.probability_floor < 1, "at least 0 and below 1"),
            ("search_range", 0 < self.search_range < 1, "between 0 and 1"),
            ("search_steps", self.search_steps >= 0, "at least 0"),
            ("allocation_tokens", self.allocation_tokens >= 0, "at least 0"),
            ("salient_weight", 0 <= self.salient_weight < math.inf, "at least 0 and finite"),
        ):
            if not met:
                raise QuantizationError(f"options.{option} = {getattr(self, option)} must be {rule}")

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes with equal bits, to which any allocation comes close: pairs of groups keep the average."""
        return super().weight_bytes(out_features, in_features) + self.grid.num_groups(in_features)

    def quantize(self, group: LinearGroup) -> MethodOutcome:
        """Quantize linears that share an input: one factorization, and bits for each linear by itself.

        Raises:
            NumericalError: the Hessian cannot be factorized, with `damped_count` off by its absolute damping alone.
            QuantizationError: a scale overflows.
        """
        if group.statistics is None:
            raise AssertionError("SliM-LLM needs the statistics of its inputs")
        hessian_II, unseen = without_unseen(group.statistics.require_hessian())
        if self.absolute_damping:
            hessian_II = hessian_II + self.absolute_damping * torch.eye(len(unseen), device=hessian_II.device)
        inverse_UII, damping = inverse_cholesky(hessian_II, self.damping, self.factorization)
        counting_I = inverse_UII.diagonal()
        if self.bit_allocation and not self.damped_count:
            counting_UII, added = inverse_cholesky(hessian_II, 0.0, self.factorization)
            if added:
                raise NumericalError(
                    f"the Hessian is not positive definite with options.absolute_damping = {self.absolute_damping} "
                    "alone, by which groups are ranked first; raise it, or set options.damped_count: true"
                )
            counting_I = counting_UII.diagonal()
        weights = [
            slim_llm(weight.masked_fill(unseen, 0.0), bias, inverse_UII, counting_I, group.statistics.sample_TI, self)
            for weight, bias in zip(group.weights, group.biases, strict=True)
        ]
        return MethodOutcome(weights=weights, damping=damping)


def slim_llm(
    weight_OI: Tensor,
    bias_O: Tensor | None,
    inverse_UII: Tensor,
    counting_I: Tensor,
    sample_TI: Tensor | None,
    options: SlimLlm,
) -> MixedWeight:
    """Quantize one matrix.

    Args:
        weight_OI: finite float32 weights; not modified.
        inverse_UII: float32 upper Cholesky factor of the damped inverse Hessian, see `linalg.inverse_cholesky`.
        counting_I: the diagonal of such a factor, by which groups are ranked where their number is chosen.
        sample_TI: float32 inputs of some tokens; None where bits are not allocated.
    Raises:
        QuantizationError: a scale overflows `grid.scale_dtype`.
    """
    out_features, in_features = weight_OI.shape
    nominal, size = options.grid, options.grid.group_size
    diagonal_I = inverse_UII.diagonal()
    group_bits = [nominal.bits] * nominal.num_groups(in_features)
    if options.bit_allocation:
        if sample_TI is None:
            raise AssertionError("SliM-LLM allocates bits by a sample of its inputs")
        errors = allocation_errors(weight_OI, bias_O, sample_TI, rank_groups(weight_OI, counting_I, size), options)
        num_pairs = min(errors, key=lambda count: errors[count])  # of equals the one that changes least
        group_bits = allocated_bits(rank_groups(weight_OI, diagonal_I, size), num_pairs, group_bits)

    work_IO = weight_OI.T.contiguous()
    codes_IO = torch.empty_like(work_IO)
    scales_GO, zeros_GO = [], []
    symmetric_zero = options.stale_symmetry
    for group, bits in enumerate(group_bits):
        grid = replace(nominal, bits=bits)
        first, end = group * size, min((group + 1) * size, in_features)
        symmetric_zero = symmetric_zero and bits < nominal.bits
        scale_O, zero_O = calibrate(work_IO[first:end].T, diagonal_I[first:end], grid, options, symmetric_zero)
        scales_GO.append(scale_O)
        zeros_GO.append(zero_O)
        for start in range(first, end, options.block_size):
            stop = min(start + options.block_size, end)
            error_BO = quantize_columns(
                work_IO[start:stop],
                codes_IO[start:stop],
                inverse_UII[start:stop, start:stop],
                None,
                scale_O.expand(stop - start, out_features),
                zero_O.expand(stop - start, out_features),
                grid,
            )
            work_IO[stop:].addmm_(inverse_UII[start:stop, stop:].T, error_BO, alpha=-1)
    return MixedWeight(
        grid=nominal,
        group_bits=group_bits,
        codes_OI=codes_IO.T.to(torch.uint8, memory_format=torch.contiguous_format),
        scale_OG=torch.stack(scales_GO, 1),
        zero_OG=torch.stack(zeros_GO, 1),
    )


def rank_groups(weight_OI: Tensor, diagonal_I: Tensor, size: int) -> list[int]:
    """The groups of `size` columns, least salient first; salience is the sum of w^2 / U_jj^2 over a group.

    A smaller last group is left out: it keeps its bits, so that the average stays what it is.
    """
    salience_I = (weight_OI / diagonal_I).square().sum(0)
    whole = len(salience_I) // size
    salience = salience_I[: whole * size].reshape(whole, size).sum(1).tolist()
    return sorted(range(whole), key=lambda group: salience[group])


def allocated_bits(ranking: Sequence[int], num_pairs: int, group_bits: Sequence[int]) -> list[int]:
    """Take a bit from each of the `num_pairs` first groups of the ranking, and give one to each of the last."""
    bits = list(group_bits)
    for place in range(num_pairs):
        bits[ranking[place]] -= 1
        bits[ranking[-1 - place]] += 1
    return bits


def allocation_errors(
    weight_OI: Tensor, bias_O: Tensor | None, sample_TI: Tensor, ranking: Sequence[int], options: SlimLlm
) -> dict[int, float]:
    """How far the outputs with rounded weights are from the float ones, for each number of pairs that may be chosen.

    The distance is KL(softmax(quantized) || softmax(float)) over the outputs, averaged over the tokens. Two groups
    differ between an allocation and the next, so that only their part of the outputs is computed anew.

    Returns:
        number of pairs -> KL divergence in nats.
    """
    grid, size = options.grid, options.grid.group_size
    lower, upper = replace(grid, bits=grid.bits - 1), replace(grid, bits=grid.bits + 1)
    output_TO = sample_TI @ weight_OI.T
    if bias_O is not None:
        output_TO += bias_O.float()
    log_float_TO = _log_probabilities(output_TO, options.probability_floor)

    rounded = [_round_group(weight_OK, grid, options) for weight_OK in torch.split(weight_OI, size, 1)]
    output_TO = sample_TI @ torch.cat(rounded, 1).T
    if bias_O is not None and options.bias_in_allocation:
        output_TO += bias_O.float()

    most_pairs = max(len(ranking) // 2 - 1, 0)
    fewest_pairs = 0 if options.include_uniform else min(1, most_pairs)
    errors = {}
    for num_pairs in range(most_pairs + 1):
        if num_pairs:
            for group, other in ((ranking[num_pairs - 1], lower), (ranking[-num_pairs], upper)):
                columns = slice(group * size, (group + 1) * size)
                change_OK = _round_group(weight_OI[:, columns], other, options) - rounded[group]
                output_TO.addmm_(sample_TI[:, columns], change_OK.T)
        if num_pairs >= fewest_pairs:
            log_rounded_TO = _log_probabilities(output_TO, options.probability_floor)
            divergence_T = (log_rounded_TO.exp() * (log_rounded_TO - log_float_TO)).sum(1)
            errors[num_pairs] = divergence_T.mean().item()
    return errors


def _log_probabilities(output_TO: Tensor, floor: float) -> Tensor:
    log_TO = torch.log_softmax(output_TO, dim=1)
    return log_TO.exp().clamp(min=floor).log() if floor > 0 else log_TO


def _round_group(weight_OK: Tensor, grid: Grid, options: SlimLlm) -> Tensor:
    """Round a group to nearest, on the grid that fits its range."""
    return _rounded(weight_OK, *_fit(weight_OK, grid, options), grid)


def _rounded(weight_OK: Tensor, scale_O: Tensor, zero_O: Tensor, grid: Grid) -> Tensor:
    scale_O1, zero_O1 = scale_O.unsqueeze(1), zero_O.unsqueeze(1)
    return decode(encode(weight_OK, scale_O1, zero_O1, grid), scale_O1, zero_O1)


def _fit(weight_OK: Tensor, grid: Grid, options: SlimLlm) -> tuple[Tensor, Tensor]:
    if not grid.binary or options.centred_binary:
        return fit_group(weight_OK, grid)
    mean_O = weight_OK.mean(1)
    scale_O = stored_scale(2 * weight_OK.abs().mean(1), grid)
    zero_O = 0.5 - mean_O / scale_O
    return scale_O, zero_O.to(SCALE_DTYPES[grid.scale_dtype]).float()


def calibrate(
    weight_OK: Tensor, diagonal_K: Tensor, grid: Grid, options: SlimLlm, symmetric_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Fit the grid of a group: for each row the scale whose error sum |q - w|^2.4, weighted by salience, is least.

    Tried are the range of the row, then wider ones step by step, then narrower ones; of equals the first is kept. A
    1-bit grid is fitted in closed form.

    Args:
        weight_OK: finite float32 weights, as the groups before have corrected them.
        diagonal_K: the group's part of the diagonal of U, positive.
        grid: the group's own, with its bits.
        symmetric_zero: fix the zero at 2**(bits - 1); see `SlimLlm.stale_symmetry`.
    Returns:
        scale_O, zero_O: as in `grid.fit_group`.
    Raises:
        QuantizationError: a scale overflows `grid.scale_dtype`.
    """
    if grid.binary:
        return _fit(weight_OK, grid, options)
    weighting_OK = None
    if options.salient_weight != 1:
        weighting_OK = torch.where(salient(weight_OK, diagonal_K), options.salient_weight, 1.0)
    ends_O2 = torch.stack([weight_OK.amin(1), weight_OK.amax(1)], 1)  # all that a fit depends on

    def tried(factor: float) -> tuple[Tensor, Tensor, Tensor]:
        scale_O, zero_O = fit_group(factor * ends_O2, grid)
        if symmetric_zero:
            zero_O = torch.full_like(scale_O, 1 << (grid.bits - 1))
        error_OK = _rounded(weight_OK, scale_O, zero_O, grid).sub_(weight_OK).abs_().pow_(_ERROR_EXPONENT)
        return scale_O, zero_O, (error_OK if weighting_OK is None else error_OK * weighting_OK).sum(1)

    scale_O, zero_O, error_O = tried(1.0)
    steps = [options.search_range * (step + 1) / options.search_steps for step in range(options.search_steps)]
    for factor in (*(1 + step for step in steps), *(1 - step for step in steps)):
        other_scale_O, other_zero_O, other_error_O = tried(factor)
        better_O = other_error_O < error_O
        scale_O = torch.where(better_O, other_scale_O, scale_O)
        zero_O = torch.where(better_O, other_zero_O, zero_O)
        error_O = torch.where(better_O, other_error_O, error_O)
    return scale_O, zero_O


def salient(weight_OK: Tensor, diagonal_K: Tensor) -> Tensor:
    """Bool [O, K]: which weights of a group have a salience 2 standard deviations above the mean; maybe none."""
    salience_OK = (weight_OK / diagonal_K).square()
    deviation_OK = salience_OK - salience_OK.mean()
    variance = deviation_OK.square().sum() / max(salience_OK.numel() - 1, 1)
    return deviation_OK > _SALIENT_DEVIATIONS * variance.sqrt()
