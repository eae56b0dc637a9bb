"""What a training was, as far as it tells how much damping its influences need."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["TrainingRecord"]


@dataclass(frozen=True)
class TrainingRecord:
    """Steps, learning rate and weight decay of a training by stochastic gradient descent.

        λ = w + (1 − μ) / (η̄ K)

    with w the weight decay, μ the momentum, η̄ the mean learning rate and K the number of steps.
    Gradient flow for a time T on a quadratic with curvature h answers to a change of the data with
    (1 − exp(−hT)) / h, which 1/(h + 1/T) is near to for all h; momentum μ makes every step
    1/(1 − μ) times as long.

    Parameters
    ----------
    steps
        K, the optimiser steps taken.
    learning_rate
        η̄, the mean over the steps.
    weight_decay
        w, as the optimiser adds w·θ to the gradient of the *mean* loss.
    momentum
        μ.

    Raises
    ------
    ValueError
        For numbers that no training has.

    Examples
    --------
    >>> TrainingRecord(steps=4000, learning_rate=0.05, weight_decay=1e-3, momentum=0.9).damping
    0.0015
    """

    steps: int
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        fine = (
            self.steps >= 1
            and 0.0 < self.learning_rate < math.inf
            and 0.0 <= self.weight_decay < math.inf
            and 0.0 <= self.momentum < 1.0
        )
        if not fine:
            raise ValueError(
                "expected steps ≥ 1, a learning rate above 0, weight_decay ≥ 0 and momentum in "
                f"[0, 1); got {self}"
            )

    @property
    def damping(self) -> float:
        """λ."""
        return self.weight_decay + (1.0 - self.momentum) / (self.learning_rate * self.steps)

    @property
    def why(self) -> str:
        """How it comes about, in words."""
        return (
            f"weight decay {self.weight_decay:g} + (1 − momentum {self.momentum:g}) / (mean "
            f"learning rate {self.learning_rate:.3g} × {self.steps} steps)"
        )
