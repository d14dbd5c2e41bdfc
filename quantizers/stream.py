"""The engine: calibration activations go in, quantized blocks come out, one block at a time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.block import Stage, record_inputs, run_block, walk_block
from quantizers.errors import QuantizationError
from quantizers.families import Family, blocks_of, family_of, linear_at
from quantizers.folding import fold_errors
from quantizers.method import Method
from quantizers.quantized_weight import QuantizedWeight
from quantizers.statistics import Drift, Hessian, InputStatistics

# Tokens that go through a block at once: large enough for efficient products, small enough for the cache.
_TOKENS_PER_BATCH = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear:
    """One linear's artifact with what was measured while making it.

    Args:
        name: full dotted name of the linear in the model, without ".weight".
        weight_error: |W - Q|^2 / |W|^2.
        output_error: tr((W-Q) H (W-Q)^T) / tr(W H W^T), the relative squared error of its outputs; None without data.
        damping: the rung of the damping ladder; None where nothing was factorized.
        seconds: its share of its stage's time.
    """

    name: str
    weight: QuantizedWeight
    weight_error: float
    output_error: float | None
    damping: float | None
    seconds: float


@torch.inference_mode()
def quantize_blocks(
    model: nn.Module,
    method: Method,
    windows: Tensor | None,
    *,
    progress: Progress | None = None,
) -> Iterator[list[QuantizedLinear]]:
    """Quantize a causal language model, yielding the linears of one decoder block at a time.

    The model is left as it was: weights that were replaced while their block ran are put back.

    Args:
        model: a transformers causal LM whose `config.model_type` has a row in `families.py`.
        method: a method with its options.
        windows: int64 [windows, tokens] calibration tokens; None is fine where `method.needs_calibration` is false.
        progress: called with (blocks done, blocks) before each block and at the end.
    Raises:
        QuantizationError: unknown family, a group size that does not fit, non-finite weights or activations
            (with the tensor's name), or a Hessian that cannot be factorized.
    """
    family = family_of(model)
    blocks = blocks_of(model, family)
    check_model(model, method)
    hidden: list[Tensor] = []
    float_hidden: list[Tensor] | None = None
    arguments: list[list[dict[str, Any]]] = []
    if method.needs_calibration:
        if windows is None:
            raise QuantizationError("this method needs calibration data and none was given")
        per_batch = max(1, _TOKENS_PER_BATCH // windows.shape[1])
        hidden, arguments = record_inputs(model, family, list(torch.split(windows, per_batch)))
        float_hidden = list(hidden) if method.needs_drift else None
    for index, block in enumerate(blocks):
        if progress:
            progress(index, len(blocks))
        prefix = f"{family.blocks}.{index}."
        if method.needs_calibration:
            with _weights_put_back(block, family):
                streams = _Streams(hidden=hidden, float_hidden=float_hidden, arguments=arguments[index])
                yield _quantize_block(block, family, method, streams, prefix)
        else:
            yield [linear for stage in family.stages for linear in _quantize_stage(block, stage, method, None, prefix)]
    if progress:
        progress(len(blocks), len(blocks))


@dataclass(frozen=True, kw_only=True)
class _Streams:
    """A block's inputs per batch in the quantized model and, where drift is wanted, in the float model."""

    hidden: list[Tensor]
    float_hidden: list[Tensor] | None
    arguments: Sequence[Mapping[str, Any]]


def _quantize_block(
    block: nn.Module, family: Family, method: Method, streams: _Streams, prefix: str
) -> list[QuantizedLinear]:
    """Quantize the linears of a block and move the streams on to the next one."""
    results: list[QuantizedLinear] = []

    def install(stage: tuple[str, ...], statistics: InputStatistics) -> None:
        for linear in _quantize_stage(block, stage, method, statistics, prefix):
            module = linear_at(block, linear.name.removeprefix(prefix))
            decoded = linear.weight.decode().to(module.weight.dtype)
            module.weight = nn.Parameter(decoded, requires_grad=False)
            results.append(linear)

    float_walk: Iterator[Stage] | None = None
    if streams.float_hidden is not None:  # a twin keeps the float weights while the block's own are replaced
        float_walk = walk_block(copy.deepcopy(block), family, streams.float_hidden, streams.arguments)
    # Not true-sequential: all statistics come from the float block; its output is dropped.
    hidden = streams.hidden if method.true_sequential else list(streams.hidden)
    pending: list[tuple[tuple[str, ...], InputStatistics]] = []
    for stage, inputs in walk_block(block, family, hidden, streams.arguments):
        # Before this stage runs: a weight that is not finite would spoil, and so blame, the inputs of the next.
        _check_finite(block, stage, prefix)
        statistics = _collect(block, stage, inputs, next(float_walk)[1] if float_walk else None, prefix)
        if method.true_sequential:
            install(stage, statistics)
        else:
            pending.append((stage, statistics))
    for _ in float_walk or ():
        raise AssertionError("the float walk has more stages than the quantized one")
    if not method.true_sequential:
        for stage, statistics in pending:
            install(stage, statistics)
        run_block(block, family, streams.hidden, streams.arguments)
    return results


def _collect(
    block: nn.Module,
    stage: tuple[str, ...],
    inputs: Iterator[Tensor],
    float_inputs: Iterator[Tensor] | None,
    prefix: str,
) -> InputStatistics:
    weight = linear_at(block, stage[0]).weight
    hessian = Hessian(weight.shape[1], weight.device)
    drift = Drift(weight.shape[1], weight.device) if float_inputs is not None else None
    for batch in inputs:
        hessian.update(batch)
        if drift is not None and float_inputs is not None:
            drift.update(batch, next(float_inputs))
    statistics = InputStatistics(hessian_II=hessian.value(), drift_II=drift.value() if drift else None)
    if not torch.isfinite(statistics.hessian_II.diagonal()).all():
        raise QuantizationError(f"the calibration inputs of {prefix}{stage[0]} hold NaN or infinity")
    return statistics


def _check_finite(block: nn.Module, stage: tuple[str, ...], prefix: str) -> None:
    for name in stage:
        if not torch.isfinite(linear_at(block, name).weight).all():
            raise QuantizationError(f"{prefix}{name}.weight holds NaN or infinity")


def _quantize_stage(
    block: nn.Module, stage: tuple[str, ...], method: Method, statistics: InputStatistics | None, prefix: str
) -> list[QuantizedLinear]:
    started = time.perf_counter()
    _check_finite(block, stage, prefix)
    weights = [linear_at(block, name).weight.float() for name in stage]
    targets = weights
    if method.fold > 0 and statistics is not None:
        targets = [fold_errors(weight, statistics, method.fold, method.fold_damping) for weight in weights]
    try:
        outcome = method.quantize(targets, statistics)
    except QuantizationError as error:
        raise QuantizationError(f"{prefix}{' and '.join(stage)}: {error}") from error
    errors = [
        _relative_errors(weight, quantized.decode(), statistics.hessian_II if statistics else None)
        for weight, quantized in zip(weights, outcome.weights, strict=True)
    ]
    seconds = (time.perf_counter() - started) / len(stage)
    return [
        QuantizedLinear(
            name=prefix + name,
            weight=quantized,
            weight_error=weight_error,
            output_error=output_error,
            damping=outcome.damping,
            seconds=seconds,
        )
        for name, quantized, (weight_error, output_error) in zip(stage, outcome.weights, errors, strict=True)
    ]


def _relative_errors(weight: Tensor, decoded: Tensor, hessian_II: Tensor | None) -> tuple[float, float | None]:
    difference = weight - decoded
    weight_error = _ratio(difference.square().sum(), weight.square().sum())
    if hessian_II is None:
        return weight_error, None
    output_error = _ratio(((difference @ hessian_II) * difference).sum(), ((weight @ hessian_II) * weight).sum())
    return weight_error, output_error


def _ratio(error: Tensor, reference: Tensor) -> float:
    if reference.item() == 0:
        return 0.0 if error.item() == 0 else float("inf")
    return (error / reference).item()


class _weights_put_back:  # noqa: N801 - reads as a statement: with _weights_put_back(block, family)
    def __init__(self, block: nn.Module, family: Family) -> None:
        self._modules = [linear_at(block, name) for stage in family.stages for name in stage]

    def __enter__(self) -> None:
        self._originals = [module.weight for module in self._modules]

    def __exit__(self, *_: object) -> None:
        for module, original in zip(self._modules, self._originals, strict=True):
            module.weight = original


def linears_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (out_features, in_features) of every linear that quantization touches, in order.

    Raises:
        QuantizationError: unknown family, or a linear of its row is missing.
    """
    family = family_of(model)
    shapes: dict[str, tuple[int, int]] = {}
    for index, block in enumerate(blocks_of(model, family)):
        for stage in family.stages:
            for name in stage:
                module = block.get_submodule(name)
                if not isinstance(module, nn.Linear):
                    raise QuantizationError(
                        f"{family.blocks}.{index}.{name} is a {type(module).__name__}, not a Linear"
                    )
                shapes[f"{family.blocks}.{index}.{name}"] = (module.out_features, module.in_features)
    return shapes


def check_model(model: nn.Module, method: Method) -> None:
    """Raise unless the method's grid fits every linear of the model; needs shapes only (a meta model will do).

    Raises:
        QuantizationError: names the first linear that does not fit and what would.
    """
    for name, (_, in_features) in linears_of(model).items():
        method.grid.check_fits(in_features, name)
