"""Writes made-up searches that look like real ones: SmolLM2's shapes, 30 blocks x 4 kinds, 2 to 5 bits, two budgets."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any

from orchestrator.search.knapsack import solve
from orchestrator.search.records import SENSITIVITY, TRIALS, Records, space_as_json
from orchestrator.search.space import Allocation, Choice, Group, Space

if TYPE_CHECKING:
    from pathlib import Path

Row = dict[str, Any]

MODEL = "smollm2-135m"
DEPTH, BITS, WINDOWS, GUARDS = 30, (2, 3, 4, 5), 16, 8
BUDGETS = {"3.6 bits": 3.6, "2.8 bits": 2.8}
_START = datetime(2026, 3, 2, 19, 0, tzinfo=UTC)
_LINEARS = {
    "self_attn": {"q_proj": 576 * 576, "k_proj": 576 * 192, "v_proj": 576 * 192},
    "self_attn.o": {"o_proj": 576 * 576},
    "mlp": {"gate_proj": 576 * 1536, "up_proj": 576 * 1536},
    "mlp.down": {"down_proj": 576 * 1536},
}
# What two bits of one group cost, by kind: down hurts, and in block 1 much more so.
_HARM = {"self_attn": 0.01, "self_attn.o": 0.006, "mlp": 0.03, "mlp.down": 0.06}


def demo_space(prefix: str = "model.layers") -> Space:
    """The space of a small model, in groups of 64."""
    groups = []
    for block in range(DEPTH):
        for place, linears in _LINEARS.items():
            weights = sum(linears.values())
            groups.append(
                Group(
                    linears=tuple(f"{prefix}.{block}.{place.partition('.')[0]}.{name}" for name in linears),
                    num_weights=weights,
                    choices=tuple(
                        Choice(weight_bits=bits, group_size=64, stored_bytes=weights * bits // 8 + weights // 64 * 2)
                        for bits in BITS
                    ),
                )
            )
    return Space(tuple(groups))


def alone(space: Space) -> list[list[float]]:
    """Losses of each group at each of its choices, alone."""
    chance = Random("sensitivities")
    table = []
    for index in range(len(space.groups)):
        block, kind = divmod(index, len(_LINEARS))
        harm = list(_HARM.values())[kind] * math.exp(chance.gauss(0, 0.25)) * (0.6 + abs(block - 14) / 20)
        if (block, kind) == (1, 3):
            harm = 1.2
        table.append([harm * 4.0 ** -(bits - 2) for bits in BITS])
    return table


def sensitivity_rows(space: Space, *, name: str = "search-demo", base: str = "fp") -> list[Row]:
    """Rows of the sensitivity table."""
    return [
        {
            "search": name,
            "model": MODEL,
            "base": base,
            "group": group.name,
            "weight_bits": choice.weight_bits,
            "group_size": choice.group_size,
            "loss": loss,
            "num_windows": 4,
            "at": _START,
        }
        for group, losses in zip(space.groups, alone(space), strict=True)
        for choice, loss in zip(group.choices, losses, strict=True)
    ]


def together(space: Space, allocation: Allocation) -> float:
    """The loss of an allocation: no sum of what its groups cost alone, so that a search can find better than that."""
    chance = Random("together")
    return sum(losses[index] * chance.uniform(0.3, 1.5) for losses, index in zip(alone(space), allocation, strict=True))


def study_rows(space: Space, study: str, budget: int, generations: int = 20) -> tuple[list[Row], Row]:
    """Rows of the trials table, and what chosen.json says of the study."""
    chance = Random(study)
    index = max(index for index in range(len(BITS)) if space.stored_bytes((index,) * len(space.groups)) <= budget)
    uniform = (index,) * len(space.groups)
    start = solve(space, alone(space), budget)
    starts = [_point(space, "knapsack fp", start), _point(space, f"uniform {BITS[index]}-g64", uniform)]
    parent, best, forwards = start, min(one["loss"] for one in starts), 2 * (WINDOWS + GUARDS)
    rows: list[Row] = []
    for generation in range(generations):
        children = [_neighbour(space, parent, budget, chance) for _ in range(8)]
        ranked = sorted(children, key=lambda one: together(space, one))
        for place, child in enumerate(ranked):
            complete = place == 0
            windows = WINDOWS if complete else 4
            forwards += windows
            loss = together(space, child) * (1 if complete else chance.uniform(0.9, 1.1))
            better = complete and loss < best
            if better:
                parent, best = child, loss
                forwards += GUARDS
            rows.append(
                {
                    "search": "search-demo",
                    "model": MODEL,
                    "study": study,
                    "sampler": "level-switch",
                    "trial": len(rows),
                    "state": "complete" if complete else "pruned",
                    "loss": loss,
                    "num_windows": windows,
                    "guard_loss": loss * 1.05 if better else None,
                    "stored_bytes": space.stored_bytes(child),
                    "bits_per_weight": space.bits_per_weight(child),
                    "allocation": json.dumps(list(child)),
                    "window_forwards": forwards,
                    "seconds": 0.17 * forwards,
                    "at": _START + timedelta(seconds=generation),
                }
            )
    rows[-1] |= {"state": "failed", "loss": None}
    chosen = _point(space, "", parent) | {
        "study": study,
        "sampler": "level-switch",
        "budget_bytes": budget,
        "cell": "smollm2-135m.gptq-w3-g64-mixed.1a2b3c4d",
        "starts": starts,
        "trials": len(rows),
        "window_forwards": forwards,
        "seconds": 0.17 * forwards,
        "stopped": "all evaluations are spent",
    }
    del chosen["name"]
    return rows, chosen


def _point(space: Space, name: str, allocation: Allocation) -> Row:
    loss = together(space, allocation)
    return {
        "name": name,
        "allocation": list(allocation),
        "stored_bytes": space.stored_bytes(allocation),
        "bits_per_weight": space.bits_per_weight(allocation),
        "loss": loss,
        "guard_loss": loss * 1.04,
    }


def _neighbour(space: Space, parent: Allocation, budget: int, chance: Random) -> Allocation:
    """One group a choice down and one up, within the budget."""
    while True:
        down, up = chance.sample(range(len(parent)), 2)
        child = tuple(index - (at == down) + (at == up) for at, index in enumerate(parent))
        fits = all(0 <= index < len(BITS) for index in child)
        if fits and space.stored_bytes(child) <= budget:
            return child


def front_study(space: Space) -> Row:
    """What chosen.json says of a study over all sizes."""
    found = [solve(space, alone(space), space.budget(bits, "front")) for bits in (2.6, 3.0, 3.5, 4.0, 4.6)]
    front = [{key: value for key, value in _point(space, "", one).items() if key != "name"} for one in found]
    del front[0]["guard_loss"], front[-1]["guard_loss"]  # not among those that were measured further
    return {
        "study": "all sizes",
        "sampler": "nsga-2",
        "budget_bytes": None,
        "front": front,
        "starts": [],
        "trials": 400,
        "window_forwards": 5200,
        "seconds": 900.0,
        "stopped": "all evaluations are spent",
    }


def write_search(
    root: Path,
    *,
    space: Space | None = None,
    sensitivities: list[Row] | None = None,
    trials: list[Row] | None = None,
    studies: list[Row] | None = None,
    more: Row | None = None,
) -> Path:
    """Write `search/` into a sweep's directory; what is not given is not there, as in a search that has just begun."""
    records = Records(root)
    records.directory.mkdir(parents=True, exist_ok=True)
    if space is not None:
        records.write_json(records.space, space_as_json(space))
    records.add(SENSITIVITY, sensitivities or [])
    records.add(TRIALS, trials or [])
    if studies is not None:
        chosen = {
            "search": "search-demo",
            "model": MODEL,
            "objective": "kl_divergence",
            "guard_windows": GUARDS,
            "num_windows": WINDOWS,
            "studies": studies,
        }
        records.write_json(records.chosen, chosen | (more or {}))
    return root


def demo_search(root: Path) -> Path:
    """A search that has ended: two budgets, and all sizes at once."""
    space = demo_space()
    trials, studies = [], []
    for name, bits in BUDGETS.items():
        rows, chosen = study_rows(space, name, space.budget(bits, name))
        trials += rows
        studies.append(chosen)
    return write_search(
        root,
        space=space,
        sensitivities=sensitivity_rows(space),
        trials=trials,
        studies=[*studies, front_study(space)],
    )
