"""A scheme: one method with its bits, groups and options, independent of model and data."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from orchestrator.errors import BitatlasError

if TYPE_CHECKING:
    from quantizers.grid import Grid
    from quantizers.method import Method

FP = "fp"
UNQUANTIZED_BITS = 16
_FIELDS = (
    "method",
    "weight_bits",
    "activation_bits",
    "group_size",
    "symmetric",
    "scale_dtype",
    "tail_group",
    "options",
)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A point of the grid, checked against its method.

    Args:
        group_size: 0 is per channel.
        options: the method's own options, every one of them, as JSON with sorted keys.
    """

    method: str
    weight_bits: int
    activation_bits: int = UNQUANTIZED_BITS
    group_size: int = 0
    symmetric: bool = False
    scale_dtype: str = "float16"
    tail_group: bool = False
    options: str = "{}"

    @property
    def needs_calibration(self) -> bool:
        """Whether its method looks at data."""
        return self.build().needs_calibration

    def build(self) -> Method:
        """The quantizer this scheme names."""
        from quantizers.methods import METHODS

        return METHODS[self.method](grid=self.grid(), **json.loads(self.options))

    def grid(self) -> Grid:
        """The grid its weights are stored on."""
        from quantizers.grid import Grid

        return Grid(
            bits=self.weight_bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=self.scale_dtype,
            tail_group=self.tail_group,
        )

    def as_entry(self) -> dict[str, Any]:
        """A grid entry of a sweep file that means exactly this scheme."""
        entry = {name: getattr(self, name) for name in _FIELDS}
        return entry | {"group_size": self.group_size or "per_channel", "options": json.loads(self.options)}

    @property
    def label(self) -> str:
        """Short and readable: `gptq-w4-g64`, `rtn-w8-pc-sym`."""
        group = f"g{self.group_size}" if self.group_size else "pc"
        activation = f"a{self.activation_bits}" if self.activation_bits != UNQUANTIZED_BITS else ""
        return f"{self.method}-w{self.weight_bits}{activation}-{group}" + ("-sym" if self.symmetric else "")


def parse_scheme(fields: dict[str, Any], where: str) -> Scheme:
    """Check one point of the grid.

    Args:
        fields: the entry's fields, lists already expanded.
        where: what to name in errors: "sweep.yaml: grid[0]".
    Raises:
        BitatlasError: an unknown key, method or option, or a value outside its rule.
    """
    from quantizers.errors import QuantizationError
    from quantizers.methods import METHODS

    for key in fields:
        if key not in _FIELDS:
            raise BitatlasError(
                f"{where}: unknown key {key!r}{_near(key, _FIELDS)}; the keys here are {', '.join(_FIELDS)}"
            )
    method = fields.get("method")
    if method is None:
        raise BitatlasError(f"{where}.method is missing; known methods: {', '.join(METHODS)}")
    if not isinstance(method, str) or method not in METHODS:
        raise BitatlasError(
            f"{where}.method = {method!r} is unknown{_near(method, METHODS)}; known methods: {', '.join(METHODS)}"
        )
    if "weight_bits" not in fields:
        raise BitatlasError(f"{where}.weight_bits is missing; give 1 to 8")
    bits = _whole(fields["weight_bits"], 1, 8, f"{where}.weight_bits")
    activation_bits = fields.get("activation_bits", UNQUANTIZED_BITS)
    if activation_bits != UNQUANTIZED_BITS or isinstance(activation_bits, bool):
        raise BitatlasError(
            f"{where}.activation_bits = {activation_bits!r}: {method} quantizes weights only; use {UNQUANTIZED_BITS}"
        )
    try:
        scheme = Scheme(
            method=method,
            weight_bits=bits,
            group_size=_group_size(fields.get("group_size", "per_channel"), f"{where}.group_size"),
            symmetric=_typed(fields.get("symmetric", False), bool, f"{where}.symmetric"),
            scale_dtype=_typed(fields.get("scale_dtype", "float16"), str, f"{where}.scale_dtype"),
            tail_group=_typed(fields.get("tail_group", False), bool, f"{where}.tail_group"),
            options=_options(METHODS[method], fields.get("options", {}), f"{where}.options"),
        )
        scheme.build()  # the grid and the method check their own values
    except QuantizationError as error:
        raise BitatlasError(f"{where}: {error}") from error
    return scheme


def _whole(value: Any, least: int, most: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BitatlasError(f"{where} = {value!r}: must be a whole number from {least} to {most}")
    return value


def _group_size(value: Any, where: str) -> int:
    if value == "per_channel":
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BitatlasError(f"{where} = {value!r}: must be a positive whole number of input columns, or per_channel")
    return value


def _typed(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise BitatlasError(f"{where} = {value!r}: must be {words[kind]}")
    return value


def _options(method: type, given: Any, where: str) -> str:
    if not isinstance(given, dict):
        raise BitatlasError(f"{where} = {given!r}: must be a mapping of the method's options")
    known = option_defaults(method)
    for name in given:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise BitatlasError(
                f"{where}: unknown option {name!r}{_near(name, known)}; this method's options: {allowed}"
            )
    values = {
        name: _typed(given[name], type(default), f"{where}.{name}") if name in given else default
        for name, default in known.items()
    }
    return json.dumps(values, sort_keys=True)


@cache
def option_defaults(method: type) -> dict[str, Any]:
    """A method's options with their defaults: its dataclass fields except the grid."""
    return {item.name: item.default for item in dataclasses.fields(method) if item.name != "grid"}


def _near(word: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
