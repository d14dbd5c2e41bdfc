"""A sweep's worker that also measures mixtures: the jobs of a search, on the same actors.

A payload of kind `probe` names the bank and the tokens, which stay in memory from one job to the next, and what is to
be measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from orchestrator.search.bank_files import variants_of
from orchestrator.search.space import Space
from orchestrator.worker import Worker

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from orchestrator.search.mixtures import Key, Mixture, Mixtures
    from orchestrator.search.probe import Probe
    from orchestrator.search.task_probe import TaskProbe
    from quantizers.bank import Variant
    from quantizers.grid import Grid

FACTORY = "orchestrator.search.worker:SearchWorker"


@dataclass(frozen=True, kw_only=True)
class TaskUnits:
    """Documents of a task as the windows of a search; a unit is what the scorer packs together.

    Args:
        units: window -> index of its unit: those of the search, then those of the guard.
        total: how many units the task has.
        identity: what the task's scores depend on.
    """

    name: str
    num_fewshot: int | None
    units: tuple[int, ...]
    total: int
    identity: Mapping[str, str]


def facts_of(windows: NDArray[np.int64] | TaskUnits) -> Any:
    """What they are, for a content hash."""
    return asdict(windows) if isinstance(windows, TaskUnits) else windows.tolist()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all probes of a search have in common, as plain data.

    Args:
        key: content hash of all of it.
        model: `source`, `dtype` and `digest`.
        artifacts: the bank: (weight_bits, group_size) -> directory.
        matrices: name of the embedding or the head -> (weight_bits, group_size) -> grid; they are not in the bank,
            as each worker rounds them in seconds.
        windows: int64 [W, T]: those of the search, then those of the guard; or units of a task.
    """

    key: str
    model: Mapping[str, str]
    space: Space
    artifacts: Mapping[Key, str]
    windows: NDArray[np.int64] | TaskUnits
    matrices: Mapping[str, Mapping[Key, Grid]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One mixture on some windows.

    Args:
        base: see `Probe.losses`.
    """

    mixture: Mixture
    windows: tuple[int, ...]
    base: Mixture | None = None


def probe_payload(setting: Setting, requests: Sequence[Request], label: str, memory_share: float) -> dict[str, Any]:
    """A job with all it needs, as plain data."""
    return {
        "kind": "probe",
        "id": "",
        "label": label,
        "model": dict(setting.model),
        "artifact": None,
        "windows": setting.windows,
        "setting": setting,
        "requests": list(requests),
        "memory_share": memory_share,
        "cache": None,
        "sees_output": True,
    }


class SearchWorker(Worker):
    """Quantizes, evaluates and probes on one device."""

    _probe: Probe | TaskProbe | None = None
    _setting: str | None = None

    def _do(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        if payload["kind"] == "probe":
            return self._measure(payload["setting"], payload)
        if self._probe is not None:
            self._end_probe()
        return super()._do(payload)

    def _measure(self, setting: Setting, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Losses of every request, in order: of each window (divergence, nll), or of a task (cross entropy,)."""
        probe = self._prepared(setting, payload)
        requests: Sequence[Request] = payload["requests"]
        told = self._progress("allocation")
        losses = []
        for done, request in enumerate(requests, 1):
            losses.append([tuple(loss) for loss in probe.losses(request.mixture, request.windows, base=request.base)])
            told(done, len(requests))
        return {"losses": losses}

    def _prepared(self, setting: Setting, payload: Mapping[str, Any]) -> Probe | TaskProbe:
        from orchestrator.search.probe import Probe
        from orchestrator.search.task_probe import TaskProbe

        if self._probe is None or self._setting != setting.key:
            self._end_probe()
            model = self._load(setting.model)
            self._remove_artifact()
            windows = setting.windows
            if isinstance(windows, TaskUnits):
                loss = partial(self._choices_loss, windows, memory_share=payload["memory_share"])
                self._probe = TaskProbe(self._mixtures(model, setting), loss)
            else:
                read, _ = self._reference(payload)  # before a bank has hold of the weights
                self._probe = Probe(self._mixtures(model, setting), windows, cache(read))
            self._setting = setting.key
        return self._probe

    def _mixtures(self, model: Any, setting: Setting) -> Mixtures:
        from orchestrator.search.mixtures import Mixtures
        from quantizers.vocabulary import PackedMatrix

        self._report("opening the bank")
        variants: dict[str, Mapping[Key, Variant]] = {**variants_of(setting.artifacts)}
        for name, grids in setting.matrices.items():
            weight = model.get_submodule(name).weight
            variants[name] = {key: PackedMatrix(name, weight, grid) for key, grid in grids.items()}
        return Mixtures(model, setting.space, variants)

    def _choices_loss(self, of: TaskUnits, window: int, *, memory_share: float) -> float:
        """Of the model as it is, on one unit of the task."""
        from evaluators.harness import evaluate_task
        from evaluators.slices import Slice
        from orchestrator.search.task_probe import choices_loss

        found = evaluate_task(
            self._model,
            self._tokenizer,
            of.name,
            num_fewshot=of.num_fewshot,
            part=Slice(of.units[window], of.total),
            memory_share=memory_share,
        )
        return choices_loss(found.items)

    def _end_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()
        self._probe = self._setting = None

    def _let_go(self) -> None:
        self._probe = self._setting = None  # with the model
        super()._let_go()
