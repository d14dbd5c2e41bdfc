"""The engine: calibration activations go in, quantized blocks come out, one block at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.block import record_inputs, run_block
from quantizers.errors import QuantizationError
from quantizers.families import Family, blocks_of, family_of, linear_at
from quantizers.method import Method
from quantizers.quantized_weight import QuantizedWeight
from quantizers.statistics import Hessian

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
        windows: int64 [windows, tokens] calibration tokens; None is fine where `method.needs_hessian` is false.
        progress: called with (blocks done, blocks) before each block and at the end.
    Raises:
        QuantizationError: unknown family, a group size that does not fit, non-finite weights or activations
            (with the tensor's name), or a Hessian that cannot be factorized.
    """
    family = family_of(model)
    blocks = blocks_of(model, family)
    check_model(model, method)
    hidden: list[Tensor] = []
    arguments: list[list[dict[str, Any]]] = []
    if method.needs_hessian:
        if windows is None:
            raise QuantizationError("this method needs calibration data and none was given")
        per_batch = max(1, _TOKENS_PER_BATCH // windows.shape[1])
        hidden, arguments = record_inputs(model, family, list(torch.split(windows, per_batch)))
    for index, block in enumerate(blocks):
        if progress:
            progress(index, len(blocks))
        prefix = f"{family.blocks}.{index}."
        if method.needs_hessian:
            with _weights_put_back(block, family):
                yield _quantize_block(block, family, method, hidden, arguments[index], prefix)
        else:
            yield [linear for stage in family.stages for linear in _quantize_stage(block, stage, method, None, prefix)]
    if progress:
        progress(len(blocks), len(blocks))


def _quantize_block(
    block: nn.Module,
    family: Family,
    method: Method,
    hidden: list[Tensor],
    arguments: Sequence[Mapping[str, Any]],
    prefix: str,
) -> list[QuantizedLinear]:
    results: list[QuantizedLinear] = []
    pending: list[tuple[tuple[str, ...], Tensor]] = []

    def install(stage: tuple[str, ...], hessian_II: Tensor) -> None:
        for linear in _quantize_stage(block, stage, method, hessian_II, prefix):
            module = linear_at(block, linear.name.removeprefix(prefix))
            decoded = linear.weight.decode().to(module.weight.dtype)
            module.weight = nn.Parameter(decoded, requires_grad=False)
            results.append(linear)

    def visit(stage: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
        # Before this stage runs: a weight that is not finite would spoil, and so blame, the inputs of the next.
        _check_finite(block, stage, prefix)
        weight = linear_at(block, stage[0]).weight
        hessian = Hessian(weight.shape[1], weight.device)
        for batch in inputs:
            hessian.update(batch)
        hessian_II = hessian.value()
        if not torch.isfinite(hessian_II.diagonal()).all():
            raise QuantizationError(f"the calibration inputs of {prefix}{stage[0]} hold NaN or infinity")
        if method.true_sequential:
            install(stage, hessian_II)
        else:
            pending.append((stage, hessian_II))

    if method.true_sequential:
        run_block(block, family, hidden, arguments, visit)
    else:
        run_block(block, family, list(hidden), arguments, visit)  # the float block's inputs; its output is dropped
        for stage, hessian_II in pending:
            install(stage, hessian_II)
        run_block(block, family, hidden, arguments)
    return results


def _check_finite(block: nn.Module, stage: tuple[str, ...], prefix: str) -> None:
    for name in stage:
        if not torch.isfinite(linear_at(block, name).weight).all():
            raise QuantizationError(f"{prefix}{name}.weight holds NaN or infinity")


def _quantize_stage(
    block: nn.Module, stage: tuple[str, ...], method: Method, hessian_II: Tensor | None, prefix: str
) -> list[QuantizedLinear]:
    started = time.perf_counter()
    _check_finite(block, stage, prefix)
    weights = [linear_at(block, name).weight.float() for name in stage]
    try:
        outcome = method.quantize(weights, hessian_II)
    except QuantizationError as error:
        raise QuantizationError(f"{prefix}{' and '.join(stage)}: {error}") from error
    errors = [
        _relative_errors(weight, quantized.decode(), hessian_II)
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
