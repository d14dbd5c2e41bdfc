"""The Optuna study of a search: its storage in the output directory, and samplers by name.

The storage is a journal, a text file that is only ever added to: what was told before a driver was killed is there, and
`optuna-dashboard DIR/search/study.journal` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from orchestrator.errors import BitatlasError
from orchestrator.search.sampler import LevelSwitchSampler, Within
from orchestrator.search.space import Allocation, Space
from orchestrator.search.switches import Losses

STARTED = ("level-switch", "tpe", "gp")
"""Samplers whose first trial is the start; what is by chance is so from the first trial on."""
_PROGRESS = "progress"
USUAL = ("level-switch", "nsga2")
STAGED = ("level-switch",)
"""Samplers that understand trials which were measured on few windows."""


def study_name(what: str, sampler: str, seed: int, *, alone: bool = False) -> str:
    """ "3.6 bits", "3.6 bits, tpe, seed 1": searches by several samplers may stand in one journal.

    Args:
        alone: without starts.
    """
    parts = [what, *([] if sampler in USUAL else [sampler]), *(["alone"] if alone else [])]
    return ", ".join([*parts, *([f"seed {seed}"] if seed else [])])


class KeptStudy:
    """A study in memory, whose ended trials are kept in the journal.

    A journal waits for the disk with every entry, and a trial of a hundred parameters that is asked of it makes a
    hundred; here an ended trial is one. What a killed driver had not kept, it never asked for.

    Attributes:
        study: to ask and to tell.
    """

    def __init__(
        self, journal: Path, name: str, sampler: BaseSampler, directions: Sequence[str] = ("minimize",)
    ) -> None:
        """Read what is kept under this name.

        Raises:
            BitatlasError: the journal cannot be read or written.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            storage = JournalStorage(JournalFileBackend(str(journal)))
            self._kept = optuna.create_study(
                storage=storage, study_name=name, directions=list(directions), load_if_exists=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise BitatlasError(
                f"{journal} cannot be used as the search's journal ({error}); mend it, or choose another --out"
            ) from error
        self.study = optuna.create_study(study_name=name, sampler=sampler, directions=list(directions))
        kept = self._kept.get_trials(deepcopy=False)
        self.study.add_trials(kept)
        self._count = len(kept)

    @property
    def progress(self) -> Mapping[str, Any]:
        """What `keep` was given last; empty before."""
        return self._kept.user_attrs.get(_PROGRESS, {})  # type: ignore[no-any-return]  # optuna is not followed

    def keep(self, progress: Mapping[str, Any]) -> None:
        """Write the trials that have ended since, and numbers beside them.

        Raises:
            BitatlasError: the disk is full or read-only.
        """
        new = self.study.get_trials(deepcopy=False)[self._count :]
        try:
            self._kept.add_trials(new)
            self._kept.set_user_attr(_PROGRESS, dict(progress))
        except OSError as error:
            raise BitatlasError(
                f"cannot write the search's journal ({error.strerror or error}); what is done is kept: mend the disk "
                "and run the same command again"
            ) from error
        self._count += len(new)


def budget_sampler(
    name: str, space: Space, budget_bytes: int, *, start: Allocation | None, seed: int, losses: Losses | None = None
) -> BaseSampler:
    """A sampler all of whose trials fit the budget.

    Args:
        start: where level switches begin.
        losses: of single choices; guide level switches.
    """
    if name == "level-switch":
        if start is None:
            raise AssertionError("level switches begin with a start")
        return LevelSwitchSampler(space, budget_bytes, start=start, seed=seed, losses=losses)
    return Within(_inner(name, seed), space, budget_bytes, seed=seed)


def front_sampler(name: str, seed: int) -> BaseSampler:
    """A sampler of two objectives."""
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=24)
    return _inner(name, seed)


def _inner(name: str, seed: int) -> BaseSampler:
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    raise AssertionError(f"no sampler {name!r}")
