"""Why a model's perplexity is not finite: the first module that breaks, and what other dtypes make of the same weights.

One window is run once per dtype under hooks that look at what enters and leaves every module. Shape letters: T tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evaluators.errors import EvaluationError
from evaluators.head import hidden_states, split, token_log_probabilities
from evaluators.perplexity import perplexity

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FINITE = "finite"
OVERFLOW = "overflow_of_dtype"
NAN_IN_WEIGHTS = "nan_in_weights"
NAN_IN_SCALE = "nan_in_scale"
UNKNOWN = "kernel/unknown"
CATEGORIES = (FINITE, OVERFLOW, NAN_IN_WEIGHTS, NAN_IN_SCALE, UNKNOWN)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WIDE = ("bfloat16", "float32")

# Where in a module: in a hook on its inputs (quantized activations), in the module itself, in a hook on its outputs.
INPUT_HOOK, MODULE, OUTPUT_HOOK = "input hook", "module", "output hook"


@dataclass(frozen=True, kw_only=True)
class Break:
    """The first module to finish whose outputs are not finite although its inputs were.

    A module that holds others stands here when the break is in its own arithmetic: a decoder block for its residual
    sum, an MLP for the product of gate and up, an attention for its scores.

    Attributes:
        module: its dotted name in the model.
        kind: its class.
        block: index of the decoder block it is in; None outside of them (embeddings, final norm, head).
        where: `INPUT_HOOK`, `MODULE` or `OUTPUT_HOOK`.
        num_nan: NaNs in its outputs.
        num_inf: infinities in its outputs.
        largest_input: largest magnitude that entered it (0 where only token ids did).
        weights_finite: whether its own parameters are, in the dtype of the run.
    """

    module: str
    kind: str
    block: int | None
    where: str
    num_nan: int
    num_inf: int
    largest_input: float
    weights_finite: bool


@dataclass(frozen=True, kw_only=True)
class Run:
    """One window in one dtype.

    Attributes:
        finite: whether its loss is. Where it is not although no module broke, the loss itself overflowed.
        nll: mean negative log-likelihood (nats) of its T - 1 predicted tokens; None where it is not finite.
        first_break: None where no module broke.
        block_magnitudes: largest finite magnitude of the residual stream after each decoder block; None after a
            block that left nothing finite.
        module_magnitudes: module -> largest finite magnitude that entered or left it. Not part of the record.
        error: why the run was not possible (not finite then); None where it was.
    """

    finite: bool
    nll: float | None = None
    first_break: Break | None = None
    block_magnitudes: Sequence[float | None] = ()
    module_magnitudes: dict[str, float] = field(default_factory=dict, repr=False)
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The forensic record of a model.

    Attributes:
        category: `FINITE`, this run was, so what was seen before is not repeatable (or only exp(nll) overflowed);
            `NAN_IN_WEIGHTS`, the breaking module's own parameters hold NaN or infinity;
            `NAN_IN_SCALE`, a hook that quantizes activations made finite values non-finite, and does so in bfloat16
            and float32 too;
            `OVERFLOW`, the dtype's range is too small: the model's is float16 and bfloat16 is finite, or float32 is
            finite and passed the dtype's largest number at the breaking module;
            `UNKNOWN`, none of these: a kernel, or something that the record does not explain.
        dtype: of the model.
        window: index of the window that was run.
        dtype_max: the largest finite number of the model's dtype.
        float32_magnitude: largest finite magnitude in the float32 run that entered or left the breaking module or
            a module inside it; None where nothing broke or there is no such run.
        runs: dtype -> its run; the model's own dtype is among them.
    """

    category: str
    dtype: str
    window: int
    dtype_max: float
    float32_magnitude: float | None
    runs: dict[str, Run]

    @property
    def own(self) -> Run:
        """The run in the model's dtype."""
        return self.runs[self.dtype]

    @property
    def agree(self) -> bool:
        """Whether all runs that were possible are finite, or none is."""
        return len({run.finite for run in self.runs.values() if run.error is None}) == 1

    def as_json(self) -> dict[str, Any]:
        """JSON values, without NaN or infinity; the own run's findings stand at the top too."""
        runs = {dtype: dataclasses.asdict(run) for dtype, run in self.runs.items()}
        for run in runs.values():
            del run["module_magnitudes"]
            run["block_magnitudes"] = list(run["block_magnitudes"])
        return {
            "category": self.category,
            "dtype": self.dtype,
            "window": self.window,
            "dtype_max": self.dtype_max,
            "float32_magnitude": self.float32_magnitude,
            "agree": self.agree,
            "first_break": runs[self.dtype]["first_break"],
            "block_magnitudes": runs[self.dtype]["block_magnitudes"],
            "runs": runs,
        }


@torch.inference_mode()
def examine(
    model: Any,
    windows: npt.NDArray[np.int64],
    *,
    window_nlls: Sequence[float] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Examination:
    """Find out where and why a model's loss is not finite.

    The model is left as it was: other dtypes run on a copy (hooks included), one at a time. A copy takes the bytes
    of the model in that dtype on the model's device, float32 twice those of a 16-bit model: leave it out of `dtypes`
    where that does not fit (a device that runs out of memory is a run with an `error`; a host that does is not).
    Only parameters are cast; buffers, such as rotary frequencies, keep their dtype, as when a model is loaded.

    Args:
        model: a transformers causal language model in evaluation mode; its linears may carry hooks that quantize
            activations.
        windows: int64 [W, T] as `perplexity` takes them.
        window_nlls: `PerplexityResult.window_nlls` of these windows, which saves looking for a window that breaks.
        dtypes: to run beside the model's own.

    Returns:
        The record of the first window whose loss is not finite (of the one with the largest loss if all are).

    Raises:
        EvaluationError: the model cannot be split into decoder and head, or has no list of decoder blocks;
            `window_nlls` are of other windows.
    """
    blocks = _blocks(model)
    if window_nlls is None:
        window_nlls = _losses(model, windows)
    elif len(window_nlls) != len(windows):
        raise EvaluationError(f"{len(window_nlls)} window_nlls for {len(windows)} windows: give those of the windows")
    window = next((index for index, nll in enumerate(window_nlls) if not math.isfinite(nll)), None)
    if window is None:
        window = max(range(len(windows)), key=lambda index: window_nlls[index])
    ids_BT = torch.tensor(windows[window : window + 1])

    own = model.dtype
    runs = {_name(own): _run(model, ids_BT, blocks)}
    for dtype in dtypes:
        if dtype != own:
            runs[_name(dtype)] = _run_in(dtype, model, ids_BT, blocks)
    magnitude = _float32_magnitude(runs, runs[_name(own)].first_break)
    return Examination(
        category=_category(own, runs, magnitude),
        dtype=_name(own),
        window=window,
        dtype_max=torch.finfo(own).max,
        float32_magnitude=magnitude,
        runs=runs,
    )


def _category(own: torch.dtype, runs: dict[str, Run], float32_magnitude: float | None) -> str:
    run = runs[_name(own)]
    if run.finite:
        return FINITE
    broke = run.first_break
    if broke is not None and broke.where == MODULE and not broke.weights_finite:
        return NAN_IN_WEIGHTS
    # bfloat16 and float32 have the same range, so that what overflows in one overflows in the other.
    wide = {dtype: runs[dtype] for dtype in _WIDE if dtype in runs and runs[dtype].error is None}
    if own == torch.float16 and "bfloat16" in wide and wide["bfloat16"].finite:
        return OVERFLOW
    if "float32" in wide and wide["float32"].finite:
        too_large = float32_magnitude is not None and float32_magnitude > torch.finfo(own).max
        return OVERFLOW if too_large else UNKNOWN
    in_hooks = [found.first_break is not None and found.first_break.where != MODULE for found in (run, *wide.values())]
    return NAN_IN_SCALE if wide and all(in_hooks) else UNKNOWN


def _float32_magnitude(runs: dict[str, Run], broke: Break | None) -> float | None:
    wide = runs.get(_name(torch.float32))
    if wide is None or wide.error is not None or broke is None:
        return None
    inside = f"{broke.module}."
    return max(
        (value for name, value in wide.module_magnitudes.items() if name == broke.module or name.startswith(inside)),
        default=None,
    )


def _run_in(dtype: torch.dtype, model: Any, ids_BT: Tensor, blocks: str) -> Run:
    try:
        return _run(_cast_copy(model, dtype), ids_BT, blocks)
    except (RuntimeError, EvaluationError) as error:  # out of device memory; a dtype that the device lacks
        return Run(finite=False, error=str(error).strip().splitlines()[0])


def _run(model: Any, ids_BT: Tensor, blocks: str) -> Run:
    parts = split(model)
    watch = _Watch(model, blocks)
    with watch.hooked():
        hidden_NH = hidden_states(parts, ids_BT)[:, :-1].flatten(0, 1)
        log_probabilities, _ = token_log_probabilities(parts, hidden_NH, ids_BT[:, 1:].flatten())
    nll = -log_probabilities.cpu().double().mean().item()  # not every device has float64
    return Run(
        finite=math.isfinite(nll),
        nll=nll if math.isfinite(nll) else None,
        first_break=watch.first_break,
        block_magnitudes=watch.block_magnitudes,
        module_magnitudes=watch.module_magnitudes,
    )


def _losses(model: Any, windows: npt.NDArray[np.int64]) -> list[float]:
    """Losses of the windows, up to the first that is not finite."""
    losses: list[float] = []
    for index in range(len(windows)):
        losses += perplexity(model, windows[index : index + 1]).window_nlls
        if not math.isfinite(losses[-1]):
            break
    return losses


def _cast_copy(model: Any, dtype: torch.dtype) -> Any:
    """A copy with its parameters in another dtype; they are cast as they are copied, so there is no third set."""
    casts: dict[int, Any] = {}  # deepcopy's memo: what is already copied, by id
    for parameter in model.parameters():  # tied ones come once, and stay tied
        if parameter.is_floating_point():
            casts[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    return copy.deepcopy(model, casts)


def _blocks(model: Any) -> str:
    """Dotted name of the list of decoder blocks."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return str(name)
    raise EvaluationError(f"{type(model).__name__} has no list of {count} decoder blocks: not supported yet")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Watch:
    """Looks at what enters and leaves every module, before and after the hooks that it carries itself."""

    def __init__(self, model: nn.Module, blocks: str) -> None:
        self._modules = {name: module for name, module in model.named_modules() if name}
        self._blocks = f"{blocks}."
        self._entered: dict[str, tuple[bool, float]] = {}
        self._after_input_hooks: dict[str, bool] = {}
        self._before_output_hooks: dict[str, bool] = {}
        self.first_break: Break | None = None
        self.block_magnitudes: list[float | None] = []
        self.module_magnitudes: dict[str, float] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch while inside; no hook of ours is left behind."""
        handles: list[Any] = []
        try:
            for name, module in self._modules.items():
                handles += self._hook(name, module)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, module: nn.Module) -> list[Any]:
        # Ours are the outermost and the innermost, so that what the module's own hooks do can be told from what it
        # does itself.
        def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = _inputs(args, kwargs)
            self._entered[name] = (_finite(tensors), _magnitude(tensors) or 0.0)

        def starting(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._after_input_hooks[name] = _finite(_inputs(args, kwargs))

        def finished(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            self._before_output_hooks[name] = _finite(_tensors(output))

        def leaving(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            self._left(name, module, _tensors(output))

        return [
            module.register_forward_pre_hook(entering, with_kwargs=True, prepend=True),
            module.register_forward_pre_hook(starting, with_kwargs=True),
            module.register_forward_hook(finished, with_kwargs=True, prepend=True),
            module.register_forward_hook(leaving, with_kwargs=True),
        ]

    def _left(self, name: str, module: nn.Module, outputs: list[Tensor]) -> None:
        inputs_finite, largest_input = self._entered[name]
        magnitude = _magnitude(outputs)
        known = self.module_magnitudes.get(name, 0.0)
        self.module_magnitudes[name] = max(known, largest_input, magnitude or 0.0)
        if name.startswith(self._blocks) and "." not in name.removeprefix(self._blocks):
            self.block_magnitudes.append(magnitude)
        if self.first_break is None and inputs_finite and not _finite(outputs):
            self.first_break = Break(
                module=name,
                kind=type(module).__name__,
                block=self._block_of(name),
                where=self._where(name),
                num_nan=sum(int(tensor.isnan().sum()) for tensor in outputs),
                num_inf=sum(int(tensor.isinf().sum()) for tensor in outputs),
                largest_input=largest_input,
                weights_finite=_finite(list(module.parameters(recurse=False))),
            )

    def _where(self, name: str) -> str:
        if not self._after_input_hooks[name]:
            return INPUT_HOOK
        return OUTPUT_HOOK if self._before_output_hooks[name] else MODULE

    def _block_of(self, name: str) -> int | None:
        if not name.startswith(self._blocks):
            return None
        return int(name.removeprefix(self._blocks).split(".")[0])


def _inputs(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """What goes through the arithmetic: masks hold minus infinity on purpose."""
    return _tensors([args, {name: value for name, value in kwargs.items() if "mask" not in name}])


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in a module's inputs or outputs."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    if isinstance(value, dict):  # transformers' outputs are
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _magnitude(tensors: Sequence[Tensor]) -> float | None:
    """The largest finite magnitude; None where there is none."""
    found = []
    for tensor in tensors:
        magnitudes = torch.where(tensor.isfinite(), tensor.abs(), -1.0).amax().item()
        if magnitudes >= 0:
            found.append(float(magnitudes))
    return max(found, default=None)
