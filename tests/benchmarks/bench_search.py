"""The search against the best uniform cell, the knapsack, TPE and chance, on text that nobody steered by.

SmolLM2-135M, a GPTQ bank at group 64. Per calibration seed and budget every sampler gets as many window forwards; what
each chose is quantized in sequence and evaluated as a cell. The baseline is the best uniform cell of no more bytes.
`search_speed` has what a probe costs.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from tests.benchmarks.harness import SOURCE

BUDGETS = (3.3, 3.6, 4.0)
SAMPLERS = ("level-switch", "tpe", "random")
BANK = (2, 3, 4, 5, 6, 8)
EVALUATIONS = 32
# On LAMBADA alone, a search at 3.3 bits was 6% below the knapsack on LAMBADA's other windows, 7% above on BoolQ.
CORPORA = ("lambada", "coqa-stories", "squad-contexts")
# All uniform cells between the bank's least and the largest budget; W4 per channel takes 4.04 bits.
UNIFORM = [
    {"method": "gptq", "weight_bits": 3, "group_size": [32, 64, "per_channel"]},
    {"method": "gptq", "weight_bits": 3, "group_size": 128, "tail_group": True},
]


def measure(root, *, seeds=(0,), budgets=BUDGETS, evaluations=EVALUATIONS):
    console = Console()
    directory = root / "outputs" / "benchmarks" / "search"
    figures = {"budgets": budgets, "evaluations": evaluations, "seeds": {}}
    for seed in seeds:
        for sampler in SAMPLERS:
            console.print(f"seed {seed}: {sampler} ...")
            run(root, directory, seed, sampler, budgets, evaluations)
        figures["seeds"][seed] = read(directory / f"seed-{seed}", budgets)
    show(console, figures)
    return figures


def document(seed, sampler, budgets, evaluations):
    return {
        "name": f"search-seed-{seed}",
        "models": [{"name": "smollm2-135m", "source": SOURCE}],
        "grid": UNIFORM,
        "calibration": {"corpus": "lambada", "samples": 16, "sequence_length": 512, "seed": seed},
        "search": {
            "bank": {"method": "gptq", "weight_bits": list(BANK), "group_size": 64},
            "budgets": list(budgets),
            "sequence_length": 256,
            "windows": 16,
            "guard_windows": 8,
            "corpus": list(CORPORA),
            "sampler": sampler,
            "starts": sampler == "level-switch",  # the others show what they find by themselves
            "evaluations": evaluations,
            "offspring": 16,
            "patience": 1000,  # as many evaluations for all
            "sensitivity": {"bases": ["fp"], "windows": 1},
            "evaluate_starts": True,
            "seed": seed,
        },
        "evaluation": {
            "perplexity": [{"corpus": "boolq-passages", "sequence_length": 1024, "max_windows": 6, "divergence": True}]
        },
        "workers": {"device": "cpu", "count": 2},
    }


def run(root, directory, seed, sampler, budgets, evaluations):
    """One search in a process of its own; the same command again goes on where it was."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"seed-{seed}-{sampler}.yaml"
    file.write_text(yaml.safe_dump(document(seed, sampler, budgets, evaluations), sort_keys=False))
    out = directory / f"seed-{seed}"
    program = [sys.executable, "-c", "from orchestrator.cli import main; main()"]
    with (directory / f"seed-{seed}-{sampler}.log").open("a") as log:
        subprocess.run(
            [*program, "search", str(file), "--out", str(out), "--no-report"],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "RAY_worker_niceness": "0"},
        )
    # The next sampler's run writes its own.
    (out / "search" / "chosen.json").rename(out / f"chosen-{sampler}.json")


def read(out, budgets):
    """Held-out KL, perplexity and stored bits of each contender, of the samplers that have run."""
    from orchestrator.schema import RESULTS
    from orchestrator.search.records import TRIALS, Records
    from orchestrator.store import read_table

    rows = read_table(out, RESULTS).to_pylist()
    cells = {}
    for row in rows:
        if row["status"] == "ok" and row["metric"] in ("kl_divergence", "perplexity"):
            cell = cells.setdefault(row["cell_id"], {"bits": row["decoder_bits_per_weight"], "options": row["options"]})
            cell[row["metric"]] = row["value"]
    files = {sampler: out / f"chosen-{sampler}.json" for sampler in SAMPLERS}
    chosen = {sampler: json.loads(file.read_text()) for sampler, file in files.items() if file.exists()}
    trials = Records(out).rows(TRIALS)
    found = {}
    for place, budget in enumerate(budgets):
        uniform = {
            name: cell
            for name, cell in cells.items()
            if cell["bits"] <= budget and "layers" not in json.loads(cell["options"])
        }
        best = min(uniform, key=lambda name: uniform[name]["kl_divergence"])
        contenders = {"uniform": cells[best] | {"cell": best}}
        for sampler, what in chosen.items():
            study = what["studies"][place]
            facts = ("window_forwards", "seconds", "trials", "loss", "guard_loss")
            contenders[sampler] = cells[study["cell"]] | {"cell": study["cell"]} | {key: study[key] for key in facts}
        for start in chosen["level-switch"]["studies"][place]["starts"]:
            if start["name"].startswith("knapsack"):
                contenders[start["name"]] = cells[start["cell"]] | {"cell": start["cell"]}
        for one in contenders.values():
            one.pop("options")
            one["below_uniform"] = 1 - one["kl_divergence"] / contenders["uniform"]["kl_divergence"]
        study = chosen["level-switch"]["studies"][place]
        own = [row for row in trials if row["study"] == study["study"]]
        found[str(budget)] = {"contenders": contenders, "to_95_percent": cost_of(study, own, 0.95)}
    return found


def cost_of(study, rows, share):
    """Window forwards and seconds until a study had this share of what it gained, on its own windows, over the uniform
    allocation in the end; among them its starts' but not the sensitivities in the float model, which all budgets share.
    """
    uniform = next(start["loss"] for start in study["starts"] if start["name"].startswith("uniform"))
    enough = uniform - share * (uniform - study["loss"])
    complete = [row for row in rows if row["state"] == "complete"]
    # A start that is good enough was measured before the first trial.
    by_start = any(start["loss"] <= enough for start in study["starts"])
    reached = complete[0] if by_start else next(row for row in complete if row["loss"] <= enough)
    return {
        "by_start": by_start,
        "window_forwards": reached["window_forwards"],
        "seconds": reached["seconds"],
        "of_window_forwards": study["window_forwards"],
        "of_seconds": study["seconds"],
    }


def show(console, figures):
    for budget in figures["budgets"]:
        table = Table(title=f"{budget:g} stored bits per weight: held-out KL to fp (perplexity), mean of seeds")
        for column in ("allocation", "bits", "KL", "below uniform", "perplexity"):
            table.add_column(column, justify="right" if column != "allocation" else "left")
        seeds = [found[str(budget)]["contenders"] for found in figures["seeds"].values()]
        for name in dict.fromkeys(name for seed in seeds for name in seed):
            own = [seed[name] for seed in seeds if name in seed]
            mean = {
                key: statistics.fmean(one[key] for one in own)
                for key in ("bits", "kl_divergence", "below_uniform", "perplexity")
            }
            table.add_row(
                name,
                f"{mean['bits']:.3f}",
                f"{mean['kl_divergence']:.4f}",
                f"{mean['below_uniform']:.1%}",
                f"{mean['perplexity']:.2f}",
            )
        console.print(table)


if __name__ == "__main__":  # of directories of seeds, finished or not
    show(
        Console(),
        {"budgets": BUDGETS, "seeds": {place: read(Path(place), BUDGETS) for place in sys.argv[1:]}},
    )
