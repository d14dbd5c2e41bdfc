"""What a search leaves in its directory: two Parquet tables that grow while it runs, and two small files.

`search/` lies in the output directory of the sweep that the search ends in, beside its tables. Each part is written
beside and renamed, and rows never change, so anyone may read at any time.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.compaction import visible
from orchestrator.errors import BitatlasError
from orchestrator.parts import read_part, steadily, write_part
from orchestrator.schema import Table
from orchestrator.search.space import Choice, Group, Space

_TIMESTAMP = "timestamp[us, tz=UTC]"

# One row per choice of a group that was measured alone.
SENSITIVITY = Table(
    "sensitivity",
    {
        "search": "string",  # the search's name
        "model": "string",
        "base": "string",  # what all other groups are: fp, or the allocation whose name this is: uniform-4-g64
        "group": "string",  # "model.layers.3.mlp.gate_proj+up_proj", as in space.json
        "weight_bits": "int64",
        "group_size": "int64",  # 0 is per channel
        "loss": "float64",  # the objective: with base fp of this choice alone, else of all of it
        "num_windows": "int64",  # it was measured on
        "at": _TIMESTAMP,
    },
)

# One row per allocation that a study measured, when that was decided; one that was killed undecided has none.
TRIALS = Table(
    "trials",
    {
        "search": "string",
        "model": "string",
        "study": "string",  # "3.6 bits": its name in study.journal
        "sampler": "string",  # level-switch, tpe, ...
        "trial": "int64",  # its number in the study
        "state": "string",  # complete (measured on all windows) | pruned (on fewer) | failed (no number)
        "loss": "float64",  # the objective over the windows it was measured on; lower is better
        "num_windows": "int64",
        "guard_loss": "float64",  # of a new best one: over the held-out guard windows; null for others
        "stored_bytes": "int64",  # of all linears, scales and zeros included
        "bits_per_weight": "float64",  # stored
        "allocation": "string",  # JSON: index of each group's choice, in the order of space.json
        "window_forwards": "int64",  # by the whole study so far, this trial's included: what the search has cost
        "seconds": "float64",  # since the study began, over all its sessions
        "at": _TIMESTAMP,
    },
)


class Records:
    """The directory `search/` of a search."""

    def __init__(self, root: Path) -> None:
        """Name the directory; nothing is touched yet.

        Args:
            root: the output directory of the sweep.
        """
        self.directory = root / "search"
        self.file = self.directory / "search.yaml"
        self.journal = self.directory / "study.journal"
        self.space = self.directory / "space.json"
        self.chosen = self.directory / "chosen.json"
        self._session = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{secrets.token_hex(3)}"
        self._parts = 0

    def add(self, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows; they count once this returns.

        Raises:
            BitatlasError: the disk is full or read-only.
        """
        import pyarrow as pa

        if not rows:
            return
        place = self.directory / table.name
        name = f"{self._session}-{self._parts:06d}.parquet"
        self._parts += 1
        try:
            place.mkdir(parents=True, exist_ok=True)
            scratch = place / f".{name}.tmp"
            write_part(scratch, [pa.Table.from_pylist(list(rows), schema=table.arrow())], table.arrow(), {})
            scratch.replace(place / name)
        except OSError as error:
            raise BitatlasError(
                f"cannot write to {place} ({error.strerror or error}); what is done is kept: mend the disk and run the "
                "same command again"
            ) from error

    def rows(self, table: Table) -> list[dict[str, Any]]:
        """All rows, in the order in which they were written; none where nothing is there yet.

        Raises:
            DamagedPartError: a part cannot be read.
        """
        schema = table.arrow()

        def read() -> list[dict[str, Any]]:
            parts = visible(self.directory / table.name)
            return [row for part in parts for row in read_part(part, schema).to_pylist()]

        return steadily(read)

    def write_json(self, path: Path, value: object) -> None:
        """Write one of the small files, whole or not at all; null stands for what is no finite number (JSON has none).

        Raises:
            BitatlasError: the disk is full or read-only.
        """
        scratch = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(_finite(value), indent=1, allow_nan=False), encoding="utf-8")
            scratch.replace(path)
        except OSError as error:
            raise BitatlasError(
                f"cannot write {path} ({error.strerror or error}); mend the disk, or its path"
            ) from error


def space_as_json(space: Space) -> list[dict[str, Any]]:
    """The groups of a space with their choices, for `space.json`."""
    return [
        {
            "group": group.name,
            **({"role": group.role} if group.role else {}),
            "linears": list(group.linears),
            "num_weights": group.num_weights,
            "choices": [
                {"weight_bits": one.weight_bits, "group_size": one.group_size, "stored_bytes": one.stored_bytes}
                for one in group.choices
            ],
        }
        for group in space.groups
    ]


def space_from_json(groups: Sequence[Mapping[str, Any]]) -> Space:
    """The space that `space_as_json` wrote."""
    return Space(
        tuple(
            Group(
                linears=tuple(group["linears"]),
                num_weights=group["num_weights"],
                choices=tuple(Choice(**choice) for choice in group["choices"]),
                role=group.get("role", ""),
            )
            for group in groups
        )
    )


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
