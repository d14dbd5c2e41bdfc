"""float32 sums of products of bfloat16 values, at the rate of bfloat16 products.

torch has no product of bfloat16 matrices with a float32 result on the CPU, and with a bfloat16 result a Hessian is not
positive definite. oneDNN's bfloat16 mode is that product: it rounds float32 factors to bfloat16, which changes none
that is one already, multiplies them exactly and adds up in float32. That is twice the rate of float32 products where
the processor has instructions for it; elsewhere the mode gains nothing and is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exact_products(factor: Tensor) -> Iterator[None]:
    """Within it, float32 products whose factors hold bfloat16 values are as fast as they can be, and as exact.

    Args:
        factor: as it was before it was widened; the mode is on where this is bfloat16 on a CPU that multiplies such.
    """
    if not (factor.dtype == torch.bfloat16 and factor.is_cpu and torch.cpu.get_capabilities().get("avx512_bf16")):
        yield
        return
    mkldnn: Any = torch.backends.mkldnn  # torch's type stubs do not know `matmul`
    matmul = mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
