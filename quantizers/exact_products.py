"""float32 sums of products of bfloat16 values, as exact as float32 products and on some processors faster.

torch has no product of bfloat16 matrices with a float32 result on the CPU, and with a bfloat16 result a Hessian is not
positive definite. oneDNN's bfloat16 mode is exact where both factors are bfloat16 values already: it may round float32
factors to bfloat16, which changes none of those, and adds up in float32. Which kernel it takes is oneDNN's choice: a
float32 one on Zen 4 (as fast as torch's own), one of bfloat16 tiles on Intel's AMX, which rounds (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exact_products(factor: Tensor) -> Iterator[None]:
    """Within it, float32 products both of whose factors hold bfloat16 values are as fast as they can be, and as exact.

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
