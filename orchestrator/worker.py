"""What a worker does with a job. Lives in an actor; keeps the model and the last artifact in memory.

A job's payload and outcome are plain data: `payload_of` builds the one, `Worker.run` returns the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.devices import Claim
from cluster.failures import is_out_of_memory
from orchestrator.artifacts import Artifact, ArtifactWriter, find_artifact, set_aside
from orchestrator.config import PerplexityConfig
from orchestrator.errors import DamagedFileError
from orchestrator.execution import installed_for
from orchestrator.facts import (
    ARTIFACT_MADE,
    MODEL_LOADED,
    REFERENCE_COMPUTED,
    REFERENCE_READ,
    STATISTICS_COMPUTED,
    STATISTICS_READ,
    Facts,
)
from orchestrator.inputs import Inputs, divergence_facts, evaluation_windows_of
from orchestrator.layout import Layout
from orchestrator.making import quantize_into
from orchestrator.measured import (
    divergence_outcome,
    examinable,
    own_divergence_outcome,
    perplexity_outcome,
    task_outcome,
)
from orchestrator.memory import PeakMemory, give_back_freed_memory
from orchestrator.plan import Job
from orchestrator.scheme import Scheme
from orchestrator.shared_cache import SharedCache
from orchestrator.slices import slice_outcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from evaluators.divergence import TopTokens
    from evaluators.perplexity import PerplexityResult
    from quantizers.block_source import BlockSource
    from quantizers.method import Method
    from quantizers.statistics import InputStatistics
    from quantizers.stream import SharedStatistics

FACTORY = "orchestrator.worker:Worker"
_LAYER_FIELDS = (
    "out_features",
    "in_features",
    "stored_bytes",
    "published_bits_per_weight",
    "weight_error",
    "output_error",
    "damping",
    "seconds",
)


def payload_of(
    job: Job,
    inputs: Inputs,
    layout: Layout,
    *,
    memory_share: float = 1.0,
    cache: Path | None = None,
    sees_output: bool = True,
) -> dict[str, Any]:
    """A job with all it needs, as plain data.

    Args:
        job: what to do.
        inputs: models, tokens and permissions.
        layout: where artifacts lie.
        memory_share: how much to compute at a time, of what suits the device; below 1 where that did not fit.
        cache: what sweeps share; None is nothing.
        sees_output: whether the worker sees `layout`; else artifacts lie in its node's cache.
    """
    cell, model = job.cell, inputs.models[job.cell.model]
    payload: dict[str, Any] = {
        "kind": job.kind,
        "id": job.id,
        "label": job.label,
        "model": {"source": model.source, "dtype": model.dtype, "digest": model.digest},
        "scheme": cell.scheme,
        "artifact": str(layout.artifact(cell.key).absolute()) if cell.scheme else None,
        "cell": cell.id,
        "memory_share": memory_share,
        "cache": None if cache is None else str(cache),
        "sees_output": sees_output,
    }
    if job.kind == "quantize":
        payload["windows"] = inputs.calibrations[cell.model, cell.calibration.key] if cell.calibration else None
    else:
        if job.evaluation is None:
            raise AssertionError("an evaluate job has an evaluation")
        payload["evaluation"] = job.evaluation.model_dump(mode="json")
        payload["windows"] = evaluation_windows_of(inputs, cell.model, job.evaluation)
        payload["allow_code_execution"] = inputs.allow_code_execution
        payload["slice"] = job.slice
        payload["execution"] = job.execution
    return payload


class Worker:
    """Quantizes and evaluates on one device."""

    def __init__(self, *, device: Claim, threads: int, report: Callable[[str], None]) -> None:
        """Nothing heavy happens before the first job.

        Args:
            device: the device this worker owns.
            threads: torch threads.
            report: takes one line on what is being done.
        """
        self._device = device
        self._threads = threads
        self._report = report
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._digest: str | None = None
        self._applied: tuple[str, str] | None = None  # the artifact in the model, and how it is executed
        self._installed = ExitStack()  # put-back of the weights of the last artifact
        self._facts = Facts()
        self._cache: SharedCache | None = None

    def run(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Do one job.

        Returns:
            `seconds`, `peak_memory_bytes`, where it was measured (`device`, `software`, `cpu_fallback`), `reused`,
            `quantize_seconds`, `stored_bytes`, `layers` (quantize), and `metrics`, `items`, `protocol`, `warnings`
            (evaluate), or `slice` (a slice of an evaluation); and what `facts.py` has.
        """
        import torch

        from orchestrator.models.float_products import fast_products

        torch.set_num_threads(self._threads)  # per thread: the actor may run each job on another one
        self._facts = Facts()
        payload = _here(payload)
        self._cache = SharedCache(Path(payload["cache"]), self._facts.warn) if payload["cache"] else None
        found = self._found(payload)
        if found is not None:
            return self._facts.beside(found | {"reused": True})
        try:
            with PeakMemory(self._device.torch_device) as memory, fast_products(self._device.torch_device):
                started = time.perf_counter()
                outcome = self._do(payload)
                outcome["seconds"] = time.perf_counter() - started
        except Exception as error:
            if is_out_of_memory(error):
                self._let_go()
            raise
        outcome |= {
            "device": self._device.name,
            "software": dict(self._device.software),
            "cpu_fallback": self._device.cpu_fallback,
            "peak_memory_bytes": memory.peak_bytes,
        }
        if self._cache is not None and payload["kind"] == "evaluate":
            self._cache.put_outcome(payload["id"], self._device_kind, outcome)
        return self._facts.beside(outcome)

    def _do(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        return self._quantize(payload) if payload["kind"] == "quantize" else self._evaluate(payload)

    @property
    def _device_kind(self) -> str:
        return self._device.torch_device.partition(":")[0]

    def _found(self, payload: Mapping[str, Any]) -> dict[str, Any] | None:
        """What another sweep measured, which needs neither the model nor the artifact."""
        if self._cache is None or payload["kind"] != "evaluate":
            return None
        return self._cache.outcome(payload["id"], self._device_kind)

    def _let_go(self) -> None:
        """After an out-of-memory: keep nothing that the next job, or another worker of this device, could use."""
        import gc

        import torch

        self._installed = ExitStack()  # the model goes as a whole, so that nothing need be put back
        self._model = self._digest = self._applied = None
        gc.collect()
        if self._device.torch_device != "cpu":
            torch.get_device_module(self._device.torch_device).empty_cache()

    def _load(self, model: Mapping[str, str]) -> PreTrainedModel:
        from orchestrator.models.loading import load_model, load_tokenizer, verified_directory

        if self._digest != model["digest"] or self._model is None:
            self._report("loading the model")
            self._remove_artifact()
            self._model = None
            started = time.perf_counter()
            directory = verified_directory(model, "model")
            loaded = load_model(directory, model["dtype"])
            self._model = loaded.to(self._device.torch_device)
            self._tokenizer = load_tokenizer(directory)
            self._digest = model["digest"]
            self._facts.add(MODEL_LOADED, started)
        return self._model

    def _remove_artifact(self) -> None:
        self._installed.close()
        self._installed = ExitStack()
        self._applied = None
        give_back_freed_memory()

    def _quantize(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        directory = Path(payload["artifact"])
        try:
            artifact = find_artifact(directory)
        except DamagedFileError:
            set_aside(directory)
            artifact = None
        if artifact is None and self._cache is not None:
            artifact = self._cache.take_artifact(directory, cell=payload["cell"], model=payload["model"])
        reused = artifact is not None
        if artifact is None:
            artifact = self._make_artifact(payload, directory)
        if self._cache is not None:
            self._cache.put_artifact(artifact)
        layers = [
            {"layer": name, "bits_per_weight": _bits_per_weight(linear)} | {key: linear[key] for key in _LAYER_FIELDS}
            for section in ("linears", "vocabulary")
            for name, linear in artifact.manifest.get(section, {}).items()
        ]
        return {"layers": layers, "reused": reused, **_cost(artifact)}

    def _make_artifact(self, payload: Mapping[str, Any], directory: Path) -> Artifact:
        import torch

        from orchestrator.models.loading import verified_directory
        from orchestrator.models.streaming import StreamedModel

        scheme: Scheme = payload["scheme"]
        # The engine reads the float weights block by block; the model in memory, if any, is for evaluating.
        model = payload["model"]
        source = StreamedModel(verified_directory(model, "model"), model["dtype"], self._device.torch_device)
        windows = payload["windows"]
        tokens = None if windows is None else torch.tensor(windows)
        method = scheme.build()
        give_back_freed_memory()
        started = time.perf_counter()
        writer = ArtifactWriter(directory)
        try:
            shared = self._shared_statistics(source, method, model, windows)
            told = self._progress("quantizing block")
            quantize_into(writer, source, scheme, tokens, shared=shared, report=self._report, progress=told)
            artifact = writer.finish(
                cell=payload["cell"],
                model=payload["model"],
                scheme=scheme.as_entry(),
                code_version=scheme.code_version,
                seconds=time.perf_counter() - started,
            )
        except BaseException:
            writer.discard()
            raise
        self._facts.add(ARTIFACT_MADE, started)
        return artifact

    def _shared_statistics(
        self, source: BlockSource, method: Method, model: Mapping[str, str], windows: NDArray[np.int64] | None
    ) -> SharedStatistics | None:
        """Statistics of the float model that other cells may have computed already."""
        import torch

        from orchestrator.models.source import node_cache
        from orchestrator.shared_statistics import shared_statistics, statistics_key
        from quantizers.float_statistics import collect_float_statistics
        from quantizers.stream import needs_shared, shares_hessians

        if windows is None or not needs_shared(method):
            return None
        hessians = shares_hessians(method)
        fact, started = STATISTICS_READ, time.perf_counter()

        def compute() -> Iterator[Sequence[InputStatistics]]:
            nonlocal fact, started
            fact, started = STATISTICS_COMPUTED, time.perf_counter()  # what was waited for before is no part of it
            told = self._progress("statistics of block")
            return collect_float_statistics(source, torch.tensor(windows), hessians=hessians, progress=told)

        self._report("waiting for statistics of the float model")
        place = self._cache.statistics if self._cache is not None else node_cache() / "statistics"
        directory = place / statistics_key(model, windows, hessians=hessians)
        shared = shared_statistics(directory, compute, source.device)
        self._facts.add(fact, started)
        return shared

    def _evaluate(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        model = self._load(payload["model"])
        evaluation = payload["evaluation"]
        asked = None if "name" in evaluation else PerplexityConfig.model_validate(evaluation)
        # Before the artifact is installed, because it is of the unquantized model.
        reference = self._reference(payload) if asked is not None and asked.divergence else None
        cost: dict[str, Any] = {"quantize_seconds": None, "stored_bytes": None, "published_bits_per_weight": None}
        if payload["artifact"] is None:
            self._remove_artifact()
        else:
            cost = self._install(model, Path(payload["artifact"]), payload["execution"])
        measured = self._task(evaluation, payload) if asked is None else self._perplexity(asked, payload, reference)
        return {"reused": False, **cost, **measured}

    def _install(self, model: PreTrainedModel, directory: Path, execution: str) -> dict[str, Any]:
        try:
            artifact = find_artifact(directory)
            if artifact is None:
                raise DamagedFileError(f"artifact {directory} is gone")
            if self._applied != (str(directory), execution):
                self._report("decoding the artifact")
                self._remove_artifact()
                self._installed.enter_context(installed_for(execution, self._device, model, artifact.blocks()))
                self._applied = str(directory), execution
        except DamagedFileError:
            set_aside(directory)
            raise
        return _cost(artifact)

    def _reference(self, payload: Mapping[str, Any]) -> tuple[Callable[[int], TopTokens], PerplexityResult | None]:
        """What the unquantized model finds likely; and its perplexity, where it had to be run for that just now."""
        from evaluators.divergence import Recorder
        from evaluators.perplexity import perplexity, window_tokens
        from orchestrator.fp_reference import fp_reference, reference_key
        from orchestrator.models.source import node_cache

        windows, top_k = payload["windows"], divergence_facts()["top_k"]
        measured: list[PerplexityResult] = []
        fact, started = REFERENCE_READ, time.perf_counter()

        def record(write: Callable[[int, TopTokens], None]) -> None:
            nonlocal fact, started
            fact, started = REFERENCE_COMPUTED, time.perf_counter()
            self._remove_artifact()
            recorder = Recorder(window_tokens(windows), write, k=top_k)
            told = self._progress("perplexity of the unquantized model: window")
            measured.append(perplexity(self._model, windows, progress=told, observe=recorder))

        place = self._cache.references if self._cache is not None else node_cache() / "references"
        key = reference_key(payload["model"], windows, top_k=top_k, device=self._device_kind)
        read = fp_reference(place / key, len(windows), record, self._report)
        self._facts.add(fact, started)
        return read, measured[0] if measured else None

    def _perplexity(
        self,
        asked: PerplexityConfig,
        payload: Mapping[str, Any],
        reference: tuple[Callable[[int], TopTokens], PerplexityResult | None] | None,
    ) -> dict[str, Any]:
        from evaluators.divergence import Comparison
        from evaluators.perplexity import perplexity, window_tokens

        windows, is_fp = payload["windows"], payload["artifact"] is None
        comparison = Comparison(window_tokens(windows), reference[0]) if reference and not is_fp else None
        # One forward serves the perplexity and the divergence, and what was just recorded is not run again.
        result = reference[1] if reference and is_fp else None
        if result is None:
            told = self._progress("perplexity: window")
            result = perplexity(self._model, windows, progress=told, observe=comparison)
        outcome = perplexity_outcome(asked, result)
        if reference:
            facts = divergence_facts()
            beside = (
                divergence_outcome(comparison.result(), facts) if comparison else own_divergence_outcome(result, facts)
            )
            outcome |= {name: outcome[name] + beside[name] for name in beside}
        warnings = []
        if is_fp:
            from evaluators.gate import bos_warning

            warnings.append(bos_warning(self._model, self._tokenizer, windows))
        return outcome | {"forensics": self._forensics(windows, result), "warnings": [w for w in warnings if w]}

    def _forensics(self, windows: NDArray[np.int64], result: PerplexityResult) -> dict[str, Any] | None:
        if math.isfinite(result.perplexity):
            return None
        from evaluators.forensics import examine

        self._report("looking for where the values cease to be finite")
        looked_at, nlls, first = examinable(windows, result.window_nlls)
        record = examine(self._model, looked_at, window_nlls=nlls).as_json()
        return record | {"window": first + record["window"]}

    def _task(self, evaluation: Mapping[str, Any], payload: Mapping[str, Any]) -> dict[str, Any]:
        from evaluators.harness import evaluate_task

        result = evaluate_task(
            self._model,
            self._tokenizer,
            evaluation["name"],
            limit=evaluation["limit"],
            num_fewshot=evaluation["num_fewshot"],
            chat=evaluation["chat"],
            thinking_tokens=evaluation["thinking_tokens"],
            allow_code_execution=payload["allow_code_execution"],
            as_hflm=evaluation["rounding"] == "hflm",
            part=payload["slice"],
            memory_share=payload["memory_share"],
            progress=self._progress(f"{evaluation['name']}: request"),
        )
        if payload["slice"] is not None:
            return slice_outcome(result)
        return task_outcome(result, limit=evaluation["limit"], is_fp=payload["artifact"] is None)

    def _progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self._report(f"{what} {done}/{total}")


def _here(payload: Mapping[str, Any]) -> Mapping[str, Any]:
    """The payload with the artifact's place as this node sees it."""
    from orchestrator.models.source import node_cache

    if payload["sees_output"] or payload["artifact"] is None:
        return payload
    return {**payload, "artifact": str(node_cache() / "artifacts" / Path(payload["artifact"]).name)}


def _cost(artifact: Artifact) -> dict[str, Any]:
    return {
        "quantize_seconds": artifact.manifest["seconds"],
        "stored_bytes": artifact.stored_bytes,
        "published_bits_per_weight": artifact.published_bits_per_weight,
    }


def _bits_per_weight(linear: Mapping[str, Any]) -> float:
    return float(8 * linear["stored_bytes"] / (linear["out_features"] * linear["in_features"]))
