"""Tasks by our scorer against lm-eval's own HFLM at its best batch size: same model, dtype and documents, in turn.

Zero-shot HellaSwag, PIQA, ARC-e and ARC-c, and five-shot MMLU. Times are of lm-eval's whole `evaluate`, prompts and
metrics included, on documents prepared before. HFLM's batch size is chosen per task on a part of it. The tokens that
each side computes and the rate at which ours does stand beside the measured peak of matrix products.
"""

import copy
import time

from rich.console import Console
from rich.table import Table

from tests.benchmarks.bench_profile import peak
from tests.benchmarks.harness import SOURCE, faster_dtype

ZERO_SHOT = {"hellaswag": 100, "piqa": 200, "arc_easy": 200, "arc_challenge": 150}
# All of MMLU would take HFLM hours: some subjects, with enough questions each for examples to be shared as in a run.
MMLU_SUBJECTS = ("mmlu_anatomy", "mmlu_astronomy", "mmlu_virology")
MMLU_LIMIT = 30
BATCH_SIZES = (1, 4, 8, 16, 32)
PROBED = 16  # documents on which HFLM's batch sizes are tried


def measure(root):
    import torch

    from orchestrator.models.loading import load_model, load_tokenizer
    from orchestrator.models.source import resolve_model

    del root
    torch.set_num_threads(1)
    directory = resolve_model(SOURCE, "benchmark")
    model, tokenizer = load_model(directory, faster_dtype()), load_tokenizer(directory)
    console = Console(width=120)
    figures = {"dtype": str(model.dtype), "peak_gflops": peak(model.dtype), "tasks": {}}
    for name, limit in ZERO_SHOT.items():
        figures["tasks"][name] = compare(console, model, tokenizer, name, (name,), limit, 0)
    figures["tasks"]["mmlu, 5-shot"] = compare(console, model, tokenizer, "mmlu, 5-shot", MMLU_SUBJECTS, MMLU_LIMIT, 5)
    zero = [figures["tasks"][name] for name in ZERO_SHOT]
    figures["zero_shot_times_faster"] = sum(row["hflm_seconds"] for row in zero) / sum(row["seconds"] for row in zero)
    show(console, figures)
    return figures


def compare(console, model, tokenizer, label, names, limit, num_fewshot):
    from lm_eval.models.huggingface import HFLM

    from evaluators.packaged_task import quiet
    from evaluators.scorer import Scorer

    def hflm(batch_size):
        with quiet():
            return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)

    console.print(f"{label} ...")
    tasks = load(names, num_fewshot)
    probes = {size: timed(hflm(size), tasks, max(1, PROBED // len(names)))[0] for size in BATCH_SIZES}
    best = min(probes, key=probes.get)
    scorer = Scorer(model, tokenizer)
    ours_seconds, ours = timed(scorer, tasks, limit)
    hflm_seconds, theirs = timed(hflm(best), tasks, limit)
    return {
        "documents": sum(len(samples) for samples in ours["samples"].values()),
        "batch_size": best,
        "seconds": ours_seconds,
        "hflm_seconds": hflm_seconds,
        "times_faster": hflm_seconds / ours_seconds,
        "computed_tokens": scorer.work.computed_tokens,
        "distinct_tokens": scorer.work.distinct_tokens,
        "requested_tokens": scorer.work.requested_tokens,
        "gflops": flops(model, scorer.work) / ours_seconds / 1e9,
        "acc": [ours["results"][name]["acc,none"] for name in names],
        "hflm_acc": [theirs["results"][name]["acc,none"] for name in names],
    }


def load(names, num_fewshot):
    from evaluators.packaged_task import load_task
    from evaluators.tasks import TASKS

    tasks = {}
    for name in names:
        tasks[name] = load_task(name, TASKS[name], num_fewshot=num_fewshot)
        tasks[name].set_fewshot_seed(seed=0)
        len(tasks[name].eval_docs)  # prepared once, not in anyone's time
    return tasks


def timed(lm, tasks, limit):
    from lm_eval.evaluator import evaluate

    from evaluators.packaged_task import quiet

    with quiet():
        started = time.perf_counter()
        found = evaluate(lm=lm, task_dict={"tasks": tasks}, limit=limit)
        return time.perf_counter() - started, found


def flops(model, work):
    """Of the linears and of the head; attention is left out."""
    from torch import nn

    decoder = sum(module.weight.numel() for module in model.get_decoder().modules() if isinstance(module, nn.Linear))
    head = model.get_output_embeddings().weight.numel()
    return 2 * (decoder * work.computed_tokens + head * work.scored_positions)


def show(console, figures):
    table = Table(title=f"SmolLM2-135M, {figures['dtype']}, one thread; peak {figures['peak_gflops']:.0f} GFLOP/s")
    for heading in (
        "task",
        "documents",
        "ours s",
        "HFLM s",
        "batch",
        "times faster",
        "tokens",
        "distinct",
        "alone",
        "GFLOP/s",
    ):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for name, row in figures["tasks"].items():
        table.add_row(
            name,
            str(row["documents"]),
            f"{row['seconds']:.1f}",
            f"{row['hflm_seconds']:.1f}",
            str(row["batch_size"]),
            f"{row['times_faster']:.2f}",
            f"{row['computed_tokens']:,}",
            f"{row['distinct_tokens']:,}",
            f"{row['requested_tokens']:,}",
            f"{row['gflops']:.0f}",
        )
    console.print(table)
    console.print(f"the zero-shot tasks together: {figures['zero_shot_times_faster']:.2f} times faster")
