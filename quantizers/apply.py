"""Put decoded weights into a model, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from quantizers.families import linear_at
from quantizers.quantized_weight import QuantizedWeight


@contextmanager
def decoded_weights(model: nn.Module, weights: Iterable[tuple[str, QuantizedWeight]]) -> Iterator[nn.Module]:
    """The model with its linears holding the decoded values, in the model's own dtype; restored on leaving.

    Args:
        weights: (dotted name of the linear, its artifact); consumed one at a time.
    """
    originals: list[tuple[nn.Linear, Tensor]] = []
    try:
        for name, weight in weights:
            linear = linear_at(model, name)
            original = linear.weight
            decoded = weight.decode().to(original.device, original.dtype)
            if decoded.shape != original.shape:
                raise ValueError(f"{name}: artifact of shape {tuple(decoded.shape)}, model has {tuple(original.shape)}")
            originals.append((linear, original))
            linear.weight = nn.Parameter(decoded, requires_grad=False)
        yield model
    finally:
        for linear, original in reversed(originals):
            linear.weight = original
