"""The additive model solved exactly: the sum of each group's own loss is least, within the budget.

A multiple-choice knapsack as a mixed-integer linear program (HiGHS). The model is a baseline and a start: losses of
real allocations are not sums. Source: Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from orchestrator.errors import BitatlasError
from orchestrator.search.space import Allocation, Space


def solve(
    space: Space,
    losses: Sequence[Sequence[float]],
    budget_bytes: int,
    *,
    about: Allocation | None = None,
    most_changes: int | None = None,
) -> Allocation:
    """The allocation of the least sum of losses that fits the budget.

    Args:
        losses: of each group, of each of its choices; finite.
        budget_bytes: the most that may be stored; at least that of `space.least`.
        about: an allocation that fits; with `most_changes`, no more groups differ from it.
    Raises:
        BitatlasError: a loss is not finite, or nothing fits.
    """
    costs = np.array([loss for group in losses for loss in group], dtype=np.float64)
    if not np.isfinite(costs).all():
        raise BitatlasError("the knapsack needs a finite loss of every choice; leave choices out that break the model")
    sizes = np.array([choice.stored_bytes for group in space.groups for choice in group.choices], dtype=np.float64)
    owners = np.repeat(np.arange(len(space.groups)), [len(group.choices) for group in space.groups])
    one_each = coo_array((np.ones(len(owners)), (owners, np.arange(len(owners)))))
    # Numbers of ordinary size: solvers have absolute tolerances. Bytes are counted beyond the least, in kilobytes.
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None] / 1024.0, ub=budget_bytes / 1024.0)]
    if about is not None and most_changes is not None:
        starts = np.searchsorted(owners, np.arange(len(space.groups)))
        kept = np.zeros(len(costs))
        kept[starts + np.array(about)] = 1
        constraints.append(LinearConstraint(kept[None], lb=len(space.groups) - most_changes))
    spread = float(np.abs(costs).max()) or 1.0
    outcome = milp(
        costs / spread,
        constraints=constraints,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if outcome.x is None:
        raise BitatlasError(f"no allocation fits {budget_bytes} bytes: {outcome.message}")
    starts = np.searchsorted(owners, np.arange(len(space.groups)))
    ends = np.append(starts[1:], len(owners))
    allocation = tuple(int(np.argmax(outcome.x[start:end])) for start, end in zip(starts, ends, strict=True))
    return _within(space, allocation, losses, budget_bytes)


def _within(space: Space, allocation: Allocation, losses: Sequence[Sequence[float]], budget_bytes: int) -> Allocation:
    """A solver's tolerance may let a few bytes pass: then the cheapest step down makes up for them."""
    while space.stored_bytes(allocation) > budget_bytes:
        steps = [
            (losses[place][index - 1] - losses[place][index], place)
            for place, index in enumerate(allocation)
            if index > 0
        ]
        _, place = min(steps)
        allocation = (*allocation[:place], allocation[place] - 1, *allocation[place + 1 :])
    return allocation
