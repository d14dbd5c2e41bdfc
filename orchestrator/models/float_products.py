"""16-bit matrix products on processors that have none: computed in float32, rounded once.

There torch's own bfloat16 products are slower than float32's: on a processor with AVX2 alone 9 against 57 GFLOP/s, with
AVX-512 but not its bfloat16 instructions 24 against 81. Both add up in float32 and round once, so that results differ
in their last bits alone, as between any two machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# What decoders are made of.
_PRODUCTS = {
    functional.linear,
    functional.scaled_dot_product_attention,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch.mm,
}
_NARROW = (torch.bfloat16, torch.float16)


def fast_products(torch_device: str) -> AbstractContextManager[object]:
    """Within it, 16-bit matrix products run as fast as the device can; it changes nothing but on such processors.

    Args:
        torch_device: where the model is: "cpu", "cuda:0", "npu:0".
    """
    if torch_device == "cpu" and lacks_narrow_products(torch.cpu.get_capabilities()):
        return FloatProducts()
    return nullcontext()


def lacks_narrow_products(capabilities: Mapping[str, object]) -> bool:
    """Whether torch's 16-bit products are slow: on x86 without AVX512-BF16, which oneDNN has fast ones for.

    Args:
        capabilities: as `torch.cpu.get_capabilities()`.
    """
    return capabilities.get("architecture") == "x86_64" and not capabilities.get("avx512_bf16")


class FloatProducts(TorchFunctionMode):
    """Matrix products of 16-bit tensors on the CPU are those of float32, rounded to the inputs' dtype."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch; the products among them in float32."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func not in _PRODUCTS or not isinstance(first, torch.Tensor) or not _is_narrow(first):
            return func(*args, **kwargs)
        wide = func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})
        return wide.to(first.dtype)


def _is_narrow(value: torch.Tensor) -> bool:
    return value.dtype in _NARROW and value.is_cpu


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and _is_narrow(value) else value
