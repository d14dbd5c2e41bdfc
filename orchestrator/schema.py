"""The Parquet tables, each declared once. Other tools rely on these names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
_TIMESTAMP = "timestamp[us, tz=UTC]"


@dataclass(frozen=True, eq=False)
class Table:
    """One Parquet table: its folder under the sweep's output and its columns in order."""

    name: str
    columns: dict[str, str]

    def arrow(self) -> pa.Schema:
        """The pyarrow schema of this table."""
        import pyarrow as pa

        types = {
            "string": pa.string(),
            "int64": pa.int64(),
            "float64": pa.float64(),
            "bool": pa.bool_(),
            "list<float64>": pa.list_(pa.float64()),
            _TIMESTAMP: pa.timestamp("us", tz="UTC"),
        }
        return pa.schema([pa.field(name, types[kind]) for name, kind in self.columns.items()])


# Columns that say which cell a row belongs to; every cell has the same values in every table.
_CELL = {
    "sweep": "string",
    "cell_id": "string",
    "job_id": "string",
    "model": "string",
    "method": "string",
    "weight_bits": "int64",  # 16 for the unquantized model (method "fp")
    "activation_bits": "int64",  # 16 where activations are left alone
    "group_size": "int64",  # input columns that share a scale; 0 is one per output channel
    "symmetric": "bool",
    "options": "string",  # JSON of the method's options, keys sorted
    "calibration": "string",  # JSON of the calibration recipe; null where the method needs no data
}

# One row per cell, task and metric. A failed job leaves one row whose task is the job's and whose value is null.
RESULTS = Table(
    "results",
    _CELL
    | {
        "task": "string",  # a corpus for perplexity, an lm-eval task name otherwise; "quantize" for a failed one
        "metric": "string",  # perplexity, kl_divergence, top1_agreement, acc, acc_norm, ...
        "value": "float64",
        "stderr": "float64",
        "n": "int64",  # scored tokens (perplexity) or items (tasks)
        "higher_is_better": "bool",
        "protocol": "string",  # JSON: window length, shots, limit, task version, ...
        "status": "string",  # ok | non_finite | failed
        "error_kind": "string",
        "error": "string",
        "decoder_bits_per_weight": "float64",  # scales, zeros and permutations counted
        "published_bits_per_weight": "float64",  # by the method's own convention, where it leaves out what is stored
        "checkpoint_bytes": "int64",
        "forensics": "string",  # JSON: where and how a non-finite value began; null otherwise
        "quantize_seconds": "float64",
        "evaluate_seconds": "float64",
        "peak_memory_bytes": "int64",
        "worker": "string",
        "device": "string",
        "software": "string",  # JSON: versions of torch and what is under it (cuda; torch_npu, cann, driver)
        "cpu_fallback": "bool",  # operators that an NPU lacks may have run on the CPU; null where there was no NPU
        "execution": "string",  # simulated | native
        "seed": "int64",  # of the calibration; null where no data was looked at
        "code_version": "string",
        "started_at": _TIMESTAMP,
        "finished_at": _TIMESTAMP,
    },
)

# One row per scored item: a question of a task, or a window of a corpus.
ITEMS = Table(
    "items",
    _CELL
    | {
        "task": "string",
        "subtask": "string",  # the task of a group (mmlu) that the document belongs to; null outside of groups
        "doc_id": "int64",  # in a group, counted through all documents of its tasks
        "log_likelihoods": "list<float64>",  # natural log, one per choice; one per window for perplexity
        "target": "int64",  # index of the right choice
        "answer": "string",  # the generated text, cut before its first stop string; null where choices were scored
        "thought": "string",  # what the model thought before it; null where it did not
        "answer_tokens": "int64",  # of both
        "is_cut": "bool",  # the text was cut at its longest allowed length
        "is_loop": "bool",  # it ends in one piece over and over
        "metric": "string",
        # 1.0 right, 0.0 wrong for accuracies; for windows the mean negative log-likelihood (nll) or divergence
        "value": "float64",
    },
)

# One row per quantized linear, and per embedding or head where they are quantized.
LAYERS = Table(
    "layers",
    _CELL
    | {
        "layer": "string",
        "out_features": "int64",
        "in_features": "int64",
        "bits_per_weight": "float64",
        "stored_bytes": "int64",
        "published_bits_per_weight": "float64",
        "weight_error": "float64",  # |W - Q|^2 / |W|^2
        "output_error": "float64",  # tr((W-Q) H (W-Q)^T) / tr(W H W^T); null where no data was seen
        "damping": "float64",  # the rung of the damping ladder that factorized; null for data-free methods
        "seconds": "float64",
    },
)

# One row per finished slice of a task whose other slices are not finished yet. Nobody reads it but the driver: when the
# last slice is done, the task's rows are put into results and items, and its slices' go.
SLICES = Table(
    "slices",
    {
        "sweep": "string",
        "cell_id": "string",
        "job_id": "string",
        "whole_id": "string",  # the job_id of the rows to come
        "outcome": "string",  # JSON of what the worker found
        "worker": "string",
        "device": "string",
        "started_at": _TIMESTAMP,
        "finished_at": _TIMESTAMP,
    },
)

# What happened to each job: planned work is not here, only what was tried.
EVENTS = Table(
    "events",
    {
        "sweep": "string",
        "session": "string",  # one start of the driver
        # session_started|started|finished|reused|merged|failed|retried|redone|worker_joined|worker_lost|warning|
        # session_ended; set_aside: a damaged part held rows of this job, which is to be done again;
        # model_loaded|statistics_computed|statistics_read|reference_computed|reference_read|artifact_made: what a
        # worker did for this job besides its result
        "event": "string",
        "job_id": "string",
        "cell_id": "string",
        "job": "string",  # readable name: "smollm2-135m rtn w4 g64: arc_easy"
        "attempt": "int64",
        "worker": "string",
        "device": "string",
        "status": "string",
        "error_kind": "string",
        "error": "string",
        "seconds": "float64",  # that this took; of session_started, that all is estimated to take
        "peak_memory_bytes": "int64",  # of finished: the job's, of the device where there is one, else the process's
        "jobs": "int64",  # of session_started: how many the plan has
        "at": _TIMESTAMP,
    },
)

TABLES = {table.name: table for table in (RESULTS, ITEMS, LAYERS, SLICES, EVENTS)}
