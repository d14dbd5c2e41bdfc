"""How much memory jobs take at their peak and how much disk a sweep takes, from shapes alone. Pure.

The terms are what a worker holds at once: the float model (memory-mapped, so on a processor its pages count once they
are read), beside it the weights decoded from an artifact (the originals stay to be put back), activations of a batch,
a chunk of logits; while quantizing the block at work, its Hessians and their factorization in float64 on the host, and
the calibration activations. Letters: I in_features, O out_features, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evaluators.head import CHUNK_BYTES
from orchestrator.config import PerplexityConfig
from orchestrator.work import decoder_weights, hidden_size, num_blocks, stage_inputs, windows_looked_at

if TYPE_CHECKING:
    from orchestrator.inputs import Inputs
    from orchestrator.models.loading import ModelShape
    from orchestrator.plan import Job
    from orchestrator.scheme import Scheme
    from quantizers.method import Method

# Python with torch, transformers, Ray and what their allocators keep; measured, as is the next, by
# `python -m tests.benchmarks openpangu`.
PROCESS_BYTES = 0.75e9
# float32 copies of the weights at work that rounding, decoding and measuring their errors hold at once.
_TEMPORARIES = 8
# Of a task: the most tokens that are packed into one pass (evaluators.scorer).
_TASK_TOKENS = 4096
_CALIBRATION_BATCH = 4096
_F32, _F64 = 4, 8


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a sweep needs of a worker and of the disk.

    Args:
        host_bytes: the most of a worker's process.
        device_bytes: the most of its accelerator; None where it computes on the processor.
        largest_job: the label of the job that needs most.
        artifact_bytes: of all cells together.
        cache_bytes: of statistics of the float models, in each node's cache or the shared one.
    """

    host_bytes: float
    device_bytes: float | None
    largest_job: str
    artifact_bytes: float
    cache_bytes: float


@dataclass(frozen=True, kw_only=True)
class _Need:
    """Of one job: where it computes, and on the host beside that."""

    compute: float
    host: float = 0.0


def footprint(jobs: Sequence[Job], inputs: Inputs, kind: str) -> Footprint:
    """The needs of a plan.

    Args:
        kind: of device, as in the sweep file.
    """
    on_host = kind in {"cpu", "simulated-npu"}
    found, needs = peaks(jobs, inputs, kind), _needs(jobs, inputs)
    largest = max(jobs, key=lambda job: found[job.id])
    # Beside an accelerator weights pass through the page cache on their way, which gives way.
    beside = PROCESS_BYTES + max(need.host for need in needs)
    return Footprint(
        host_bytes=found[largest.id] if on_host else beside,
        device_bytes=None if on_host else found[largest.id],
        largest_job=largest.label,
        artifact_bytes=_artifact_bytes(jobs, inputs),
        cache_bytes=_cache_bytes(jobs, inputs),
    )


def peaks(jobs: Sequence[Job], inputs: Inputs, kind: str) -> Mapping[str, float]:
    """Job id -> peak bytes of the place where it is measured: the accelerator, or the worker's process.

    A worker that has evaluated a cell keeps its weights; so the first quantizing job of a model finds none, and the
    others may.

    Args:
        jobs: all of the plan, in its order.
        kind: of device, as in the sweep file.
    """
    on_host, found = kind in {"cpu", "simulated-npu"}, {}
    seen: set[str] = set()
    for job, need in zip(jobs, _needs(jobs, inputs), strict=True):
        found[job.id] = PROCESS_BYTES + need.compute + need.host if on_host else need.compute
        if job.kind == "quantize":
            if job.cell.model in seen:
                found[job.id] += decoder_bytes(inputs.models[job.cell.model].shape)
            seen.add(job.cell.model)
    return found


def _needs(jobs: Sequence[Job], inputs: Inputs) -> list[_Need]:
    """Of each job; a plan has hundreds of thousands, and few that differ in their needs."""
    alike: dict[Hashable, _Need] = {}
    found = []
    for job in jobs:
        cell = job.cell
        kind = (cell.model, id(cell.scheme), id(cell.calibration), id(job.evaluation))
        if kind not in alike:
            alike[kind] = _need(job, inputs)
        found.append(alike[kind])
    return found


def _need(job: Job, inputs: Inputs) -> _Need:
    cell, shape = job.cell, inputs.models[job.cell.model].shape
    if job.evaluation is not None:
        windows = inputs.windows.get((cell.model, job.evaluation.key))
        tokens = _TASK_TOKENS if windows is None else windows.shape[1]
        divergence = isinstance(job.evaluation, PerplexityConfig) and job.evaluation.divergence
        compute = evaluate_bytes(shape, tokens, quantized=cell.scheme is not None, heads=1 + divergence)
        return _Need(compute=compute + _matrix_bytes(cell.scheme, shape))
    if cell.scheme is None:
        raise AssertionError("the unquantized model is not quantized")
    calibration = cell.calibration
    size = (0, 0) if calibration is None else inputs.calibrations[cell.model, calibration.key].shape
    need = quantize_need(shape, cell.scheme.build(), size[0], size[1])
    return replace(need, compute=need.compute + _matrix_bytes(cell.scheme, shape))


def _matrix_bytes(scheme: Scheme | None, shape: ModelShape) -> float:
    """The largest quantized matrix over the vocabulary: decoded in float32, beside one in the model's dtype."""
    roles = scheme.vocabulary() if scheme else ()
    largest = max((math.prod(shape.matrices[role].shape) for role in roles), default=0)
    return largest * (_F32 + shape.bits_per_value / 8)


def evaluate_bytes(shape: ModelShape, tokens: int, *, quantized: bool, heads: int = 1) -> float:
    """Measuring: the model, decoded weights beside it, a pass over `tokens`, and logits of a chunk in three forms."""
    largest = max(rows * columns for rows, columns in shape.linears.values())
    decoded = decoder_bytes(shape) + _TEMPORARIES * _F32 * largest if quantized else 0.0
    return shape.fp_bytes + decoded + activation_bytes(shape, tokens) + 3 * heads * CHUNK_BYTES


def quantize_need(shape: ModelShape, method: Method, samples: int, length: int) -> _Need:
    """Quantizing block by block, beside a model that is there from evaluating."""
    from quantizers.stream import walks

    needs, width = method.needs, shape.bits_per_value // 8
    block = decoder_bytes(shape) / num_blocks(shape)
    stacked = max(_stage_weights(shape))
    compute = block + _TEMPORARIES * _F32 * stacked
    host = 0.0
    widest = max(stage_inputs(shape))
    if samples and walks(method):
        looked_at = windows_looked_at(method, samples)
        streams = 1 + needs.drift
        compute += streams * looked_at * length * (hidden_size(shape) + widest) * width
        compute += activation_bytes(shape, min(_CALIBRATION_BATCH, looked_at * length))
    if needs.hessian:
        compute += (2 + 2 * needs.drift) * _F32 * widest**2
        if getattr(method, "factorization", "host") == "host":
            host = 3 * _F64 * widest**2
        else:
            compute += 2 * _F32 * widest**2
    return _Need(compute=shape.fp_bytes + compute, host=host)


def activation_bytes(shape: ModelShape, tokens: int) -> float:
    """What is alive of a pass over so many tokens at the widest place, the MLP: gate, up and their product."""
    widest = max(stage_inputs(shape))
    return tokens * (3 * widest + 4 * hidden_size(shape)) * shape.bits_per_value // 8


def decoder_bytes(shape: ModelShape) -> float:
    """Of the linears of all blocks, in the model's dtype."""
    return decoder_weights(shape) * shape.bits_per_value / 8


def _stage_weights(shape: ModelShape) -> list[int]:
    """Weights of each stage's linears together."""
    from quantizers.families import fused_groups

    return [
        sum(rows * columns for rows, columns in (shape.linears[name] for name in group))
        for group in fused_groups(shape.linears)
    ]


def _artifact_bytes(jobs: Sequence[Job], inputs: Inputs) -> float:
    from quantizers.method import total_stored_bytes
    from quantizers.vocabulary import vocabulary_bytes

    sizes: dict[tuple[str, int], int] = {}
    total = 0
    for job in jobs:
        scheme = job.cell.scheme
        if job.evaluation is not None or scheme is None:
            continue
        key = (job.cell.model, id(scheme))
        if key not in sizes:
            shape = inputs.models[job.cell.model].shape
            sizes[key] = total_stored_bytes(scheme.build(), shape.linears)
            sizes[key] += vocabulary_bytes(scheme.vocabulary(), shape.matrices)
        total += sizes[key]
    return float(total)


def _cache_bytes(jobs: Sequence[Job], inputs: Inputs) -> float:
    """Statistics of each model and calibration that cells share: ranges, and Hessians where they are asked for."""
    from quantizers.stream import needs_shared, shares_hessians

    found: dict[tuple[str, str, bool], float] = {}
    looked_at: set[tuple[str, int, str]] = set()
    for job in jobs:
        cell = job.cell
        if job.evaluation is not None or cell.scheme is None or cell.calibration is None:
            continue
        kind = (cell.model, id(cell.scheme), cell.calibration.key)
        if kind in looked_at:
            continue
        looked_at.add(kind)
        method = cell.scheme.build()
        if needs_shared(method):
            hessians = shares_hessians(method)
            inputs_of = stage_inputs(inputs.models[cell.model].shape)
            size = sum(_F32 * (3 * columns + (columns**2 if hessians else 0)) for columns in inputs_of)
            found[cell.model, cell.calibration.key, hessians] = float(size)
    return sum(found.values())
