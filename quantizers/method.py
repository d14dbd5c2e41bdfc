"""What the engine asks of a method, and what it tells it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from quantizers.activations import ActivationGrid
from quantizers.block import Stage
from quantizers.errors import QuantizationError
from quantizers.families import Family, fused_groups
from quantizers.grid import Grid
from quantizers.quantized_weight import QuantizedWeight
from quantizers.statistics import InputRanges, InputStatistics
from quantizers.uniform_weight import UniformWeight, stored_bytes

PATHS = ("quantized", "float")
ALL_TOKENS = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method wants to know of the calibration inputs of the linears of a stage.

    Args:
        hessian: `InputStatistics.hessian_II`.
        drift: `InputStatistics.drift_II`; the float model then runs beside the quantized one.
        sample: about how many tokens `InputStatistics.sample_TI` holds (`ALL_TOKENS` for all); 0 is no sample.
        ranges: `InputStatistics.ranges`, of the float model.
        block: the float block with its inputs, to run it as often as the method likes (see `Method.transform`).
        windows: on the float path, on about how many calibration windows `block` and `sample` look; 0 is all.
            `ranges` and `hessian` are always of all.
    """

    hessian: bool = False
    drift: bool = False
    sample: int = 0
    ranges: bool = False
    block: bool = False
    windows: int = 0

    def stride(self, windows: int) -> int:
        """On the float path, every how-manieth of so many calibration windows is looked at."""
        return max(1, windows // self.windows) if self.windows else 1

    @property
    def calibration(self) -> bool:
        """Whether calibration data must be there at all."""
        return self.hessian or self.drift or self.sample > 0 or self.ranges or self.block


@dataclass(frozen=True, kw_only=True)
class LinearGroup:
    """The linears of one stage: they share their input.

    Args:
        names: within the block.
        weights: finite float32 [O, I] targets with equal I.
        biases: [O] or None, one per weight.
        statistics: of the shared input; None where the method has no `needs`.
    """

    names: Sequence[str]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    statistics: InputStatistics | None = None

    @classmethod
    def of(cls, weights: Sequence[Tensor], statistics: InputStatistics | None = None) -> LinearGroup:
        """Nameless linears without biases."""
        names = [f"linear {index}" for index in range(len(weights))]
        return cls(names=names, weights=weights, biases=[None] * len(weights), statistics=statistics)


@dataclass(frozen=True, kw_only=True)
class MethodOutcome:
    """What a method made of the linears of one stage.

    Args:
        weights: one per linear, in the order given.
        damping: the rung of the damping ladder that factorized; None where nothing was factorized.
    """

    weights: Sequence[QuantizedWeight]
    damping: float | None = None


@dataclass(frozen=True, kw_only=True)
class FloatBlock:
    """A decoder block with its float weights, a private copy that may be run and changed.

    Args:
        prefix: of its linears' full names, with its dot.
        walk: the block's stages with their inputs, see `block.walk_block`; may be walked once, before anything is
            changed. Empty unless `needs.block` or `needs.sample`.
        arguments: the block's keyword arguments (mask, positions) per batch of the walk.
        ranges: of each stage's inputs, in the order of `family.stages`.
    """

    block: nn.Module
    prefix: str
    family: Family
    walk: Iterator[Stage]
    arguments: Sequence[Mapping[str, Any]]
    ranges: Sequence[InputRanges]


@dataclass(frozen=True, kw_only=True)
class BlockTransform:
    """A block rewritten before it is quantized, such that it computes the same.

    Args:
        references: linear -> float32 weight that computes, on the rewritten block's inputs, what the original did.
        targets: linear -> float32 weight to quantize, where it differs from the reference (clipped).
        dense: parameter or module-less name within the block ("input_layernorm.weight", "self_attn.v_proj.bias") ->
            its new value in the model's dtype. Part of the artifact.
        input_scales: linear -> float32 [I] by which its inputs are now divided; ones where left out.
        output_scales: linear -> float32 [O] by which its outputs are now divided; likewise.
    """

    references: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    input_scales: Mapping[str, Tensor] = field(default_factory=dict)
    output_scales: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A quantization method with its options: a frozen dataclass, no tensors, devices, logs or IO.

    A subclass adds its own options as fields with defaults, names itself, and says how to `quantize`. The options
    here are every method's; the engine's other questions are answered as most methods answer them.

    Args:
        grid: bits, groups and convention of the weights.
        activations: the grid of the linears' inputs; None leaves activations alone.
        layers: pattern of linears' full names (`*.mlp.down_proj`) -> their own grid, or None, which leaves them alone,
            inputs and all; the first that fits counts. Linears that share their input share their grid, as servers keep
            them in one matrix.
        fold: strength of error folding (QEP, see `folding.py`), 0 (off) to 1.
        fold_damping: fraction of the mean Hessian diagonal added before solving for the fold.
        path: which inputs calibrate a block: `quantized`, what the quantized blocks before it put out, or `float`,
            what the float ones do. The latter does not depend on bits, so that its statistics are shared by cells.
    """

    grid: Grid
    activations: ActivationGrid | None = None
    layers: tuple[tuple[str, Grid | None], ...] = ()
    fold: float = 0.0
    fold_damping: float = 1.0
    path: str = "quantized"

    name: ClassVar[str]
    # Changes whenever the same input gives another output; part of a job's identity.
    code_version: ClassVar[str]
    # What `as_published` and `corrected` set, where paper and released code differ (see docs/methods.md).
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"corrected": {}, "as_published": {}}
    default_convention: ClassVar[str] = "gptq-asym"
    weight_bits: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6, 7, 8)
    encoding: ClassVar[str] = UniformWeight.encoding  # of the weights that `quantize` returns
    # Whether all that `transform` rewrites is said by its input and output scales, so that a linear of one artifact can
    # stand among those of others (`rescaling.RestoredWeight`).
    only_rescales: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            QuantizationError: a value outside its rule.
        """
        if not 0 <= self.fold <= 1:
            raise QuantizationError(f"options.fold = {self.fold} must be from 0 to 1")
        if not 0 < self.fold_damping < math.inf:
            raise QuantizationError(f"options.fold_damping = {self.fold_damping} must be above 0 and finite")
        if self.path not in PATHS:
            raise QuantizationError(f"options.path = {self.path!r} is none of {', '.join(PATHS)}")
        if self.fold > 0 and self.path == "float":
            raise QuantizationError("options.fold corrects earlier layers' errors, which path: float does not see")
        if self.grid.bits not in self.weight_bits:
            raise QuantizationError(
                f"weight_bits = {self.grid.bits}: {self.name} is defined for {_listed(self.weight_bits)}"
            )

    def of(self, linear: str) -> Self:
        """The method for one linear, by its full name without ".weight": with that linear's own grid.

        Raises:
            QuantizationError: it is left alone.
        """
        if not self.layers:
            return self
        grid = self._grid_of(linear)
        if grid is None:
            raise QuantizationError(f"{linear} is left alone")
        return replace(self, grid=grid, layers=())

    def leaves_alone(self, linear: str) -> bool:
        """Whether a linear, by its full name, stays as it is."""
        return self._grid_of(linear) is None

    def grids_differ(self, linear: str, other: str) -> bool:
        """Whether two linears have different grids, or one of them alone is left alone."""
        return self._grid_of(linear) != self._grid_of(other)

    def _grid_of(self, linear: str) -> Grid | None:
        return next((grid for pattern, grid in self.layers if fnmatchcase(linear, pattern)), self.grid)

    @property
    def needs(self) -> Needs:
        """Folding needs the Hessian and the drift; static activation scales need ranges."""
        static = self.activations is not None and self.activations.static
        return Needs(hessian=self.fold > 0, drift=self.fold > 0, ranges=static)

    @property
    def true_sequential(self) -> bool:
        """Whether a stage sees the quantized weights of the earlier stages of its own block."""
        return True

    @property
    def quantized_outputs(self) -> bool:
        """Whether the outputs of the first stage (q, k and v) are quantized like the inputs are."""
        return False

    def stores_column_groups(self, in_features: int) -> bool:
        """Whether its artifacts of such linears carry a group index per column."""
        del in_features
        return False

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes that a linear of this shape will take, with its static activation scale and zero (float32)."""
        static = self.activations is not None and self.activations.static
        return self.weight_bytes(out_features, in_features) + (8 if static else 0)

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes that a weight of this shape will take; what depends on its values is estimated."""
        permuted = self.stores_column_groups(in_features)
        return stored_bytes(self.grid, out_features, in_features, permuted=permuted)

    def transform(self, block: FloatBlock) -> BlockTransform:
        """Rewrite a float block, once, before its linears are quantized (SmoothQuant's and AWQ's scales). For methods
        on the float path; by default nothing is rewritten."""
        del block
        return BlockTransform()

    @abstractmethod
    def quantize(self, group: LinearGroup) -> MethodOutcome:
        """Quantize the linears of one stage.

        Raises:
            QuantizationError: they cannot be quantized; the engine adds their names.
        """


def _listed(bits: Sequence[int]) -> str:
    return f"{bits[0]} to {bits[-1]} bits" if len(bits) > 1 else f"{bits[0]} bit"


def total_stored_bytes(method: Method, linears: Mapping[str, tuple[int, int]]) -> int:
    """Bytes that a model's linears will take in an artifact, without those that are left alone.

    Args:
        linears: full name -> (out_features, in_features).
    """
    return sum(
        method.of(name).stored_bytes(rows, columns)
        for name, (rows, columns) in linears.items()
        if not method.leaves_alone(name)
    )


def check_grids(method: Method, linears: Mapping[str, tuple[int, int]], *, of: str = "") -> None:
    """Raise unless every linear's grid fits it, and linears that share their input share their grid.

    Args:
        linears: full name -> (out_features, in_features), in order.
        of: what to say after a linear's name.
    Raises:
        QuantizationError: names the linear, and what would fit; or the pattern that names no linear; or nothing is
            left to quantize.
    """
    for pattern, _ in method.layers:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise QuantizationError(
                f"layers: {pattern!r} names no linear; full names are like {next(iter(linears))!r}, and * stands for "
                "any part of one"
            )
    if linears and all(method.leaves_alone(name) for name in linears):
        raise QuantizationError("layers: every linear is left alone, so that nothing is quantized")
    for group in fused_groups(linears):
        for name in group:
            if not method.leaves_alone(name):
                method.of(name).grid.check_fits(linears[name][1], name + of)
            if method.grids_differ(name, group[0]):
                raise QuantizationError(
                    f"layers: {group[0]} and {name} share their input and must share their grid, since servers keep "
                    "them in one matrix; name them all"
                )
