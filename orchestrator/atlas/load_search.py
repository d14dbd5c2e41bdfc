"""Reads the directory `search/` of a search, in whatever state it is, and checks what it reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.atlas.search_rows import Point, Search, Sensitivity, Study, Trial
from orchestrator.errors import BitatlasError
from orchestrator.parts import DamagedPartError
from orchestrator.search.records import SENSITIVITY, TRIALS, Records, space_from_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from orchestrator.schema import Table
    from orchestrator.search.space import Allocation, Space

    Row = Mapping[str, Any]

_REMEDY = "restore it, or remove it to see the report without what it tells"


def load_search(directory: Path) -> Search | None:
    """Read a search that has ended, is running, or has only just begun; None where the directory is of no search.

    Args:
        directory: the sweep's output directory.
    Raises:
        BitatlasError: a file cannot be read, or does not hold what it should.
    """
    records = Records(directory)
    if not records.directory.is_dir():
        return None
    # What is written last is read first, so that all it speaks of is there by then.
    chosen = _chosen(records.chosen)
    settings = _settings(records.file)
    space = _space(records.space)
    trials = _rows(records, TRIALS)
    sensitivity = _rows(records, SENSITIVITY)
    named = [chosen, *trials, *sensitivity]
    return Search(
        name=next((str(row["search"]) for row in named if row.get("search")), ""),
        model=next((str(row["model"]) for row in named if row.get("model")), ""),
        objective=_text(chosen, "objective", records.chosen) or _text(settings, "objective", records.file),
        num_windows=_whole(chosen, "num_windows", records.chosen) or _whole(settings, "windows", records.file),
        guard_windows=_whole(chosen, "guard_windows", records.chosen)
        or _whole(settings, "guard_windows", records.file),
        space=space,
        sensitivities=_sensitivities(sensitivity, records.directory / SENSITIVITY.name),
        studies=_studies(chosen, trials, space, records),
    )


def _rows(records: Records, table: Table) -> list[dict[str, Any]]:
    place = records.directory / table.name
    try:
        return records.rows(table)
    except DamagedPartError as error:
        raise BitatlasError(f"{error.part} is damaged, not a readable Parquet file ({error.why}); {_REMEDY}") from None
    except OSError as error:
        raise BitatlasError(f"{place} cannot be read ({error.strerror or error}); {_REMEDY}") from None


def _read(path: Path, language: Literal["JSON", "YAML"] = "JSON") -> object:
    """What a small file holds; None where it is not there yet."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if language == "JSON" else yaml.safe_load(text)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BitatlasError(f"{path} cannot be read ({error.strerror or error}); {_REMEDY}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BitatlasError(f"{path} is not readable {language} ({reason}); {_REMEDY}") from None


def _wrong(where: object, what: str) -> BitatlasError:
    return BitatlasError(f"{where}: {what}; {_REMEDY}")


def _space(path: Path) -> Space | None:
    found = _read(path)
    if found is None:
        return None
    try:
        space = space_from_json(found)  # type: ignore[arg-type]  # what it is not shows below
        for group in space.groups:
            numbers = [group.num_weights]
            for choice in group.choices:
                numbers += [choice.weight_bits, choice.group_size, choice.stored_bytes]
            if not all(isinstance(one, str) for one in group.linears) or not all(map(_is_whole, numbers)):
                raise TypeError("names are strings, sizes are whole numbers")
            if not group.linears or not group.choices or group.num_weights < 1:
                raise ValueError("a group has linears, weights and choices")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise _wrong(path, f"it is no list of groups with their choices ({reason})") from None
    return space


def _settings(path: Path) -> dict[str, Any]:
    """What the search's file says under `search`, for as long as nothing is chosen."""
    found = _read(path, "YAML")
    if found is None:
        return {}
    settings = found.get("search") if isinstance(found, dict) else None
    if not isinstance(settings, dict):
        raise _wrong(path, "it must hold an object with the settings `search`")
    return settings


def _chosen(path: Path) -> dict[str, Any]:
    found = _read(path)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise _wrong(path, "it must hold an object with `studies`")
    studies = found.get("studies", [])
    if not isinstance(studies, list) or not all(isinstance(one, dict) and one.get("study") for one in studies):
        raise _wrong(path, "`studies` must be a list of objects with a name `study` each")
    return found


def _sensitivities(rows: Sequence[Row], where: Path) -> tuple[Sensitivity, ...]:
    """Of a choice that a resumed search measured twice the last row stands."""
    found: dict[tuple[str, str, int, int], Sensitivity] = {}
    for row in rows:
        if any(row.get(name) is None for name in ("base", "group", "weight_bits", "group_size")):
            raise _wrong(where, "a row does not say which choice of which group was measured")
        one = Sensitivity(
            base=row["base"],
            group=row["group"],
            weight_bits=row["weight_bits"],
            group_size=row["group_size"],
            loss=float("nan") if row.get("loss") is None else row["loss"],
        )
        found[one.base, one.group, one.weight_bits, one.group_size] = one
    return tuple(found.values())


def _studies(chosen: Row, rows: Sequence[Row], space: Space | None, records: Records) -> tuple[Study, ...]:
    where = records.directory / TRIALS.name
    trials: dict[str, dict[int, Trial]] = {}
    samplers: dict[str, str] = {}
    for row in rows:
        if any(row.get(name) is None for name in ("study", "trial", "state")):
            raise _wrong(where, "a row does not say which trial of which study it is of")
        samplers[row["study"]] = row.get("sampler") or ""
        trials.setdefault(row["study"], {})[row["trial"]] = _trial(row, space, where)
    ended = {str(entry["study"]): entry for entry in chosen.get("studies", [])}
    return tuple(
        _study(name, ended.get(name, {}), samplers.get(name, ""), tuple(trials.get(name, {}).values()), space, records)
        for name in dict.fromkeys([*ended, *trials])
    )


def _trial(row: Row, space: Space | None, where: Path) -> Trial:
    place = f"{where}, trial {row['trial']} of {row['study']!r}"
    try:
        stated = json.loads(row["allocation"]) if row.get("allocation") else None
    except ValueError:
        raise _wrong(place, "its allocation is not JSON") from None
    return Trial(
        number=row["trial"],
        state=row["state"],
        loss=row.get("loss"),
        guard_loss=row.get("guard_loss"),
        stored_bytes=row.get("stored_bytes"),
        bits_per_weight=row.get("bits_per_weight"),
        allocation=_allocation(stated, space, place),
        window_forwards=row.get("window_forwards"),
        seconds=row.get("seconds"),
    )


def _study(
    name: str, entry: Row, sampler: str, trials: tuple[Trial, ...], space: Space | None, records: Records
) -> Study:
    where = f"{records.chosen}, study {name!r}"
    points = {key: _points(entry, key, space, where) for key in ("starts", "front")}
    forwards = max((one.window_forwards for one in trials if one.window_forwards is not None), default=None)
    seconds = max((one.seconds for one in trials if one.seconds is not None), default=None)
    has_chosen = entry.get("allocation") is not None or entry.get("loss") is not None
    stated_seconds, tried = _number(entry, "seconds", where), _whole(entry, "trials", where)
    stated_forwards = _whole(entry, "window_forwards", where)
    return Study(
        name=name,
        sampler=_text(entry, "sampler", where) or sampler,
        budget_bytes=_whole(entry, "budget_bytes", where),
        chosen=_point(entry, space, where) if has_chosen else None,
        front=points["front"],
        starts=points["starts"],
        tried=len(trials) if tried is None else tried,
        window_forwards=forwards if stated_forwards is None else stated_forwards,
        seconds=seconds if stated_seconds is None else stated_seconds,
        stopped=_text(entry, "stopped", where),
        trials=trials,
    )


def _points(entry: Row, key: str, space: Space | None, where: str) -> tuple[Point, ...]:
    found = entry.get(key) or []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise _wrong(where, f"`{key}` must be a list of objects")
    return tuple(_point(one, space, f"{where}, {key}") for one in found)


def _point(entry: Row, space: Space | None, where: str) -> Point:
    allocation = _allocation(entry.get("allocation"), space, where)
    stored_bytes, bits = _whole(entry, "stored_bytes", where), _number(entry, "bits_per_weight", where)
    if space is not None and allocation is not None:
        stored_bytes = space.stored_bytes(allocation) if stored_bytes is None else stored_bytes
        bits = space.bits_per_weight(allocation) if bits is None else bits
    return Point(
        name=_text(entry, "name", where),
        allocation=allocation,
        stored_bytes=stored_bytes,
        bits_per_weight=bits,
        loss=_number(entry, "loss", where),
        guard_loss=_number(entry, "guard_loss", where),
        cell=_text(entry, "cell", where),
    )


def _allocation(stated: object, space: Space | None, where: object) -> Allocation | None:
    """An allocation, if it is one of the space; without the space its numbers mean nothing, so None."""
    if stated is None or space is None:
        return None
    if not isinstance(stated, list) or not all(map(_is_whole, stated)) or len(stated) != len(space.groups):
        raise _wrong(where, f"its allocation must be a list of {len(space.groups)} whole numbers, one per group")
    for index, group in zip(stated, space.groups, strict=True):
        if not 0 <= index < len(group.choices):
            raise _wrong(where, f"its allocation has {index} for {group.name}, which has {len(group.choices)} choices")
    return tuple(stated)


def _text(entry: Row, name: str, where: object) -> str:
    value = entry.get(name)
    if value is not None and not isinstance(value, str):
        raise _wrong(where, f"`{name}` must be a string")
    return value or ""


def _whole(entry: Row, name: str, where: object) -> int | None:
    value = entry.get(name)
    if value is not None and not _is_whole(value):
        raise _wrong(where, f"`{name}` must be a whole number")
    return value


def _number(entry: Row, name: str, where: object) -> float | None:
    value = entry.get(name)
    if value is not None and not (_is_whole(value) or isinstance(value, float)):
        raise _wrong(where, f"`{name}` must be a number")
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
