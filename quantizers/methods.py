"""The methods by name."""

from __future__ import annotations

from quantizers.gptaq import Gptaq
from quantizers.gptq import Gptq
from quantizers.rtn import Rtn

METHODS: dict[str, type[Rtn] | type[Gptq] | type[Gptaq]] = {"rtn": Rtn, "gptq": Gptq, "gptaq": Gptaq}
