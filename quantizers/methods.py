"""The methods by name."""

from __future__ import annotations

from quantizers.gptq import Gptq
from quantizers.rtn import Rtn

METHODS: dict[str, type[Rtn] | type[Gptq]] = {"rtn": Rtn, "gptq": Gptq}
