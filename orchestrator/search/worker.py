"""A sweep's worker that also measures mixtures: the jobs of a search, on the same actors.

A payload of kind `probe` names the bank and the tokens, which stay in memory from one job to the next, and what is to
be measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from orchestrator.search.bank_files import variants_of
from orchestrator.search.space import Space
from orchestrator.worker import Worker

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from orchestrator.search.probe import Key, Mixture, Probe

FACTORY = "orchestrator.search.worker:SearchWorker"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all probes of a search have in common, as plain data.

    Args:
        key: content hash of all of it.
        model: `source`, `dtype` and `digest`.
        artifacts: the bank: (weight_bits, group_size) -> directory.
        windows: int64 [W, T]: those of the search, then those of the guard.
    """

    key: str
    model: Mapping[str, str]
    space: Space
    artifacts: Mapping[Key, str]
    windows: NDArray[np.int64]


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

    _probe: Probe | None = None
    _setting: str | None = None

    def _do(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        if payload["kind"] == "probe":
            return self._measure(payload["setting"], payload)
        if self._probe is not None:
            self._end_probe()
        return super()._do(payload)

    def _measure(self, setting: Setting, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Losses of every request, in order: a list of (divergence, nll) of each of its windows."""
        probe = self._prepared(setting, payload)
        requests: Sequence[Request] = payload["requests"]
        told = self._progress("allocation")
        losses = []
        for done, request in enumerate(requests, 1):
            losses.append([tuple(loss) for loss in probe.losses(request.mixture, request.windows, base=request.base)])
            told(done, len(requests))
        return {"losses": losses}

    def _prepared(self, setting: Setting, payload: Mapping[str, Any]) -> Probe:
        from orchestrator.search.probe import Probe

        if self._probe is None or self._setting != setting.key:
            self._end_probe()
            model = self._load(setting.model)
            self._remove_artifact()
            read, _ = self._reference(payload)
            self._report("opening the bank")
            variants = variants_of(setting.artifacts)
            self._probe = Probe(model, setting.space, variants, setting.windows, cache(read))
            self._setting = setting.key
        return self._probe

    def _end_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()
        self._probe = self._setting = None

    def _let_go(self) -> None:
        self._probe = self._setting = None  # with the model
        super()._let_go()
