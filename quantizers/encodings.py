"""The encodings of quantized linears by name."""

from __future__ import annotations

from quantizers.binarized_weight import BinarizedWeight
from quantizers.mixed_weight import MixedWeight
from quantizers.quantized_weight import QuantizedWeight
from quantizers.uniform_weight import UniformWeight

ENCODINGS: dict[str, type[QuantizedWeight]] = {
    kind.encoding: kind for kind in (UniformWeight, MixedWeight, BinarizedWeight)
}
