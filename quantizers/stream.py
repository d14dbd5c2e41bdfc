"""The engine: calibration activations go in, quantized blocks come out, one block at a time.

Two paths. On the quantized path a block sees what the quantized blocks before it put out, and its statistics belong to
one cell. On the float path it sees what the float blocks put out: statistics do not depend on bits, come from
`float_statistics.py`, and are shared by every cell that needs them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.activations import ActivationQuantizer
from quantizers.apply import StoredBlock, StoredLinear, quantize_activations
from quantizers.block import Stage, check_weights_finite, enter, run_block, walk_block
from quantizers.block_source import BlockSource, private_copy
from quantizers.errors import NumericalError, QuantizationError
from quantizers.families import Family, blocks_of, family_of, linear_at
from quantizers.float_statistics import collect_float_statistics
from quantizers.folding import fold_errors
from quantizers.linalg import quadratic_form
from quantizers.method import BlockTransform, FloatBlock, LinearGroup, Method, check_grids
from quantizers.progress import Progress
from quantizers.statistics import Drift, Hessian, InputRanges, InputStatistics, TokenSample

SharedStatistics = Callable[[int], Sequence[InputStatistics]]
"""Block -> what `collect_float_statistics` yields for it."""


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear(StoredLinear):
    """One linear's artifact with what was measured while making it.

    Args:
        weight_error: |W - Q|^2 / |W|^2.
        output_error: tr((W-Q) H (W-Q)^T) / tr(W H W^T), the relative squared error of its outputs; None without data.
        damping: the rung of the damping ladder; None where nothing was factorized.
        seconds: its share of its stage's time.
    """

    weight_error: float
    output_error: float | None
    damping: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class QuantizedBlock(StoredBlock):
    """One block's artifact."""

    linears: Sequence[QuantizedLinear]
    dense: Mapping[str, Tensor] = field(default_factory=dict)


@torch.inference_mode()
def quantize_blocks(
    source: BlockSource,
    method: Method,
    windows: Tensor | None,
    *,
    shared: SharedStatistics | None = None,
    embedding: StoredLinear | None = None,
    progress: Progress | None = None,
) -> Iterator[QuantizedBlock]:
    """Quantize a causal language model, yielding one decoder block at a time.

    Args:
        source: the float model.
        method: a method with its options.
        windows: int64 [windows, tokens] calibration tokens; None is fine where the method needs no calibration.
        shared: statistics of the float model, where they are known already; collected here otherwise.
        embedding: quantized, which on the quantized path is what the first block's inputs come from.
        progress: called with (blocks done, blocks) before each block and at the end.
    Raises:
        QuantizationError: a group size that does not fit, non-finite weights or activations (with the tensor's name),
            or a Hessian that cannot be factorized.
    """
    needs = method.needs
    if needs.calibration and windows is None:
        raise QuantizationError("this method needs calibration data and none was given")
    _check_fits(source.block(0), source.family, method, 0)
    if windows is not None and needs_shared(method) and shared is None:
        known = list(collect_float_statistics(source, windows, hessians=shares_hessians(method)))
        shared = known.__getitem__
    streams = _Streams.enter(source, method, windows, embedding) if windows is not None and walks(method) else None
    quantize = _quantize_on_float_path if method.path == "float" or streams is None else _quantize_on_quantized_path
    for index in range(source.num_blocks):
        if progress:
            progress(index, source.num_blocks)
        work = _Work(
            block=source.block(index),
            family=source.family,
            method=method,
            prefix=f"{source.family.blocks}.{index}.",
            shared=shared(index) if shared and needs_shared(method) else None,
        )
        _check_fits(work.block, source.family, method, index)
        yield quantize(work, streams, index)
    if progress:
        progress(source.num_blocks, source.num_blocks)


def needs_shared(method: Method) -> bool:
    """Whether a method wants statistics of the float model."""
    return method.needs.ranges or shares_hessians(method)


def shares_hessians(method: Method) -> bool:
    """Whether these include Hessians."""
    return method.path == "float" and method.needs.hessian


def walks(method: Method) -> bool:
    """Whether calibration activations must stream through the model for this very cell."""
    needs = method.needs
    return needs.sample > 0 or needs.block or (method.path != "float" and (needs.hessian or needs.drift))


@dataclass(frozen=True, kw_only=True)
class _Streams:
    """The inputs of the block at work per batch: in the model that the path says, and, where drift is wanted, in the
    float model too. Moved on in place."""

    hidden: list[Tensor]
    float_hidden: list[Tensor] | None
    arguments: Sequence[Sequence[Mapping[str, Any]]]

    @classmethod
    def enter(cls, source: BlockSource, method: Method, windows: Tensor, embedding: StoredLinear | None) -> _Streams:
        needs = method.needs
        if method.path == "float":
            windows, embedding = windows[:: needs.stride(len(windows))], None
        hidden, arguments = enter(source, windows, embedding)
        float_hidden = None
        if needs.drift:
            float_hidden = list(hidden) if embedding is None else enter(source, windows)[0]
        return cls(hidden=hidden, float_hidden=float_hidden, arguments=arguments)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A block at work: a private copy, whose weights give way to quantized ones."""

    block: nn.Module
    family: Family
    method: Method
    prefix: str
    shared: Sequence[InputStatistics] | None

    def leaves_alone(self, stage: int) -> bool:
        names = [self.prefix + name for name in self.family.stages[stage]]
        if any(self.method.grids_differ(name, names[0]) for name in names):
            raise QuantizationError(f"layers: {', '.join(names)} share their input and must share their grid")
        return self.method.leaves_alone(names[0])

    def ranges(self, stage: int) -> InputRanges | None:
        return self.shared[stage].ranges if self.shared else None


def _check_fits(block: nn.Module, family: Family, method: Method, index: int) -> None:
    for stage in family.stages:
        for name in stage:
            full = f"{family.blocks}.{index}.{name}"
            if method.leaves_alone(full):
                continue
            method.of(full).grid.check_fits(linear_at(block, name).in_features, full)


def _quantize_on_float_path(work: _Work, streams: _Streams | None, index: int) -> QuantizedBlock:
    """All stages are quantized for the float block's own inputs; the streams move on with the float block's output."""
    family, method = work.family, work.method
    for stage in family.stages:
        check_weights_finite(work.block, stage, work.prefix)
    samples: list[Tensor | None] = [None] * len(family.stages)
    walk: Iterator[Stage] = iter(())
    if streams:
        stages = walk_block(work.block, family, streams.hidden, streams.arguments[index])
        walk = _sampled(stages, samples, _num_tokens(streams.hidden), method.needs.sample)
    transform = method.transform(
        FloatBlock(
            block=work.block,
            prefix=work.prefix,
            family=family,
            walk=walk,
            arguments=streams.arguments[index] if streams else [],
            ranges=[statistics.ranges for statistics in work.shared or () if statistics.ranges is not None],
        )
    )
    for _ in walk:  # what the method did not look at
        pass
    linears: list[QuantizedLinear] = []
    dense = dict(transform.dense)
    for number, stage in enumerate(family.stages):
        if work.leaves_alone(number):
            dense |= _rescaled_weights(work, stage, transform)
            continue
        statistics = _rescaled(
            InputStatistics(
                hessian_II=work.shared[number].hessian_II if work.shared else None,
                sample_TI=samples[number],
                ranges=work.ranges(number),
            ),
            transform.input_scales.get(stage[0]),
        )
        linears += _quantize_stage(work, number, statistics, transform)
    return QuantizedBlock(linears=linears, dense={work.prefix + name: value for name, value in dense.items()})


def _rescaled_weights(work: _Work, stage: Sequence[str], transform: BlockTransform) -> dict[str, Tensor]:
    """Of linears that are left alone, the weights that make up for what was rescaled around them."""
    return {
        f"{name}.weight": transform.references[name].to(linear_at(work.block, name).weight.dtype)
        for name in stage
        if name in transform.references
    }


def _sampled(walk: Iterator[Stage], samples: list[Tensor | None], num_tokens: int, size: int) -> Iterator[Stage]:
    """A walk that leaves a sample of each stage's inputs in `samples`, however much of them is looked at."""
    for number, (stage, inputs) in enumerate(walk):
        sample = TokenSample(num_tokens, size) if size else None
        passing = _passing(inputs, sample)
        yield stage, passing
        for _ in passing:
            pass
        samples[number] = sample.value() if sample else None


def _passing(inputs: Iterator[Tensor], sample: TokenSample | None) -> Iterator[Tensor]:
    for batch in inputs:
        if sample:
            sample.update(batch)
        yield batch


def _num_tokens(batches: Sequence[Tensor]) -> int:
    return sum(batch.shape[0] * batch.shape[1] for batch in batches)


def _rescaled(statistics: InputStatistics, scale_I: Tensor | None) -> InputStatistics:
    """The statistics of the same inputs divided by `scale_I`."""
    if scale_I is None:
        return statistics
    hessian_II, sample_TI, ranges = statistics.hessian_II, statistics.sample_TI, statistics.ranges
    return InputStatistics(
        hessian_II=None if hessian_II is None else hessian_II / scale_I / scale_I[:, None],
        sample_TI=None if sample_TI is None else sample_TI / scale_I,
        ranges=None
        if ranges is None
        else InputRanges(
            low_I=ranges.low_I / scale_I, high_I=ranges.high_I / scale_I, mean_abs_I=ranges.mean_abs_I / scale_I
        ),
    )


def _quantize_on_quantized_path(work: _Work, streams: _Streams | None, index: int) -> QuantizedBlock:
    """Stages are quantized as data reaches them; the streams move on with the quantized block's output."""
    if streams is None:
        raise AssertionError("the quantized path needs calibration activations")
    family, method, block = work.family, work.method, work.block
    linears: list[QuantizedLinear] = []

    def install(number: int, statistics: InputStatistics) -> None:
        for linear in _quantize_stage(work, number, statistics, BlockTransform()):
            module = linear_at(block, linear.name.removeprefix(work.prefix))
            decoded = linear.weight.decode().to(module.weight.dtype)
            module.weight = nn.Parameter(decoded, requires_grad=False)
            linears.append(linear)

    float_walk: Iterator[Stage] | None = None
    if streams.float_hidden is not None:  # a twin keeps the float weights while the block's own are replaced
        float_walk = walk_block(private_copy(block), family, streams.float_hidden, streams.arguments[index])
    # Not true-sequential: all statistics come from the float block; its output is dropped.
    hidden = streams.hidden if method.true_sequential else list(streams.hidden)
    pending: dict[int, InputStatistics] = {}
    for number, (stage, inputs) in enumerate(walk_block(block, family, hidden, streams.arguments[index])):
        # Before this stage runs: a weight that is not finite would spoil, and so blame, the inputs of the next.
        check_weights_finite(block, stage, work.prefix)
        float_inputs = next(float_walk)[1] if float_walk else None
        if work.leaves_alone(number):
            continue
        quantizer = _attach_activations(work, number)
        statistics = _collect(work, number, inputs, float_inputs, quantizer, _num_tokens(streams.hidden))
        if method.true_sequential:
            install(number, statistics)
        else:
            pending[number] = statistics
    for _ in float_walk or ():
        raise AssertionError("the float walk has more stages than the quantized one")
    if not method.true_sequential:
        for number, statistics in pending.items():
            install(number, statistics)
        run_block(block, family, streams.hidden, streams.arguments[index])
    return QuantizedBlock(linears=linears)


def _activation_quantizers(
    work: _Work, number: int, ranges: InputRanges | None
) -> tuple[ActivationQuantizer | None, ActivationQuantizer | None]:
    """How a stage's inputs and outputs are quantized."""
    grid = work.method.activations
    if grid is None:
        return None, None
    if ranges is not None:
        inputs = ActivationQuantizer.calibrated(grid, ranges.low_I, ranges.high_I)
    else:
        inputs = ActivationQuantizer(grid=grid)
    outputs = ActivationQuantizer(grid=grid) if number == 0 and work.method.quantized_outputs else None
    return inputs, outputs


def _attach_activations(work: _Work, number: int) -> ActivationQuantizer | None:
    """From here on the block quantizes this stage's activations as the finished model will."""
    inputs, outputs = _activation_quantizers(work, number, work.ranges(number))
    for name in work.family.stages[number]:
        quantize_activations(linear_at(work.block, name), inputs, outputs)
    return inputs


def _collect(
    work: _Work,
    number: int,
    inputs: Iterator[Tensor],
    float_inputs: Iterator[Tensor] | None,
    quantizer: ActivationQuantizer | None,
    num_tokens: int,
) -> InputStatistics:
    needs, name = work.method.needs, work.family.stages[number][0]
    weight = linear_at(work.block, name).weight
    hessian = Hessian(weight.shape[1], weight.device)
    drift = Drift(weight.shape[1], weight.device) if float_inputs is not None else None
    sample = TokenSample(num_tokens, needs.sample) if needs.sample else None
    for batch in inputs:
        seen = quantizer(batch) if quantizer else batch
        hessian.update(seen)
        if drift is not None and float_inputs is not None:
            drift.update(seen, next(float_inputs))
        if sample:
            sample.update(seen)
    statistics = InputStatistics(
        hessian_II=hessian.value(),
        drift_II=drift.value() if drift else None,
        sample_TI=sample.value() if sample else None,
        ranges=work.ranges(number),
    )
    if not torch.isfinite(statistics.require_hessian().diagonal()).all():
        raise NumericalError(f"the calibration inputs of {work.prefix}{name} hold NaN or infinity")
    return statistics


def _quantize_stage(
    work: _Work, number: int, statistics: InputStatistics, transform: BlockTransform
) -> list[QuantizedLinear]:
    started = time.perf_counter()
    stage = work.family.stages[number]
    method = work.method.of(work.prefix + stage[0])
    modules = [linear_at(work.block, name) for name in stage]
    references = [
        transform.references[name] if name in transform.references else module.weight.float()
        for name, module in zip(stage, modules, strict=True)
    ]
    targets = [transform.targets.get(name, reference) for name, reference in zip(stage, references, strict=True)]
    if method.fold > 0:
        targets = [fold_errors(weight, statistics, method.fold, method.fold_damping) for weight in targets]
    biases = [transform.dense.get(f"{name}.bias", module.bias) for name, module in zip(stage, modules, strict=True)]
    group = LinearGroup(
        names=stage,
        weights=targets,
        biases=[None if bias is None else bias.float() for bias in biases],
        statistics=statistics if method.needs.calibration else None,
    )
    try:
        outcome = method.quantize(group)
        inputs, outputs = _activation_quantizers(work, number, statistics.ranges)
    except QuantizationError as error:
        raise type(error)(f"{work.prefix}{' and '.join(stage)}: {error}") from error
    errors = [
        _relative_errors(reference, quantized.decode(), statistics)
        for reference, quantized in zip(references, outcome.weights, strict=True)
    ]
    seconds = (time.perf_counter() - started) / len(stage)
    return [
        QuantizedLinear(
            name=work.prefix + name,
            weight=quantized,
            inputs=inputs,
            outputs=outputs,
            input_scale_I=transform.input_scales.get(name),
            output_scale_O=transform.output_scales.get(name),
            weight_error=weight_error,
            output_error=output_error,
            damping=outcome.damping,
            seconds=seconds,
        )
        for name, quantized, (weight_error, output_error) in zip(stage, outcome.weights, errors, strict=True)
    ]


def _relative_errors(weight: Tensor, decoded: Tensor, statistics: InputStatistics) -> tuple[float, float | None]:
    """Of the weight, and of the outputs: by the Hessian where it is known, else on the sample of tokens."""
    difference = weight - decoded
    weight_error = _ratio(difference.square().sum(), weight.square().sum())
    hessian_II, sample_TI = statistics.hessian_II, statistics.sample_TI
    if hessian_II is not None:
        lost, whole = quadratic_form(difference, hessian_II), quadratic_form(weight, hessian_II)
    elif sample_TI is not None:
        lost, whole = (sample_TI @ difference.T).square().sum(), (sample_TI @ weight.T).square().sum()
    else:
        return weight_error, None
    return weight_error, _ratio(lost, whole)


def _ratio(error: Tensor, reference: Tensor) -> float:
    if reference.item() == 0:
        return 0.0 if error.item() == 0 else float("inf")
    return (error / reference).item()


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
    check_grids(method, linears_of(model))
