"""How far a run is: values, errors, and how stable ranks are, each computed when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.samples import Estimate

__all__ = ["Stability", "State"]

HALVINGS = 5
HALVINGS_OF_MANY = 2  # of more than 500 rows, whose ranks vary less and values are dear


@dataclass(frozen=True)
class Stability:
    """Rank correlation to expect with another run of the same size, and its interval."""

    value: float
    low: float
    high: float


class State:
    """What rules look at; what no rule asks for is not computed.

    Parameters
    ----------
    read
        Values and errors from some of the units, or from all (None).
    units
        Independent draws so far.
    evaluations, seconds
        Spent.
    """

    def __init__(
        self,
        read: Callable[[NDArray[np.intp] | None], Estimate],
        units: int,
        evaluations: int,
        seconds: float = 0.0,
    ) -> None:
        self._read = read
        self.units, self.evaluations, self.seconds = units, evaluations, seconds
        self._known: dict[float, Stability] = {}

    @cached_property
    def estimate(self) -> Estimate:
        """Values and errors so far."""
        return self._read(None)

    @property
    def spread(self) -> float:
        """Standard deviation of the values over rows."""
        values = self.estimate.values[~np.isnan(self.estimate.values)]
        return float(values.std()) if len(values) else 0.0

    @property
    def relative_errors(self) -> NDArray[np.float64]:
        """(n,) standard errors in units of the spread; infinite where unknown."""
        errors = np.where(np.isnan(self.estimate.errors), np.inf, self.estimate.errors)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = errors / self.spread
        return np.where(errors == 0, 0.0, np.where(np.isnan(found), np.inf, found))

    def stability(self, level: float = 0.95) -> Stability:
        """Spearman's r between values of two random halves of the units, stepped up to all.

        r of the halves becomes 2 r / (1 + r) for twice as many samples (Spearman and Brown). Some
        halvings; the interval is one in z = atanh r, by 1.06 / (n − 3) and the variance over them.
        """
        if level not in self._known:
            self._known[level] = self._stability(level)
        return self._known[level]

    def _stability(self, level: float) -> Stability:
        from scipy.stats import norm, spearmanr

        rows = len(self.estimate.values)
        nothing = Stability(0.0, -1.0, 1.0)
        if self.units < 4 or rows < 4:
            return nothing
        rng = np.random.default_rng(0)
        most = 1 - 1 / rows**2  # so few rows may agree by chance
        z: list[float] = []
        for _ in range(HALVINGS if rows <= 500 else HALVINGS_OF_MANY):
            order = rng.permutation(self.units)
            middle = self.units // 2
            a = self._read(np.sort(order[:middle])).values
            b = self._read(np.sort(order[middle:])).values
            both = ~(np.isnan(a) | np.isnan(b))
            if both.sum() < 4 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
                return nothing
            r = float(spearmanr(a[both], b[both]).statistic)  # pyright: ignore
            z.append(math.atanh(min(max(r, -most), most)))
        error = math.sqrt(1.06 / (rows - 3) + float(np.var(z, ddof=1)))
        reach = float(norm.ppf((1 + level) / 2)) * error
        middle = float(np.mean(z))
        return Stability(*(_stepped_up(math.tanh(middle + d)) for d in (0.0, -reach, reach)))


def _stepped_up(r: float) -> float:
    return max(-1.0, 2 * r / (1 + r)) if r > -0.9 else -1.0
