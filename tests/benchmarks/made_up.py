"""Sweeps without a model behind them, for benchmarks of the plan, the store, the schedule and the driver."""

from pathlib import Path

from rich.table import Table


def document(models, *, damping=(0.01, 0.02, 0.05, 0.1), act_order=(True, False), seeds=1, **sections):
    """A sweep of GPTQ, 1 to 8 bits at four group sizes, times the options, times the calibration seeds."""
    return {
        "name": "made-up",
        "models": [{"name": f"m{index}", "source": f"far/m{index}"} for index in range(models)],
        "grid": [
            {
                "method": "gptq",
                "weight_bits": [1, 2, 3, 4, 5, 6, 7, 8],
                "group_size": [32, 64, 128, "per_channel"],
                "options": {"damping": list(damping), "act_order": list(act_order)},
            }
        ],
        "calibration": [
            {"corpus": "lambada", "samples": 8, "sequence_length": 128, "seed": seed} for seed in range(seeds)
        ],
        "evaluation": {"perplexity": [{"corpus": "boolq-passages", "sequence_length": 256}]},
    } | sections


def made_up(contents):
    """The sweep of a document, and inputs for jobs that look at no model."""
    import numpy as np

    from orchestrator.config import parse_sweep
    from orchestrator.inputs import Inputs, ModelInput
    from orchestrator.models.loading import ModelShape
    from orchestrator.plan import Identities

    sweep = parse_sweep(contents, "made-up.yaml")
    evaluation, names = sweep.evaluation.perplexity[0], [model.name for model in sweep.models]
    shape = ModelShape(
        linears={f"model.layers.{block}.mlp.{name}": (576, 1536) for block in range(30) for name in ("up", "down")},
        fp_bytes=1 << 28,
        bits_per_value=16,
        max_positions=2048,
        vocabulary=49_152,
    )
    inputs = Inputs(
        models={
            name: ModelInput(source="far", dtype="auto", directory=Path("far"), digest=name, shape=shape)
            for name in names
        },
        calibrations={(name, item.key): np.zeros((8, 128), np.int64) for name in names for item in sweep.calibration},
        windows={(name, evaluation.key): np.zeros((16, 256), np.int64) for name in names},
        identities=Identities(
            models={name: f"weights of {name}" for name in names},
            calibrations={(name, item.key): item.key for name in names for item in sweep.calibration},
            evaluations={(name, evaluation.key): "tokens" for name in names},
        ),
    )
    return sweep, inputs


def show(console, title, figures):
    """Figures by their names."""
    table = Table("", "", title=title)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.3f}")
    console.print(table)
