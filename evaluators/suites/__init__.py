"""Suites: lists of tasks by name, one YAML file each beside this one, with shots, limits and the metric to report."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from typing import Any

from evaluators.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """A task of a suite.

    Attributes:
        name: a task or group of `evaluators.tasks`.
        metric: the one that studies report of it; every other is measured too.
        num_fewshot: examples in the prompt; None is the task's own default.
        limit: how many documents; None: all.
        chat: the thinking mode in which prompts are conversations; None: they are plain text.
    """

    name: str
    metric: str
    num_fewshot: int | None = None
    limit: int | None = None
    chat: str | None = None

    @property
    def entry(self) -> dict[str, Any]:
        """As an entry of `tasks` in a sweep file."""
        found = {"name": self.name, "num_fewshot": self.num_fewshot, "limit": self.limit, "chat": self.chat}
        return {key: value for key, value in found.items() if value is not None}


def suite_names() -> list[str]:
    """All suites, sorted."""
    files = importlib.resources.files("evaluators.suites").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_suite(name: object) -> list[SuiteTask]:
    """The tasks of a suite, in its order.

    Raises:
        EvaluationError: no such suite; the nearest name is suggested.
    """
    import yaml

    if not isinstance(name, str) or name not in suite_names():
        raise unknown_name("suite", name, suite_names())
    text = importlib.resources.files("evaluators.suites").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return [SuiteTask(**task) for task in yaml.safe_load(text)["tasks"]]
