"""Packages that only some of lm-eval's tasks need: looked up, never imported, before anything depends on them."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from evaluators.errors import EvaluationError


def check_extra(task: str, extra: str) -> None:
    """Refuse a task whose optional packages are not installed as lm-eval's metadata asks for them.

    Args:
        task: its name, for the error.
        extra: lm-eval's name of the set of packages, such as "math".

    Raises:
        EvaluationError: names the packages and the command.
    """
    from packaging.requirements import Requirement

    missing = []
    for line in importlib.metadata.requires("lm-eval") or ():
        requirement = Requirement(line)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if version not in requirement.specifier:
            missing.append(f"{requirement.name}{requirement.specifier} (there is {version})")
    if missing:
        raise EvaluationError(
            f"task {task} needs {', '.join(missing)}, which is not installed: pip install 'lm-eval[{extra}]'"
        )


def check_nltk_data(task: str, resource: str) -> None:
    """Refuse a task whose NLTK resource is not there, because lm-eval would download it without asking.

    Args:
        task: its name, for the error.
        resource: such as "tokenizers/punkt_tab".

    Raises:
        EvaluationError: says how to get it.
    """
    import nltk

    try:
        nltk.data.find(resource)
    except LookupError:
        name = resource.rpartition("/")[2]
        raise EvaluationError(
            f"task {task} needs NLTK's {name}, which is not in {nltk.data.path[0]} nor where else NLTK looks: get "
            f"it by `python -m nltk.downloader {name}`, or copy it there"
        ) from None
