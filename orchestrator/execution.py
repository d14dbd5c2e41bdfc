"""How evaluated cells are computed: on decoded weights (simulated), or by an NPU's low-bit operators (native).

A cell without a native kernel, and a device without the operators, are refused; nothing falls back to the simulation.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from orchestrator.errors import BitatlasError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PreTrainedModel

    from cluster.devices import Claim
    from orchestrator.config import Sweep
    from orchestrator.models.loading import ModelShape
    from orchestrator.scheme import Scheme
    from quantizers.apply import StoredBlock

SIMULATED, NATIVE = "simulated", "native"
# Part of the identity of native evaluations; raise the number when the same artifact would be computed otherwise.
IDENTITIES: Mapping[str, tuple[str, ...]] = {SIMULATED: (), NATIVE: ("native/1",)}


def check_native(sweep: Sweep, model: str, shape: ModelShape, file: str) -> None:
    """Raise if a sweep asks for native execution of a cell that has no kernel, or on devices without the operators.

    Args:
        model: its name.
        file: the sweep file's name, for errors.
    Raises:
        BitatlasError: names the grid entry, the linear and the reason.
    """
    if sweep.evaluation.execution != NATIVE:
        return
    if sweep.workers.device != "auto":
        check_device(NATIVE, sweep.workers.device)
    for scheme in sweep.grid:
        method = scheme.build()
        quantized = {name: features for name, features in shape.linears.items() if not method.leaves_alone(name)}
        for layer, (out_features, in_features) in quantized.items():
            _check_kernel(scheme, layer, (out_features, in_features), shape.dtype, f"{file}: grid entry", model)


def _check_kernel(scheme: Scheme, layer: str, features: tuple[int, int], dtype: str, where: str, model: str) -> None:
    from quantizers.errors import NoKernelError
    from quantizers.native_kernels import LinearForm, check_encoding, choose_kernel

    method = scheme.build()
    form = LinearForm(
        grid=method.of(layer).grid,
        shape=features,
        dtype=dtype,
        inputs=method.activations,
        quantized_outputs=method.quantized_outputs,
        permuted=method.of(layer).stores_column_groups(features[1]),
    )
    try:
        check_encoding(method.encoding)
        choose_kernel(form)
    except NoKernelError as error:
        raise BitatlasError(f"{where} {scheme.label} cannot run natively: {error} ({layer} of {model})") from error


def check_device(execution: str, kind: str) -> None:
    """Raise if workers of this kind cannot execute so.

    Args:
        kind: a key of `cluster.devices.KINDS`.
    Raises:
        BitatlasError: native execution on anything but NPUs.
    """
    if execution == NATIVE and kind != "npu":
        raise BitatlasError(
            f"evaluation.execution = 'native' runs on NPUs, and these are {kind} workers; set workers.device: npu "
            "where there are any, or execution: simulated"
        )


def installed_for(
    execution: str, device: Claim, model: PreTrainedModel, blocks: Iterable[StoredBlock]
) -> AbstractContextManager[Any]:
    """The model with an artifact in it, while the context lasts.

    Raises:
        BitatlasError: native execution on another device.
        QuantizationError: a linear has no kernel, or this torch_npu lacks an operator.
    """
    from quantizers.apply import installed

    if execution == SIMULATED:
        return installed(model, blocks)
    check_device(execution, device.torch_device.partition(":")[0])
    from quantizers.native import natively_installed
    from quantizers.npu_operators import NpuOperators

    return natively_installed(model, blocks, NpuOperators())
