"""Texts by our generator against lm-eval's own HFLM at its best batch size: GSM8K with its eight examples, greedily.

In float32, where both must write the same texts, and in the dtype that is the faster here.
Times are of lm-eval's whole `evaluate`. HFLM's batch size is chosen on a part of the documents.
"""

import copy

from rich.console import Console
from rich.table import Table

from tests.benchmarks.bench_tasks import load, timed
from tests.benchmarks.harness import SOURCE, faster_dtype

TASK = "gsm8k_cot"
LIMIT = 30
BATCH_SIZES = (1, 4, 8, 16)
PROBED = 16


def measure(root):
    import torch

    from orchestrator.models.loading import load_model, load_tokenizer
    from orchestrator.models.source import resolve_model

    del root
    torch.set_num_threads(1)
    directory = resolve_model(SOURCE, "benchmark")
    tokenizer = load_tokenizer(directory)
    console = Console(width=120)
    figures = {}
    for dtype in dict.fromkeys(("float32", faster_dtype())):
        model = load_model(directory, dtype)
        figures[str(model.dtype)] = compare(console, model, tokenizer)
    show(console, figures)
    return figures


def compare(console, model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    from evaluators.packaged_task import quiet
    from evaluators.scorer import Scorer

    def hflm(batch_size):
        with quiet():
            return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)

    tasks = load((TASK,), None)
    probes = {}
    for size in BATCH_SIZES:
        probes[size] = timed(hflm(size), tasks, PROBED)[0]
        console.print(f"{model.dtype}: HFLM on {PROBED} documents, {size} at a time: {probes[size]:.0f} s")
    best = min(probes, key=probes.get)
    ours_seconds, ours = timed(Scorer(model, tokenizer), tasks, LIMIT)
    hflm_seconds, theirs = timed(hflm(best), tasks, LIMIT)
    pairs = list(zip(texts_of(ours), texts_of(theirs), strict=True))
    return {
        "documents": len(pairs),
        "batch_size": best,
        "seconds": ours_seconds,
        "hflm_seconds": hflm_seconds,
        "times_faster": hflm_seconds / ours_seconds,
        "equal_texts": sum(one == two for one, two in pairs),
    }


def texts_of(found):
    """Document -> its text, before any filter."""
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in found["samples"][TASK]}
    return [texts[document] for document in sorted(texts)]


def show(console, figures):
    table = Table(title=f"{TASK}, SmolLM2-135M, one thread")
    for heading in ("dtype", "documents", "ours s", "HFLM s", "batch", "times faster", "equal texts"):
        table.add_column(heading, justify="left" if heading == "dtype" else "right")
    for dtype, row in figures.items():
        table.add_row(
            dtype,
            str(row["documents"]),
            f"{row['seconds']:.1f}",
            f"{row['hflm_seconds']:.1f}",
            str(row["batch_size"]),
            f"{row['times_faster']:.2f}",
            f"{row['equal_texts']} of {row['documents']}",
        )
    console.print(table)
