"""Data sets of the Hugging Face Hub, from its local cache or, where that lacks them, from the Hub; never with code.

`datasets` keeps each in a folder that is named by the commit it came from, so that what was read is known without a
network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class HubSplit:
    """One split of a data set on the Hub.

    Attributes:
        repository: its id.
        split: the split.
        revision: a commit, or a branch where the data set has no commit to name; None: what the cache holds, else the
            newest.
        config: the configuration, where it has several.
        file: the one file to read, where the data set is too large to be read whole.
        options: what else `datasets.load_dataset` is told.
    """

    repository: str
    split: str
    revision: str | None = None
    config: str | None = None
    file: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`Salesforce/wikitext wikitext-2-raw-v1 test`."""
        return " ".join(part for part in (self.repository, self.config, self.file or self.split) if part)

    def load(self) -> Dataset:
        """The split, memory-mapped where the cache has it.

        Raises:
            EvaluationError: neither the local cache nor the Hub gives it, or the cache holds another revision.
        """
        import datasets

        # That a cache is read is no news, and what keeps the Hub away stands in our own error.
        logs = {log: log.level for log in map(logging.getLogger, ("datasets", "huggingface_hub"))}
        for log in logs:
            log.setLevel(logging.ERROR)
        try:
            table = datasets.load_dataset(
                self.repository,
                self.config,
                data_files={self.split: self.file} if self.file else None,
                split=self.split,
                revision=self.revision,
                verification_mode="no_checks",  # a single file is never all that the data set's card lists
                **self.options,
            )
        except Exception as error:  # whatever the Hub, the network or a damaged cache makes it raise
            if (file := self._kept_file()) is not None:
                return datasets.load_dataset(_form(file), data_files={self.split: file}, split=self.split)
            lines = str(error).strip().splitlines() or [""]
            raise DataError(
                f"data set {self.label} is neither in the local cache nor to be had from the Hub "
                f"({type(error).__name__}: {lines[0]}): {self.remedy}"
            ) from error
        finally:
            for log, level in logs.items():
                log.setLevel(level)
        self._check_revision(table)
        return table

    def _kept_file(self) -> str | None:
        """A single file at this revision in the Hub's own cache.

        Without a network `datasets` does not find again what it made of a single file; the file itself is there.
        """
        from huggingface_hub import try_to_load_from_cache

        if self.file is None:
            return None
        found = try_to_load_from_cache(self.repository, self.file, revision=self.revision, repo_type="dataset")
        return found if isinstance(found, str) else None

    def _check_revision(self, table: Dataset) -> None:
        """Offline, `datasets` takes whatever revision its cache has."""
        found = revision_of(table)
        if found and self.revision and COMMIT.fullmatch(self.revision) and found != self.revision:
            raise DataError(
                f"data set {self.label} is in the local cache at revision {found}, but the recipe is of "
                f"{self.revision}: {self.remedy}"
            )

    @property
    def remedy(self) -> str:
        """How to get the data onto a machine that is not connected."""
        arguments = [repr(self.repository)]
        arguments += [repr(self.config)] if self.config else []
        arguments += [f"data_files={ {self.split: self.file} }"] if self.file else []
        arguments += [f"split={self.split!r}"]
        arguments += [f"revision={self.revision!r}"] if self.revision else []
        arguments += ["verification_mode='no_checks'"]
        return (
            "set HF_HOME to a cache that holds it (made on a connected machine by "
            f"datasets.load_dataset({', '.join(arguments)}))"
        )

    def is_cached(self) -> bool:
        """Whether the local cache holds anything of the data set; asks nobody."""
        import datasets
        from datasets.naming import camelcase_to_snakecase

        owner, _, name = self.repository.rpartition("/")
        folder = "___".join(part for part in (owner, camelcase_to_snakecase(name)) if part)
        return (Path(datasets.config.HF_DATASETS_CACHE).expanduser() / folder).is_dir()


def _form(file: str) -> str:
    """By which of its readers `datasets` reads a file."""
    return "parquet" if file.endswith(".parquet") else "json"


def revision_of(table: Dataset) -> str | None:
    """The commit that a table of `HubSplit.load` came from; None where its folder does not say."""
    for file in getattr(table, "cache_files", []):
        folder = file["filename"].replace("\\", "/").split("/")[-2]
        if COMMIT.fullmatch(folder):
            return str(folder)
    return None


def identity_of(split: HubSplit, table: Dataset) -> str:
    """Which data a table holds, for a content hash: the data set at its commit, or by content where none is known."""
    revision = revision_of(table)
    if revision is None:
        digest = hashlib.sha256()
        for row in table:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return f"{split.label} sha256:{digest.hexdigest()}"
    return f"{split.repository} @ {revision}"
