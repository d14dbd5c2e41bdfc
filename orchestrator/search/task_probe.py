"""How well a mixed model chooses among a task's answers: losses on some of its documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.search.mixtures import Mixture, Mixtures

if TYPE_CHECKING:
    from evaluators.harness import Item


class TaskProbe:
    """Measures mixtures of one model on a task, and gives the model back as it was."""

    def __init__(self, mixtures: Mixtures, loss: Callable[[int], float]) -> None:
        """Take a model with its float weights in place.

        Args:
            mixtures: of the model.
            loss: window (a unit of documents) -> its loss by the model as it is then.
        """
        self._mixtures, self._loss = mixtures, loss

    def losses(self, mixture: Mixture, windows: Sequence[int], *, base: Mixture | None = None) -> list[tuple[float]]:
        """Measure one mixture.

        Args:
            windows: indices of units.
            base: not made use of: the scorer runs whole models.
        """
        del base
        self._mixtures.apply(mixture)
        return [(self._loss(window),) for window in windows]

    def close(self) -> None:
        """Put the float weights back."""
        self._mixtures.close()


def choices_loss(items: Sequence[Item]) -> float:
    """The cross entropy of the right choice among the choices, -log(exp l_right / sum of exp l) in nats, l the choices'
    log-likelihoods; mean over documents. Smoother than accuracy, of which a unit of documents has few values.
    """
    entropies = []
    for item in items:
        log_likelihoods, target = np.array(item.log_likelihoods), item.target
        if target is None:
            raise AssertionError("a task of choices has a right one")
        with np.errstate(invalid="ignore"):  # what is no number is a result
            entropies.append(float(np.logaddexp.reduce(log_likelihoods) - log_likelihoods[target]))
    return math.fsum(entropies) / len(items)
