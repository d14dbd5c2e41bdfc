"""The methods by name: our own, and those that installed packages bring.

A package offers a method by an entry point of the group `bitatlas.methods` (see docs/methods.md).
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import entry_points

from quantizers.awq import Awq
from quantizers.billm import Billm
from quantizers.errors import QuantizationError
from quantizers.gptaq import Gptaq
from quantizers.gptq import Gptq
from quantizers.method import Method
from quantizers.rtn import Rtn
from quantizers.slim_llm import SlimLlm
from quantizers.smoothquant import SmoothQuant

ENTRY_POINTS = "bitatlas.methods"

METHODS: dict[str, type[Method]] = {
    "rtn": Rtn,
    "gptq": Gptq,
    "awq": Awq,
    "smoothquant": SmoothQuant,
    "gptaq": Gptaq,
    "billm": Billm,
    "slim_llm": SlimLlm,
}


@cache
def method_names() -> tuple[str, ...]:
    """Names of all methods: ours in the order above, then installed ones, sorted."""
    others = {point.name for point in entry_points(group=ENTRY_POINTS)} - set(METHODS)
    return (*METHODS, *sorted(others))


@cache
def method_class(name: str) -> type[Method]:
    """The options class of a method. An installed one is imported now, and cannot replace one of ours.

    Raises:
        QuantizationError: no such method (names the nearest), or an installed one that is not what it should be.
    """
    if name in METHODS:
        return METHODS[name]
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            try:
                found = point.load()
            except Exception as error:  # whatever another package's module raises
                raise QuantizationError(
                    f"method {name!r}: {point.value} cannot be imported ({type(error).__name__}: {error}); mend or "
                    "remove the package that offers it"
                ) from error
            return _checked(name, found, point.value)
    near = difflib.get_close_matches(name, method_names(), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise QuantizationError(f"method {name!r} is unknown{hint}; known methods: {', '.join(method_names())}")


def _checked(name: str, found: object, where: str) -> type[Method]:
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise QuantizationError(f"method {name!r}: {where} is not a subclass of quantizers.method.Method")
    for needed in ("name", "code_version"):
        if not isinstance(getattr(found, needed, None), str):
            raise QuantizationError(f"method {name!r}: {where} has no class attribute {needed!r}")
    if found.name != name:
        raise QuantizationError(f"method {name!r}: {where} calls itself {found.name!r}; make the two names equal")
    return found
