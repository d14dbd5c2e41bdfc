"""A stand-in for an Ascend NPU: real values on the host, the rules of the device, and a record of every operator.

A tensor "on the device" is a wrapper around one on the host that says it is elsewhere, so code that forgets to move a
tensor fails here as it would there: only what is copied may cross, `numpy()` refuses, and factories are followed by the
device they are asked for. Each operator then goes the way that torch's dispatcher would send it, by the table of the
kernels that torch_npu registers (`torch_npu-2.13.0.json`):

1. a kernel of torch_npu: recorded with the dtypes of its tensors, computed on the host;
2. none, but torch composes it of other operators for every backend: that composition runs, and its parts come here;
3. none at all: torch_npu would compute it on the host, with a warning in the log. That is a finding.

Everything runs in inference mode, where operators arrive here before anything takes them apart, as scaled dot-product
attention, which torch_npu has whole. What this cannot see: whether a kernel takes the dtypes and shapes it is given.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TABLE = HERE / "torch_npu-2.13.0.json"
DEVICE = torch.device("privateuseone:0")

# Of these the dispatcher takes the first that an operator has, where the backend brings no kernel of its own.
_COMPOSITES = (
    DispatchKey.CompositeExplicitAutogradNonFunctional,
    DispatchKey.CompositeExplicitAutograd,
    DispatchKey.CompositeImplicitAutograd,
)

# They make a new header for the same memory, in C++ and for every backend: no kernel, and nothing to compute.
_HEADERS = frozenset({"aten::detach", "aten::alias", "aten::lift_fresh", "aten::view.dtype", "aten::_unsafe_view"})

# The operators that may be given tensors of host and device at once.
_COPIES = frozenset({"aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_copy_from_and_resize"})


@cache
def registered_kernels() -> frozenset[str]:
    """Names of the ATen operators, with overloads, that torch_npu has kernels for: "aten::add.Tensor"."""
    return frozenset(json.loads(TABLE.read_text(encoding="utf-8"))["kernels"])


@cache
def _declared() -> None:
    """Tell torch, once, that the backend exists; nothing says that a device is there."""
    from torch.utils.backend_registration import _DummyDeviceGuard

    module = ModuleType("torch.privateuseone")
    module.is_available = lambda: False
    module.is_initialized = lambda: True
    module.device_count = lambda: 0
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda _: None
    module._lazy_init = lambda: None
    torch._register_device_module("privateuseone", module)
    guard = _DummyDeviceGuard()
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    _declared.guard = guard  # torch keeps no reference of its own


class DeviceTensor(Tensor):
    """What is on the device: shape, strides and dtype of `held`, which has the values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        with torch.inference_mode(False):
            made = Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=DEVICE,
            )
        made.held = held
        return made

    def tolist(self) -> Any:
        """As a device tensor does it: copied to the host first. Torch's own refuses every subclass."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on a device tensor outside of its stand-in")


@dataclass(frozen=True)
class Use:
    """An operator as it was called.

    Args:
        operator: its name with the overload: "aten::add.Tensor".
        dtypes: (argument, dtype) of its tensors on the device, in order; results stand under the argument "->".
    """

    operator: str
    dtypes: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.operator}({', '.join(f'{name}: {dtype}' for name, dtype in self.dtypes)})"


@dataclass
class Record:
    """What ran on the device, and for each use the first place in our code that it was called from.

    Args:
        kernels: by kernels of torch_npu.
        missing: by no kernel.
        composed: operators that torch composed of others.
        strangers: sentences about host tensors that were given to the device; each raised an error too, but who calls
            may expect errors of a device and swallow them.
    """

    kernels: dict[Use, str] = field(default_factory=dict)
    missing: dict[Use, str] = field(default_factory=dict)
    composed: set[str] = field(default_factory=set)
    strangers: list[str] = field(default_factory=list)


class StandIn(TorchDispatchMode):
    """While it is entered, operators on `DEVICE` run as on an NPU and are recorded.

    Attributes:
        record: what was seen.
    """

    def __init__(self, kernels: frozenset[str] | None = None) -> None:
        """Take the operators that have kernels; those of torch_npu are the default."""
        super().__init__()
        _declared()
        self.record = Record()
        self._kernels = registered_kernels() if kernels is None else kernels
        self._entered: list[ExitStack] = []

    def __enter__(self) -> Self:
        """Route operators here; `torch.tensor` makes a host tensor first and then moves it, so that it is seen."""
        undo = ExitStack()
        undo.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        undo.enter_context(torch.inference_mode())
        self._entered.append(undo)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        """Undo it."""
        super().__exit__(*raised)
        self._entered.pop().close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = [*_leaves(args), *_leaves([*kwargs.values()])]
        tensors = [value for value in values if isinstance(value, Tensor)]
        name = func.name()
        asked = next((value for value in values if isinstance(value, torch.device)), None)
        is_ours = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        if not is_ours and (asked is None or asked.type != DEVICE.type):
            return func(*args, **kwargs)
        if name in _HEADERS:
            return self._on_host(func, args, kwargs, asked)
        if name not in self._kernels:
            for key in _COMPOSITES:
                if torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
                    self.record.composed.add(name)
                    with self:
                        return _all_wrapped(name, func._op_dk(key, *args, **kwargs))
        self._refuse_strangers(name, tensors)
        results = self._on_host(func, args, kwargs, asked)
        self._note(func, args, kwargs, results)
        return results

    def _on_host(self, func: Any, args: Any, kwargs: Any, asked: torch.device | None) -> Any:
        """Compute with the values and wrap what stays on the device; what changes in place stays the same object."""
        owners: dict[int, DeviceTensor] = {}

        def held(value: Any) -> Any:
            if isinstance(value, DeviceTensor):
                owners[id(value.held)] = value
                return value.held
            return torch.device("cpu") if isinstance(value, torch.device) else value

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return owners[id(value)] if id(value) in owners else DeviceTensor(value)

        args = [_changed(held, value) for value in args]
        kwargs = {name: _changed(held, value) for name, value in kwargs.items()}
        results = func(*args, **kwargs)
        if asked is not None and asked.type == "cpu":
            return results
        if func.name() == "aten::copy_" and id(args[0]) not in owners:  # from the device into a host tensor
            return results
        return _changed(wrapped, results)

    def _refuse_strangers(self, name: str, tensors: list[Tensor]) -> None:
        """A kernel of the device takes tensors of the device, and scalars from the host."""
        if name in _COPIES:
            return
        for tensor in tensors:
            if not isinstance(tensor, DeviceTensor) and tensor.dim():
                shape = tuple(tensor.shape)
                self.record.strangers.append(f"{name} is given a host tensor of shape {shape}: {_caller()}")
                raise RuntimeError(self.record.strangers[-1])

    def _note(self, func: Any, args: Any, kwargs: Any, results: Any) -> None:
        names = [argument.name for argument in func._schema.arguments]
        given = [*zip(names, args, strict=False), *kwargs.items(), ("->", results)]
        dtypes: dict[tuple[str, str], None] = {}  # an ordered set
        for name, value in given:
            for tensor in _leaves(value):
                if isinstance(tensor, DeviceTensor):
                    dtypes[name, str(tensor.dtype).removeprefix("torch.")] = None
        use = Use(func.name(), tuple(dtypes))
        notes = self.record.kernels if func.name() in self._kernels else self.record.missing
        if use not in notes:
            notes[use] = _caller()


def _leaves(value: Any) -> list[Any]:
    """What arguments or results of an operator hold: they nest in lists and tuples only."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _changed(change: Callable[[Any], Any], value: Any) -> Any:
    """The same nest with every leaf changed."""
    if isinstance(value, list | tuple):
        return type(value)([_changed(change, part) for part in value])
    return change(value)


def _all_wrapped(name: str, results: Any) -> Any:
    for value in _leaves(results):
        if isinstance(value, Tensor) and value.device == DEVICE and not isinstance(value, DeviceTensor):
            raise AssertionError(f"{name} makes its result in C++, by no operator: is it one of _HEADERS?")
    return results


def _caller() -> str:
    """The innermost line of our packages that led here, or of the tests where there is none."""
    frame, test = sys._getframe(1), "?"
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and "site-packages" not in path.parts:
            name = f"{path.relative_to(ROOT).as_posix()}:{frame.f_lineno} {frame.f_code.co_name}"
            if not name.startswith("tests/"):
                return name
            test = name if test == "?" else test
        frame = frame.f_back
    return test
