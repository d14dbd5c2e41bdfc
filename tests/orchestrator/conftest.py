"""Sweeps, plans and shapes made up for tests: no model, no files."""

from pathlib import Path

import pytest

from orchestrator.config import Sweep, parse_sweep
from orchestrator.inputs import ModelInput
from orchestrator.models.loading import ModelShape
from orchestrator.plan import Identities, Plan, make_plan


def document(**changes) -> dict:
    """A small valid sweep document; a change to None removes the section."""
    whole = {
        "name": "study",
        "models": [{"name": "tiny", "source": "somewhere/tiny"}],
        "grid": [
            {"method": "rtn", "weight_bits": [8, 4], "group_size": 64},
            {"method": "gptq", "weight_bits": 4, "group_size": 64},
        ],
        "calibration": {"corpus": "lambada", "samples": 2, "sequence_length": 64},
        "evaluation": {
            "perplexity": [{"corpus": "boolq-passages", "sequence_length": 64, "max_windows": 2}],
            "tasks": [{"name": "arc_easy", "limit": 4}],
        },
    } | changes
    return {key: value for key, value in whole.items() if value is not None}


def identities(sweep: Sweep, **salt: str) -> Identities:
    """Made-up content hashes: `weights`, `tokens` and `data` change those of models, calibrations and evaluations."""
    weights, tokens, data = (salt.get(name, "") for name in ("weights", "tokens", "data"))
    evaluations = [*sweep.evaluation.perplexity, *sweep.evaluation.tasks]
    names = [model.name for model in sweep.models]
    return Identities(
        models={name: f"weights of {name}{weights}" for name in names},
        calibrations={(name, item.key): f"{name}{item.key}{tokens}" for name in names for item in sweep.calibration},
        evaluations={(name, item.key): f"{name}{item.key}{data}" for name in names for item in evaluations},
    )


@pytest.fixture(scope="session")
def make_document():
    return document


@pytest.fixture(scope="session")
def make_sweep():
    return lambda **changes: parse_sweep(document(**changes), "study.yaml")


@pytest.fixture(scope="session")
def make_identities():
    return identities


@pytest.fixture(scope="session")
def plan_of():
    def make(sweep: Sweep, **salt: str) -> Plan:
        return make_plan(sweep, identities(sweep, **salt))

    return make


@pytest.fixture
def model_input() -> ModelInput:
    """Two linears of 64 x 64 and 128 x 64 in bfloat16, and 1000 bytes besides."""
    shape = ModelShape(
        linears={"a": (64, 64), "b": (128, 64)},
        fp_bytes=2 * (64 * 64 + 128 * 64) + 1000,
        bits_per_value=16,
        max_positions=2048,
        vocabulary=256,
    )
    return ModelInput(source="somewhere/tiny", dtype="auto", directory=Path("somewhere"), digest="d", shape=shape)
