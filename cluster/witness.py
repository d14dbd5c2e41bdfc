"""A file by which workers tell whether they see what the driver sees: it holds a token that nobody can guess."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Witness:
    """Where the file is, and what it holds where it is the same file."""

    path: str
    token: str

    @property
    def is_seen(self) -> bool:
        """Whether this process sees it. Another machine may have a directory of that name, but not with this in it."""
        try:
            return Path(self.path).read_text(encoding="ascii") == self.token
        except (OSError, UnicodeDecodeError):
            return False
