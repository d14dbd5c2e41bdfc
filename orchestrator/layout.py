"""The names of files in a sweep's output directory, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Paths under `outputs/<sweep>/`."""

    root: Path

    @classmethod
    def of(cls, name: str, out: Path | None) -> Layout:
        """The directory that was asked for, or the one of the sweep's name.

        Args:
            name: the sweep's.
            out: `--out`.
        """
        return cls(out if out is not None else Path("outputs") / name)

    @property
    def sweep(self) -> Path:
        """The resolved sweep file."""
        return self.root / "sweep.yaml"

    @property
    def lock(self) -> Path:
        """Held by the one driver that writes here."""
        return self.root / ".lock"

    @property
    def artifacts(self) -> Path:
        """Packed weights, one directory per content key."""
        return self.root / "artifacts"

    @property
    def page(self) -> Path:
        """The report for a browser."""
        return self.root / "atlas.html"

    @property
    def markdown(self) -> Path:
        """The report as text."""
        return self.root / "atlas.md"

    def artifact(self, key: str) -> Path:
        """The directory of one artifact."""
        return self.artifacts / key[:32]

    def table(self, name: str) -> Path:
        """The directory of one table's parts."""
        return self.root / name

    def set_aside(self, name: str) -> Path:
        """Where damaged parts of a table are moved to."""
        return self.root / "set_aside" / name
