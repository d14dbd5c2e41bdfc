"""BiLLM: about one sign per weight, two in the columns that matter most.

Block of columns by block of columns: choose the salient columns, split the other weights into small and large ones,
binarize each part with its own levels, and correct the later blocks for the error as GPTQ does.
Source: Huang et al. 2024, arXiv:2402.04291, algorithm 1. Shape letters: O out_features, I in_features, B columns of a
block, S its salient columns, N its other columns, C any number of columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantizers.binarized_weight import BinarizedBlock, BinarizedWeight, level, stored_bytes, stored_level
from quantizers.errors import QuantizationError
from quantizers.grid import PER_CHANNEL
from quantizers.linalg import check_factorization, inverse_cholesky, without_unseen
from quantizers.method import LinearGroup, Method, MethodOutcome, Needs

METRICS = ("hessian", "magnitude")
SEARCHED = ("loss", "weight", "salience")
_SPLIT_PERCENTS = range(10, 91)  # 81 quantiles, 0.10 to 0.90


@dataclass(frozen=True, kw_only=True)
class Billm(Method):
    """BiLLM's options. The paper's 1 bit is `grid.bits`; blocks take the place of groups.

    Args:
        block_size: columns that share salient columns and levels, and whose error is handed on at once.
        damping: fraction of the mean Hessian diagonal added to the diagonal.
        factorization: `host` in float64, or `device` in float32; see `linalg.inverse_cholesky`.
        true_sequential: within a decoder block, later linears see the quantized earlier ones; as released, all are
            quantized at once.
        salient_metric: what ranks columns: `hessian`, the sum of w^2 / U_jj^2 over rows, or `magnitude`, of |w|.
        search_on: whose squared error both searches make small: `loss`, that of the weights with each column's priced
            at 1 / U_jj^2, which is what it costs in outputs (the loss of GPTQ and of algorithm 1's error feedback);
            `weight`, that of the weights as they are; `salience`, as released, that of the matrix of the metric
            (w^2 / U_jj^2, or w), whose split is then applied to the weights.
        search_other_order: the order by which the search for the number of salient columns binarizes the others. 2, as
            released, comes close to what their split then attains; 1 leaves the split out of account, so that two signs
            always seem to pay and the search mostly ends at `max_salient`.
        max_salient: the most salient columns of a block; one column stays out whatever it says.
        split_over_salient: the quantiles that the split tries are of all weights of a block, with those of salient
            columns as zeros, as released; otherwise of the others alone.
    """

    block_size: int = 128
    damping: float = 0.01
    factorization: str = "host"
    true_sequential: bool = True
    salient_metric: str = "hessian"
    search_on: str = "loss"
    search_other_order: int = 2
    max_salient: int = 49
    split_over_salient: bool = False

    name: ClassVar[str] = "billm"
    code_version: ClassVar[str] = "billm/2"
    encoding: ClassVar[str] = BinarizedWeight.encoding
    weight_bits: ClassVar[tuple[int, ...]] = (1,)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "corrected": {"search_on": "loss", "split_over_salient": False, "true_sequential": True},
        "as_published": {"search_on": "salience", "split_over_salient": True, "true_sequential": False},
    }

    @property
    def needs(self) -> Needs:
        """The Hessian."""
        return replace(super().needs, hessian=True)

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            QuantizationError: a value outside its rule.
        """
        super().__post_init__()
        check_factorization(self.factorization)
        if self.grid.group_size != PER_CHANNEL:
            raise QuantizationError(
                f"group_size = {self.grid.group_size}: billm has blocks of options.block_size columns instead of "
                "groups; leave group_size out or per_channel"
            )
        if self.grid.symmetric:
            raise QuantizationError("billm stores a mean with every scale; leave the symmetric convention out")
        if self.block_size < 1:
            raise QuantizationError(f"options.block_size = {self.block_size} must be at least 1")
        if not 0 < self.damping <= 1:
            raise QuantizationError(f"options.damping = {self.damping} must be above 0 and at most 1")
        if self.max_salient < 1:
            raise QuantizationError(f"options.max_salient = {self.max_salient} must be at least 1")
        if self.search_other_order not in (1, 2):
            raise QuantizationError(f"options.search_other_order = {self.search_other_order} must be 1 or 2")
        _one_of("salient_metric", self.salient_metric, METRICS)
        _one_of("search_on", self.search_on, SEARCHED)

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes with no salient column; a salient one takes its second sign where the others take their split."""
        return stored_bytes(out_features, in_features, 0, self.block_size, self.grid.scale_dtype)

    def quantize(self, group: LinearGroup) -> MethodOutcome:
        """Quantize linears that share an input; rows interact in BiLLM, so each by itself.

        Raises:
            QuantizationError: the Hessian cannot be factorized, or a mean or scale overflows.
        """
        if group.statistics is None:
            raise AssertionError("BiLLM needs the statistics of its inputs")
        hessian_II, unseen = without_unseen(group.statistics.require_hessian())
        inverse_UII, damping = inverse_cholesky(hessian_II, self.damping, self.factorization)
        weights = [billm(weight.masked_fill(unseen, 0.0), inverse_UII, self) for weight in group.weights]
        return MethodOutcome(weights=weights, damping=damping)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise QuantizationError(f"options.{option} = {value!r} is none of {', '.join(known)}")


def billm(weight_OI: Tensor, inverse_UII: Tensor, options: Billm) -> BinarizedWeight:
    """Binarize one matrix (algorithm 1).

    Args:
        weight_OI: finite float32 weights; not modified.
        inverse_UII: float32 upper Cholesky factor of the damped inverse Hessian, see `linalg.inverse_cholesky`.
    Raises:
        QuantizationError: a mean or scale overflows `grid.scale_dtype`.
    """
    work_OI = weight_OI.clone()
    in_features = work_OI.shape[1]
    diagonal_I = inverse_UII.diagonal()
    blocks = []
    for start in range(0, in_features, options.block_size):
        stop = min(start + options.block_size, in_features)
        weight_OB, diagonal_B = work_OI[:, start:stop], diagonal_I[start:stop]
        block = binarize_block(weight_OB, diagonal_B, options)
        blocks.append(block)
        # Nothing is corrected within the block: its values are all fixed from the weights it began with.
        error_OB = (weight_OB - block.decode()) / diagonal_B
        work_OI[:, stop:].addmm_(error_OB, inverse_UII[start:stop, stop:], alpha=-1)
    return BinarizedWeight(blocks=blocks, block_size=options.block_size, scale_dtype=options.grid.scale_dtype)


def binarize_block(weight_OB: Tensor, diagonal_B: Tensor, options: Billm) -> BinarizedBlock:
    """Choose the salient columns of a block and the split of the others, and binarize the three parts.

    Args:
        weight_OB: finite float32 weights, as the blocks before have corrected them.
        diagonal_B: the block's part of the diagonal of U, positive.
    Raises:
        QuantizationError: a mean or scale overflows `grid.scale_dtype`.
    """
    normalized_OB = _normalized(weight_OB)
    metric_OB = normalized_OB
    if options.salient_metric == "hessian":
        metric_OB = _normalized(normalized_OB / diagonal_B).square()
    searched_OB = metric_OB if options.search_on == "salience" else normalized_OB
    price_B = torch.ones_like(diagonal_B)
    if options.search_on == "loss":
        price_B = (diagonal_B.min() / diagonal_B).square()  # at most 1

    columns = weight_OB.shape[1]
    ranked_B = torch.argsort(metric_OB.abs().sum(0).cpu(), descending=True, stable=True).to(weight_OB.device)
    num_salient = search_num_salient(searched_OB[:, ranked_B], price_B[ranked_B], options)
    salient_B = torch.zeros(columns, dtype=torch.bool)
    salient_B[ranked_B[:num_salient].cpu()] = True
    salient = salient_B.nonzero().flatten().to(weight_OB.device)
    other = (~salient_B).nonzero().flatten().to(weight_OB.device)

    searched_ON = searched_OB[:, other]
    padding = len(weight_OB) * num_salient if options.split_over_salient else 0
    sparse_ON = searched_ON.abs() > search_split(searched_ON, price_B[other], padding)

    dtype = options.grid.scale_dtype
    weight_OS, weight_ON = weight_OB[:, salient], weight_OB[:, other]
    everything_OS = torch.ones_like(weight_OS, dtype=torch.bool)
    first = _binarize(weight_OS, everything_OS, dtype)
    second = _binarize(weight_OS - level(*first), everything_OS, dtype)
    concentrated = _binarize(weight_ON, ~sparse_ON, dtype)
    sparse = _binarize(weight_ON, sparse_ON, dtype)

    sign_OB = torch.empty(weight_OB.shape, dtype=torch.uint8, device=weight_OB.device)
    sign_OB[:, salient] = first[0].to(torch.uint8)
    sign_OB[:, other] = torch.where(sparse_ON, sparse[0], concentrated[0]).to(torch.uint8)
    pairs = (first, second, concentrated, sparse)
    return BinarizedBlock(
        salient_B=salient_B.to(weight_OB.device),
        sign_OB=sign_OB,
        second_sign_OS=second[0].to(torch.uint8),
        sparse_ON=sparse_ON.to(torch.uint8),
        mean_PO=torch.stack([mean_O1.squeeze(1) for _, mean_O1, _ in pairs]),
        scale_PO=torch.stack([scale_O1.squeeze(1) for _, _, scale_O1 in pairs]),
    )


def _normalized(values: Tensor) -> Tensor:
    """Times the power of two that brings the largest magnitude below 1, so that no square overflows."""
    exponent = math.frexp(values.abs().max().item())[1]
    return values * 2.0 ** min(-exponent, 126)


def _binarize(weight_OC: Tensor, member_OC: Tensor, scale_dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Bool signs [O, C], and the stored mean and scale [O, 1] of each row's members; 0 in a row without any.

    The scale, mean |w - mean|, is the best for these signs and this (already rounded) mean.
    DEVIATION: the sign of 0 is plus; the released code leaves such a weight at the mean, which one bit cannot say.
    """
    count_O1 = member_OC.sum(1, keepdim=True).clamp(min=1)
    mean_O1 = stored_level((weight_OC * member_OC).sum(1, keepdim=True) / count_O1, scale_dtype)
    centred_OC = weight_OC - mean_O1
    scale_O1 = stored_level((centred_OC.abs() * member_OC).sum(1, keepdim=True) / count_O1, scale_dtype)
    return centred_OC >= 0, mean_O1, scale_O1


def search_num_salient(ranked_OB: Tensor, price_B: Tensor, options: Billm) -> int:
    """How many of the leading columns to set apart, for the least priced squared error; of equals the fewest.

    Args:
        ranked_OB: what is searched on, the most salient column first.
        price_B: of a squared error in each column.
    Returns:
        1 to `max_salient`, fewer than there are columns (so 0 of a single column). 0 is not tried: one column has no
        error, as each row's value is its own mean.
    """
    counts = range(1, min(options.max_salient, ranked_OB.shape[1] - 1) + 1)
    if not counts:
        return 0
    other_order = options.search_other_order
    errors_KO = torch.stack(
        [
            squared_error(ranked_OB[:, :k], 2, price_B[:k]) + squared_error(ranked_OB[:, k:], other_order, price_B[k:])
            for k in counts
        ]
    )
    # Summed in float64 on the host: neighbours differ little.
    return counts[int(errors_KO.cpu().double().sum(1).argmin())]


def squared_error(values_OC: Tensor, order: int, price_C: Tensor) -> Tensor:
    """Priced squared error [O] of binarizing each row `order` times, each time what is left (paper, section 3.2).

    Means and scales are not rounded here.
    """
    residual_OC = values_OC
    for _ in range(order):
        centred_OC = residual_OC - residual_OC.mean(1, keepdim=True)
        scale_O1 = centred_OC.abs().mean(1, keepdim=True)
        residual_OC = centred_OC - torch.where(centred_OC < 0, -scale_O1, scale_O1)
    return residual_OC.square() @ price_C


def search_split(values_ON: Tensor, price_N: Tensor, num_zeros: int = 0) -> float:
    """The magnitude up to which weights are concentrated, for the least priced squared error; of equals the lowest.

    Args:
        values_ON: what is searched on, without salient columns.
        price_N: of a squared error in each column.
        num_zeros: zeros to add when quantiles are taken.
    """
    magnitude_ON = values_ON.abs()
    # Sorted on the host: torch.quantile has a size limit, and accelerators sort badly if at all.
    sorted_magnitudes = magnitude_ON.cpu().flatten().sort().values
    last = num_zeros + len(sorted_magnitudes) - 1
    # Interpolating to the next magnitude would split the weights no differently.
    ranks = [max(percent * last // 100 - num_zeros, -1) for percent in _SPLIT_PERCENTS]
    thresholds = [sorted_magnitudes[rank].item() if rank >= 0 else 0.0 for rank in ranks]
    errors_TO = torch.stack([_split_error(values_ON, magnitude_ON <= threshold, price_N) for threshold in thresholds])
    return thresholds[int(errors_TO.cpu().double().sum(1).argmin())]


def _split_error(values_ON: Tensor, concentrated_ON: Tensor, price_N: Tensor) -> Tensor:
    """Priced squared error [O] of binarizing two parts of each row."""
    concentrated = concentrated_ON.to(values_ON.dtype)
    count_O1 = concentrated.sum(1, keepdim=True)
    rest_O1 = (values_ON.shape[1] - count_O1).clamp(min=1)
    count_O1 = count_O1.clamp(min=1)
    total_O1 = (values_ON * concentrated).sum(1, keepdim=True)
    mean_O1, rest_mean_O1 = total_O1 / count_O1, (values_ON.sum(1, keepdim=True) - total_O1) / rest_O1
    spread_ON = (values_ON - torch.where(concentrated_ON, mean_O1, rest_mean_O1)).abs()
    spread_O1 = (spread_ON * concentrated).sum(1, keepdim=True)
    scale_O1, rest_scale_O1 = spread_O1 / count_O1, (spread_ON.sum(1, keepdim=True) - spread_O1) / rest_O1
    return (spread_ON - torch.where(concentrated_ON, scale_O1, rest_scale_O1)).square() @ price_N
