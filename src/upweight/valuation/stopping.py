"""When a run has enough: errors of the values, stability of their order, budgets; ``&`` and ``|``.

A budget says nothing about how good values are. A run that a budget ends before a rule about
quality holds has not converged, and says so.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.checks import count
from upweight.valuation.samples import Estimate

__all__ = [
    "Evaluations",
    "Minutes",
    "RankStability",
    "Stability",
    "StandardError",
    "State",
    "Stopping",
    "Verdict",
    "default_rule",
    "rule_from",
]

HALVINGS = 5
HALVINGS_OF_MANY = 2  # of more than 500 rows, whose ranks vary less and values are dear
FEW_ROWS = 8  # ranks of fewer are never surely stable


@dataclass(frozen=True)
class Verdict:
    """Whether to stop; whether that is because values are good (None: nobody asked); why."""

    stop: bool
    converged: bool | None
    why: str


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


class Stopping(ABC):
    """A rule for when to stop. Rules combine: ``a & b`` when both say so, ``a | b`` when one does.

    Examples
    --------
    >>> print(RankStability(0.9) & StandardError(0.2) | Evaluations(5_000))
    ((rank stability ≥ 0.9 & standard error ≤ 0.2 of the spread) | 5,000 evaluations)
    """

    looks: ClassVar[bool] = True
    """Whether it has to see values, or the clock, on the way."""

    @abstractmethod
    def judge(self, state: State) -> Verdict:
        """Whether to stop now."""

    def room(self, state: State | None) -> float:
        """Evaluations that may still be asked for; `state` None: at the beginning."""
        return math.inf

    def __and__(self, other: Stopping) -> Stopping:
        return _Both(self, other)

    def __or__(self, other: Stopping) -> Stopping:
        return _Either(self, other)


@dataclass(frozen=True)
class Evaluations(Stopping):
    """After so many evaluations of the utility, cached ones included.

    Parameters
    ----------
    most
        Never more, but for one draw, without which there are no values.
    """

    most: int
    looks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        count(self.most, "evaluations", 1)

    def judge(self, state: State) -> Verdict:
        """See `Stopping`."""
        return Verdict(state.evaluations >= self.most, None, f"{state.evaluations:,} evaluations")

    def room(self, state: State | None) -> float:
        """What is left."""
        return self.most - (0 if state is None else state.evaluations)

    def __str__(self) -> str:
        return f"{self.most:,} evaluations"


@dataclass(frozen=True)
class Minutes(Stopping):
    """After so many minutes, about. How many samples that makes depends on the machine."""

    most: float

    def __post_init__(self) -> None:
        if not self.most > 0:
            raise ValueError(f"expected minutes above 0; got {self.most}")

    def judge(self, state: State) -> Verdict:
        """See `Stopping`."""
        return Verdict(state.seconds >= 60 * self.most, None, f"{state.seconds / 60:.1f} minutes")

    def room(self, state: State | None) -> float:
        """By the time that an evaluation took so far."""
        if state is None or state.seconds <= 0 or not state.evaluations:
            return math.inf
        left = 60 * self.most - state.seconds
        return max(0.0, left) * state.evaluations / state.seconds

    def __str__(self) -> str:
        return f"{self.most:g} minutes"


@dataclass(frozen=True)
class StandardError(Stopping):
    """When values are known well enough.

    Parameters
    ----------
    relative
        The standard error of a value is to be at most this share of the standard deviation of the
        values over rows: what a row is off by, beside what tells rows apart.
    absolute
        Or at most this, in units of the utility; `relative` is not looked at then.
    share
        Of the rows for which that is to hold.
    """

    relative: float = 0.1
    absolute: float | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        bound = self.relative if self.absolute is None else self.absolute
        if not bound > 0 or not 0 < self.share <= 1:
            raise ValueError(
                f"expected a bound above 0 and a share in (0, 1]; got {bound} and {self.share}"
            )

    def judge(self, state: State) -> Verdict:
        """See `Stopping`."""
        if self.absolute is None:
            fine = state.relative_errors <= self.relative
        else:
            fine = state.estimate.errors <= self.absolute
        met = state.units > 1 and bool(fine.mean() >= self.share)
        return Verdict(met, met, f"{self}: holds for {fine.mean():.0%} of the rows")

    def __str__(self) -> str:
        of = f"{self.relative:g} of the spread" if self.absolute is None else f"{self.absolute:g}"
        share = "" if self.share == 1 else f" for {self.share:.0%} of the rows"
        return f"standard error ≤ {of}{share}"


@dataclass(frozen=True)
class RankStability(Stopping):
    """When another run of the same size would rank the rows alike.

    Spearman's correlation between the values of two halves of the samples, stepped up to all of
    them, is to be at least `above` at the lower end of its interval. Values that are nothing but
    noise never pass, however little they move from one sample to the next. Nor do fewer than eight
    rows, whose ranks agree by chance.

    Parameters
    ----------
    above
        In (0, 1).
    level
        Of the two-sided interval.
    """

    above: float = 0.95
    level: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.above < 1 or not 0 < self.level < 1:
            raise ValueError(
                f"expected above and level between 0 and 1; got {self.above} and {self.level}"
            )

    def judge(self, state: State) -> Verdict:
        """See `Stopping`."""
        found = state.stability(self.level)
        met = found.low >= self.above
        why = f"rank stability {found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
        return Verdict(met, met, why)

    def __str__(self) -> str:
        return f"rank stability ≥ {self.above:g}"


@dataclass(frozen=True)
class _Both(Stopping):
    first: Stopping
    second: Stopping

    def judge(self, state: State) -> Verdict:
        a, b = self.first.judge(state), self.second.judge(state)
        return Verdict(a.stop and b.stop, _worst(a.converged, b.converged), f"{a.why} & {b.why}")

    def room(self, state: State | None) -> float:
        return max(self.first.room(state), self.second.room(state))

    def __str__(self) -> str:
        return f"({self.first} & {self.second})"


@dataclass(frozen=True)
class _Either(Stopping):
    first: Stopping
    second: Stopping

    def judge(self, state: State) -> Verdict:
        a, b = self.first.judge(state), self.second.judge(state)
        both = [v for v in (a, b) if v.stop] or [a, b]
        why = " | ".join(v.why for v in both)
        return Verdict(a.stop or b.stop, _best(a.converged, b.converged), why)

    def room(self, state: State | None) -> float:
        return min(self.first.room(state), self.second.room(state))

    def __str__(self) -> str:
        return f"({self.first} | {self.second})"


def _worst(a: bool | None, b: bool | None) -> bool | None:
    known = [v for v in (a, b) if v is not None]
    return all(known) if known else None


def _best(a: bool | None, b: bool | None) -> bool | None:
    known = [v for v in (a, b) if v is not None]
    return any(known) if known else None


def default_rule(n: int) -> Stopping:
    """Stable ranks (small errors, of few rows), or a hundred evaluations a row, at least 2,000."""
    good = StandardError(0.1) if n < FEW_ROWS else RankStability(0.95)
    return good | Evaluations(max(2_000, 100 * n))


def rule_from(given: Any, n: int) -> Stopping:
    """A rule, a number of evaluations, or None for the default; else a TypeError."""
    if given is None:
        return default_rule(n)
    if isinstance(given, RankStability) and n < FEW_ROWS:
        raise ValueError(
            f"expected a budget beside {given}, which {n} rows never reach: take StandardError(), "
            "or add | Evaluations(…)"
        )
    if isinstance(given, Stopping):
        return given
    if isinstance(given, int | np.integer) and not isinstance(given, bool):
        return Evaluations(int(given))
    raise TypeError(
        "expected until as a rule such as RankStability(0.95) | Evaluations(5_000), or a number "
        f"of evaluations; got {given!r}"
    )
