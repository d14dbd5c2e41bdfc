"""Put an artifact into a model, and take it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from quantizers.activations import ActivationQuantizer
from quantizers.families import holders, linear_at
from quantizers.quantized_weight import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class StoredLinear:
    """One linear of an artifact.

    Args:
        name: full dotted name of the linear in the model, without ".weight".
        inputs: how its inputs are quantized; None leaves them alone.
        outputs: how its outputs are quantized, likewise.
        input_scale_I: float32, what its inputs were divided by when its block was rescaled; None is ones.
        output_scale_O: likewise of its outputs.
    """

    name: str
    weight: QuantizedWeight
    inputs: ActivationQuantizer | None = None
    outputs: ActivationQuantizer | None = None
    input_scale_I: Tensor | None = None
    output_scale_O: Tensor | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of its weight and of its static activation scales and zeros (float32)."""
        static = [place for place in (self.inputs, self.outputs) if place is not None and place.scale is not None]
        return self.weight.stored_bytes + 8 * len(static)


@dataclass(frozen=True, kw_only=True)
class StoredBlock:
    """One decoder block of an artifact, or what it holds besides them.

    Args:
        dense: full dotted name of a parameter -> its changed value, in the model's dtype.
        vocabulary: embedding and head, where they are quantized.
    """

    linears: Sequence[StoredLinear]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    vocabulary: Sequence[StoredLinear] = ()


@contextmanager
def installed(model: nn.Module, blocks: Iterable[StoredBlock]) -> Iterator[nn.Module]:
    """The model with an artifact in it: decoded weights in the model's own dtype, changed norms and biases, and
    quantized activations; restored on leaving.

    Args:
        blocks: consumed one at a time.
    """
    with ExitStack() as undo:
        for block in blocks:
            for linear in block.linears:
                _install_linear(model, linear, undo)
            for name, value in block.dense.items():
                replace_parameter(model, name, value, undo)
            for matrix in block.vocabulary:
                install_matrix(model, matrix, undo)
        yield model


def _install_linear(model: nn.Module, linear: StoredLinear, undo: ExitStack) -> None:
    module = linear_at(model, linear.name)
    replace_parameter(model, f"{linear.name}.weight", linear.weight.decode(), undo)
    for handle in quantize_activations(module, linear.inputs, linear.outputs):
        undo.callback(handle.remove)


def install_matrix(model: nn.Module, matrix: StoredLinear, undo: ExitStack) -> None:
    """Put a decoded matrix over the vocabulary wherever the model has it, until `undo` is closed."""
    modules = holders(model, matrix.name)
    original: Any = modules[0].weight
    value = matrix.weight.decode()
    if value.shape != original.shape:
        raise ValueError(f"{matrix.name}: artifact of shape {tuple(value.shape)}, model has {tuple(original.shape)}")
    weight = nn.Parameter(value.to(original.device, original.dtype), requires_grad=False)
    for module in modules:  # a tied head is the very same parameter
        module.weight = weight
        undo.callback(setattr, module, "weight", original)


def replace_parameter(model: nn.Module, name: str, value: Tensor, undo: ExitStack) -> None:
    """Give a parameter another value, in its own dtype and on its own device, until `undo` is closed."""
    owner, _, field_name = name.rpartition(".")
    module = model.get_submodule(owner)
    original: Tensor = getattr(module, field_name)
    if value.shape != original.shape:
        raise ValueError(f"{name}: artifact of shape {tuple(value.shape)}, model has {tuple(original.shape)}")
    setattr(module, field_name, nn.Parameter(value.to(original.device, original.dtype), requires_grad=False))
    undo.callback(setattr, module, field_name, original)


def quantize_activations(
    module: nn.Linear, inputs: ActivationQuantizer | None, outputs: ActivationQuantizer | None
) -> list[Any]:
    """Make a linear quantize what enters and what leaves it; returns the hooks' handles."""
    handles: list[Any] = []
    if inputs is not None:
        handles.append(module.register_forward_pre_hook(_before(inputs)))
    if outputs is not None:
        handles.append(module.register_forward_hook(_after(outputs)))
    return handles


def _before(quantizer: ActivationQuantizer) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    return lambda _, given: (quantizer(given[0]),)


def _after(quantizer: ActivationQuantizer) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    return lambda _, __, output: quantizer(output)
