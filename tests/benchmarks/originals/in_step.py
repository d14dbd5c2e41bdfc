"""Our method on the very inputs that a release's code sees, linear by linear through the whole model.

Two runs of one method drift apart from a last place on: an early code rounded the other way changes all that comes
after. Where both are given the same inputs instead, a difference is one of method.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tests.benchmarks.originals.layers import Stage, heard

_NEAR = 1e-4


class InStep:
    """Watches a release quantize; `records` then has a line for each of its linears.

    Args:
        method: ours, with float32 scales.
    """

    def __init__(self, method) -> None:
        self.method = method
        self.records = []

    @contextmanager
    def watch(self, stage: Stage) -> Iterator[None]:
        """Quantize the linears of a stage as well, and compare with what the release has put in their place."""
        from quantizers.families import FAMILIES
        from quantizers.linalg import quadratic_form

        made = {}
        for names in FAMILIES["llama"].stages:
            linears = {name: stage.linears[name] for name in names if name in stage.linears}
            if linears:
                made |= self.quantize(linears, stage)
        yield
        for name, (weight, hessian, ours) in made.items():
            theirs = stage.linears[name].weight.detach()
            found, expected = (
                quadratic_form((weight - each).double(), hessian.double()).item() for each in (ours, theirs)
            )
            near = torch.isclose(ours, theirs, rtol=_NEAR, atol=_NEAR * weight.square().mean().sqrt().item())
            self.records.append(
                {"layer": stage.layer, "linear": name, "ratio": found / expected, "equal": near.double().mean().item()}
            )

    def quantize(self, linears, stage):
        """Ours on some linears that share their input: name -> weight, Hessian, and what stands for the weight."""
        from quantizers.method import LinearGroup
        from quantizers.statistics import Drift, Hessian, InputStatistics

        first, windows = next(iter(linears)), []
        with heard({first: linears[first]}, lambda _, given, __: windows.append(given.clone())):
            stage.run()
        inputs = torch.cat(windows)
        hessian, drift = (kind(inputs.shape[-1], inputs.device) for kind in (Hessian, Drift))
        for window in inputs.split(1):
            hessian.update(window)
        for window, of_float in zip(inputs.split(1), stage.float_inputs, strict=False):
            drift.update(window, of_float)
        statistics = InputStatistics(
            hessian_II=hessian.value(),
            drift_II=drift.value() if stage.float_inputs else None,
            sample_TI=inputs.flatten(0, 1),
        )
        group = LinearGroup(
            names=list(linears),
            weights=[linear.weight.detach().clone() for linear in linears.values()],
            biases=[None] * len(linears),
            statistics=statistics,
        )
        quantized = self.method.quantize(group).weights
        return {
            name: (weight, statistics.hessian_II, ours.decode())
            for name, weight, ours in zip(group.names, group.weights, quantized, strict=True)
        }
