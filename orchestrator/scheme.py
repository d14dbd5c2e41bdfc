"""A scheme: one method with its bits, groups and options, independent of model and data."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from orchestrator.errors import BitatlasError

if TYPE_CHECKING:
    from quantizers.activations import ActivationGrid
    from quantizers.grid import Grid
    from quantizers.method import Method

FP = "fp"
UNQUANTIZED_BITS = 16
CORRECTED = "corrected"
_ACTIVATION_FIELDS = ("activation_granularity", "activation_symmetric", "activation_clip_ratio")
VOCABULARY_FIELDS = ("embedding", "head")
_FIELDS = (
    "method",
    "weight_bits",
    "activation_bits",
    "group_size",
    "symmetric",
    "convention",
    "mse_search",
    "scale_dtype",
    "tail_group",
    *_ACTIVATION_FIELDS,
    "layers",
    *VOCABULARY_FIELDS,
    "options",
)
# What `symmetric` means for a method whose own convention is of the other kind.
_SYMMETRIC_OF = {"gptq-asym": "gptq-sym", "awq-asym": "sq-sym"}
_ASYMMETRIC = "gptq-asym"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A point of the grid, checked against its method.

    Args:
        group_size: 0 is per channel.
        convention: of the weight grid, a name in `quantizers/grid.py`.
        layers: patterns of linears' full names with their own bits and groups, as JSON in their order; 16 bits are
            those of linears that are left alone.
        embedding: (weight_bits, group_size) of the matrix, which is left alone otherwise.
        head: likewise.
        options: the preset and the method's own options, every one of them, as JSON with sorted keys.
    """

    method: str
    weight_bits: int
    activation_bits: int = UNQUANTIZED_BITS
    group_size: int = 0
    convention: str = _ASYMMETRIC
    mse_search: bool = False
    scale_dtype: str = "float16"
    tail_group: bool = False
    activation_granularity: str = "per_token"
    activation_symmetric: bool = True
    activation_clip_ratio: float = 1.0
    layers: str = "{}"
    embedding: tuple[int, int] | None = None
    head: tuple[int, int] | None = None
    options: str = "{}"

    @property
    def needs_calibration(self) -> bool:
        """Whether its method looks at data."""
        return self.build().needs.calibration

    @property
    def symmetric(self) -> bool:
        """Whether the weight grid has no zero of its own."""
        return self.grid().symmetric

    def build(self) -> Method:
        """The quantizer this scheme names."""
        from quantizers.methods import method_class

        options = {name: value for name, value in json.loads(self.options).items() if name != "preset"}
        grid = self.grid()
        layers = tuple(
            (
                pattern,
                None
                if own["weight_bits"] == UNQUANTIZED_BITS
                else replace(grid, bits=own["weight_bits"], group_size=own["group_size"]),
            )
            for pattern, own in json.loads(self.layers).items()
        )
        return method_class(self.method)(grid=grid, activations=self.activations(), layers=layers, **options)

    def grid(self) -> Grid:
        """The grid its weights are stored on."""
        from quantizers.grid import Grid

        return Grid(
            bits=self.weight_bits,
            group_size=self.group_size,
            convention=self.convention,
            mse_search=self.mse_search,
            scale_dtype=self.scale_dtype,
            tail_group=self.tail_group,
        )

    def vocabulary(self) -> dict[str, Grid]:
        """ "embedding" and "head" -> the grid of the matrix; what is left alone is not there."""
        found = {}
        for role in VOCABULARY_FIELDS:
            own = getattr(self, role)
            if own is not None:
                found[role] = replace(self.grid(), bits=own[0], group_size=own[1])
        return found

    def activations(self) -> ActivationGrid | None:
        """The grid of the linears' inputs; None where they are left alone."""
        from quantizers.activations import ActivationGrid

        if self.activation_bits == UNQUANTIZED_BITS:
            return None
        return ActivationGrid(
            bits=self.activation_bits,
            symmetric=self.activation_symmetric,
            granularity=self.activation_granularity,
            clip_ratio=self.activation_clip_ratio,
        )

    def as_entry(self) -> dict[str, Any]:
        """A grid entry of a sweep file that means exactly this scheme."""
        left_out = {"symmetric", "layers", *VOCABULARY_FIELDS, *(() if self.activations() else _ACTIVATION_FIELDS)}
        entry = {name: getattr(self, name) for name in _FIELDS if name not in left_out}
        if self.layers != "{}":
            entry["layers"] = {
                pattern: UNQUANTIZED_BITS
                if own["weight_bits"] == UNQUANTIZED_BITS
                else own | {"group_size": own["group_size"] or "per_channel"}
                for pattern, own in json.loads(self.layers).items()
            }
        for role, grid in self.vocabulary().items():
            entry[role] = {"weight_bits": grid.bits, "group_size": grid.group_size or "per_channel"}
        return entry | {"group_size": self.group_size or "per_channel", "options": json.loads(self.options)}

    @cached_property
    def code_version(self) -> str:
        """Of the method, and of what quantizes the vocabulary: what they compute changes with it."""
        version = self.build().code_version
        if not self.vocabulary():
            return version
        from quantizers.rtn import Rtn

        return f"{version}, vocabulary by {Rtn.code_version}"

    @cached_property
    def row_options(self) -> str:
        """What tables call options, as JSON: the method's, with what else tells its grids apart."""
        entry = self.as_entry()
        options = {name: entry[name] for name in GRID_OPTIONS if name in entry} | entry["options"]
        return json.dumps(options, sort_keys=True)

    @cached_property
    def label(self) -> str:
        """Short and readable: `gptq-w4-g64`, `rtn-w8-pc-sym`."""
        from quantizers.methods import method_class

        group = f"g{self.group_size}" if self.group_size else "pc"
        activation = f"a{self.activation_bits}" if self.activation_bits != UNQUANTIZED_BITS else ""
        label = f"{self.method}-w{self.weight_bits}{activation}-{group}"
        if self.convention != method_class(self.method).default_convention:
            label += "-sym" if self.convention == "gptq-sym" else f"-{self.convention}"
        preset = json.loads(self.options).get("preset", CORRECTED)
        label += "" if self.layers == "{}" else "-mixed"
        label += "".join(f"-{role[0]}{grid.bits}" for role, grid in self.vocabulary().items())
        return label + ("-mse" if self.mse_search else "") + ("" if preset == CORRECTED else f"-{preset}")


# Fields of a grid entry that tables keep among the options.
GRID_OPTIONS = (
    "convention",
    "mse_search",
    "scale_dtype",
    "tail_group",
    *_ACTIVATION_FIELDS,
    "layers",
    *VOCABULARY_FIELDS,
)


def parse_scheme(fields: dict[str, Any], where: str) -> Scheme:
    """Check one point of the grid.

    Args:
        fields: the entry's fields, lists already expanded.
        where: what to name in errors: "sweep.yaml: grid[0]".
    Raises:
        BitatlasError: an unknown key, method or option, or a value outside its rule.
    """
    from quantizers.errors import QuantizationError
    from quantizers.methods import method_class, method_names

    for key in fields:
        if key not in _FIELDS:
            raise BitatlasError(
                f"{where}: unknown key {key!r}{_near(key, _FIELDS)}; the keys here are {', '.join(_FIELDS)}"
            )
    name = fields.get("method")
    if name is None:
        raise BitatlasError(f"{where}.method is missing; known methods: {', '.join(method_names())}")
    if not isinstance(name, str) or name not in method_names():
        known = ", ".join(method_names())
        raise BitatlasError(
            f"{where}.method = {name!r} is unknown{_near(name, method_names())}; known methods: {known}"
        )
    try:
        method = method_class(name)
    except QuantizationError as error:
        raise BitatlasError(f"{where}: {error}") from error
    if "weight_bits" not in fields:
        raise BitatlasError(f"{where}.weight_bits is missing; give 1 to 8")
    bits = _whole(fields["weight_bits"], 1, 8, f"{where}.weight_bits")
    try:
        scheme = Scheme(
            method=name,
            weight_bits=bits,
            activation_bits=_activation_bits(fields, where),
            group_size=_group_size(fields.get("group_size", "per_channel"), f"{where}.group_size"),
            convention=_convention(method, fields, where),
            layers=_layers(fields.get("layers", {}), fields, f"{where}.layers"),
            embedding=_matrix(fields, "embedding", where),
            head=_matrix(fields, "head", where),
            options=_options(method, fields.get("options", {}), f"{where}.options"),
            **{
                key: _typed(fields[key], type(default), f"{where}.{key}")
                for key, default in _PLAIN_FIELDS.items()
                if key in fields
            },
        )
        scheme.build()  # the grid and the method check their own values
        scheme.vocabulary()
    except QuantizationError as error:
        raise BitatlasError(f"{where}: {error}") from error
    return scheme


_PLAIN_FIELDS = {
    item.name: item.default
    for item in dataclasses.fields(Scheme)
    if item.name in ("mse_search", "scale_dtype", "tail_group", *_ACTIVATION_FIELDS)
}


def _activation_bits(fields: dict[str, Any], where: str) -> int:
    bits = fields.get("activation_bits", UNQUANTIZED_BITS)
    if bits != UNQUANTIZED_BITS or isinstance(bits, bool):
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise BitatlasError(
                f"{where}.activation_bits = {bits!r}: must be a whole number from 2 to 8, or {UNQUANTIZED_BITS} to "
                "leave activations alone"
            )
        return bits
    for key in _ACTIVATION_FIELDS:
        if key in fields:
            raise BitatlasError(f"{where}.{key} says nothing without activation_bits below {UNQUANTIZED_BITS}")
    return UNQUANTIZED_BITS


def _convention(method: type[Method], fields: dict[str, Any], where: str) -> str:
    """The grid convention: as named, else the method's own, or its sibling where `symmetric` asks for it."""
    from quantizers.grid import Grid

    own = method.default_convention
    symmetric = _typed(fields["symmetric"], bool, f"{where}.symmetric") if "symmetric" in fields else None
    if "convention" in fields:
        convention: str = _typed(fields["convention"], str, f"{where}.convention")
        if symmetric is not None and Grid(bits=4, convention=convention).symmetric != symmetric:
            raise BitatlasError(
                f"{where}.symmetric = {symmetric} contradicts convention = {convention!r}; leave one of them out"
            )
        return convention
    if symmetric is None or Grid(bits=4, convention=own).symmetric == symmetric:
        return own
    return _SYMMETRIC_OF[own] if symmetric else _ASYMMETRIC


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


def _layers(given: Any, fields: dict[str, Any], where: str) -> str:
    """Own bits and groups of linears, with those of the entry where only one of the two is given.

    Raises:
        BitatlasError: no mapping of patterns to bits, or to weight_bits and group_size.
    """
    if not isinstance(given, dict):
        raise BitatlasError(f"{where} = {given!r}: must be a mapping such as {{'*.down_proj': 8}}")
    found: dict[str, dict[str, int]] = {}
    for pattern, value in given.items():
        place = f"{where}[{pattern!r}]"
        if not isinstance(pattern, str) or not pattern:
            raise BitatlasError(f"{place}: the pattern must be text, such as '*.down_proj'")
        bits, group_size = own_grid(value, fields, place) or (UNQUANTIZED_BITS, 0)
        found[pattern] = {"weight_bits": bits, "group_size": group_size}
    return json.dumps(found)


def _matrix(fields: dict[str, Any], role: str, where: str) -> tuple[int, int] | None:
    return None if fields.get(role) is None else own_grid(fields[role], fields, f"{where}.{role}")


def own_grid(value: Any, fields: dict[str, Any], where: str) -> tuple[int, int] | None:
    """(weight_bits, group_size) as given, with those of the entry where only one of the two is; None where 16 bits
    leave a weight alone.

    Raises:
        BitatlasError: neither bits nor a mapping of weight_bits and group_size, or groups of what is left alone.
    """
    own = value if isinstance(value, dict) else {"weight_bits": value}
    for key in own:
        if key not in ("weight_bits", "group_size"):
            raise BitatlasError(f"{where}: unknown key {key!r}; the keys here are weight_bits, group_size")
    bits = own.get("weight_bits", fields["weight_bits"])
    if isinstance(bits, bool) or not isinstance(bits, int) or not (1 <= bits <= 8 or bits == UNQUANTIZED_BITS):
        raise BitatlasError(
            f"{where}.weight_bits = {bits!r}: must be a whole number from 1 to 8, or {UNQUANTIZED_BITS}, which leaves "
            "alone"
        )
    if bits == UNQUANTIZED_BITS:
        if "group_size" in own:
            raise BitatlasError(f"{where}.group_size says nothing beside {UNQUANTIZED_BITS} bits, which leave alone")
        return None
    return bits, _group_size(own.get("group_size", fields.get("group_size", "per_channel")), f"{where}.group_size")


def _typed(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise BitatlasError(f"{where} = {value!r}: must be {words[kind]}")
    return value


def _options(method: type[Method], given: Any, where: str) -> str:
    if not isinstance(given, dict):
        raise BitatlasError(f"{where} = {given!r}: must be a mapping of the method's options")
    known = option_defaults(method)
    preset = given.get("preset", CORRECTED)
    if preset not in method.presets:
        raise BitatlasError(
            f"{where}.preset = {preset!r} is unknown{_near(preset, method.presets)}; this method's presets: "
            f"{', '.join(method.presets)}"
        )
    for name in given:
        if name not in known and name != "preset":
            allowed = ", ".join(["preset", *known])
            raise BitatlasError(
                f"{where}: unknown option {name!r}{_near(name, known)}; this method's options: {allowed}"
            )
    values = {
        name: _typed(given[name], type(default), f"{where}.{name}")
        if name in given
        else method.presets[preset].get(name, default)
        for name, default in known.items()
    }
    return json.dumps(values | {"preset": preset}, sort_keys=True)


@cache
def option_defaults(method: type[Method]) -> dict[str, Any]:
    """A method's options with their defaults: its dataclass fields except the grids."""
    grids = ("grid", "activations", "layers")
    return {item.name: item.default for item in dataclasses.fields(method) if item.name not in grids}


def _near(word: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
