"""Which cells and columns the sweep file asks for, so that what has not run yet is shown as missing.

The sweep file is read leniently: a field it does not state constrains nothing. Matching is by what is
stated, because defaults are the configuration's business and not the report's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.atlas.rows import FP, Cell, canonical
from orchestrator.scheme import GRID_OPTIONS

PER_CHANNEL = "per_channel"


def as_list(value: object) -> list[Any]:
    """A list as it is, nothing as an empty list, anything else as a list of one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def expected_models(config: Mapping[str, Any]) -> list[str]:
    """Names of the models in the order of the sweep file."""
    names = []
    for model in as_list(config.get("models")):
        name = model.get("name") if isinstance(model, Mapping) else model
        if isinstance(name, str):
            names.append(name)
    return names


def expected_tasks(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(corpora, tasks) that the sweep file names; a corpus given by its path has no name to expect."""
    evaluation = config.get("evaluation")
    if not isinstance(evaluation, Mapping):
        return [], []

    def names(entries: object, key: str) -> list[str]:
        found = [entry.get(key) if isinstance(entry, Mapping) else entry for entry in as_list(entries)]
        return list(dict.fromkeys(name for name in found if isinstance(name, str)))

    return names(evaluation.get("perplexity"), "corpus"), names(evaluation.get("tasks"), "name")


def missing_cells(config: Mapping[str, Any], observed: Iterable[Cell]) -> list[Cell]:
    """Cells that the sweep file asks for and no row mentions."""
    observed = list(observed)
    missing: list[Cell] = []
    for model in expected_models(config):
        present = [cell for cell in observed if cell.model == model]
        if not any(cell.is_fp for cell in present):
            missing.append(_pending(model, {"method": FP, "weight_bits": 16}))
        seen: set[str] = set()
        for scheme in _schemes(config):
            identity = canonical(scheme)
            if identity not in seen and not any(_matches(scheme, cell) for cell in present):
                missing.append(_pending(model, scheme))
            seen.add(identity)
    return missing


def _schemes(config: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    calibrations = [entry for entry in as_list(config.get("calibration")) if isinstance(entry, Mapping)]
    for entry in as_list(config.get("grid")):
        if not isinstance(entry, Mapping) or entry.get("method") in (None, FP):
            continue
        fields = {name: value for name, value in entry.items() if name != "options" and value is not None}
        options = entry.get("options")
        options = dict(options) if isinstance(options, Mapping) else {}
        options |= {name: fields.pop(name) for name in GRID_OPTIONS if name in fields}
        axes = [[(name, value) for value in as_list(values)] for name, values in fields.items()]
        option_axes = [[(name, value) for value in as_list(values)] for name, values in options.items()]
        for chosen in itertools.product(*axes):
            for chosen_options in itertools.product(*option_axes):
                scheme: dict[str, Any] = dict(chosen) | {"options": dict(chosen_options)}
                # One recipe is everybody's; only several make an axis that tells cells apart.
                for recipe in calibrations if len(calibrations) > 1 else [{}]:
                    yield scheme | {"calibration": dict(recipe)}


def _matches(scheme: Mapping[str, Any], cell: Cell) -> bool:
    stated = {
        "method": cell.method,
        "weight_bits": cell.weight_bits,
        "activation_bits": cell.activation_bits,
        "group_size": cell.group_size,
        "symmetric": cell.symmetric,
    }
    for name, actual in stated.items():
        wanted = scheme.get(name)
        if name == "group_size" and wanted == PER_CHANNEL:
            wanted = 0
        if wanted is not None and actual is not None and wanted != actual:
            return False
    return _agrees(scheme["options"], cell.options) and _agrees(scheme["calibration"], cell.calibration)


def _agrees(wanted: Mapping[str, Any], actual: Mapping[str, Any]) -> bool:
    return all(name not in actual or actual[name] == value for name, value in wanted.items())


def _pending(model: str, scheme: Mapping[str, Any]) -> Cell:
    def whole(name: str) -> int | None:
        value = scheme.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    group = 0 if scheme.get("group_size") == PER_CHANNEL else whole("group_size")
    symmetric = scheme.get("symmetric")
    return Cell(
        model=model,
        cell_id="pending " + canonical(scheme),
        method=str(scheme["method"]),
        weight_bits=whole("weight_bits"),
        activation_bits=whole("activation_bits") or 16,
        group_size=group,
        symmetric=symmetric if isinstance(symmetric, bool) else None,
        options=scheme.get("options", {}),
        calibration=scheme.get("calibration", {}),
        pending=True,
    )
