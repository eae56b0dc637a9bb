"""When a run has enough: errors of the values, stability of their order, budgets; ``&`` and ``|``.

A budget says nothing about how good values are. A run that a budget ends before a rule about
quality holds has not converged, and says so.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from upweight.valuation.checks import count
from upweight.valuation.states import State

__all__ = [
    "Evaluations",
    "Minutes",
    "RankStability",
    "StandardError",
    "Stopping",
    "Verdict",
    "default_rule",
    "ending",
    "rule_from",
]

LEAST = 30  # draws that tell of a row, before its standard error is believed
CEILING = 100  # times the budget of the default rule, where a rule has none
FEW_ROWS = 8  # ranks of fewer are never surely stable


@dataclass(frozen=True)
class Verdict:
    """Whether to stop; whether that is because values are good (None: nobody asked); why."""

    stop: bool
    converged: bool | None
    why: str


class Stopping(ABC):
    """A rule for when to stop. Rules combine: ``a & b`` when both say so, ``a | b`` when one does.

    Examples
    --------
    >>> print(RankStability(0.9) & StandardError(0.2) | Evaluations(5_000))
    ((rank stability ≥ 0.9 & standard error ≤ 0.2 of the spread) | 5,000 evaluations)
    """

    looks: ClassVar[bool] = True
    """Whether it has to see values, or the clock, on the way."""

    @property
    def clocked(self) -> bool:
        """Whether it looks at the clock."""
        return False

    @property
    def ends(self) -> bool:
        """Whether it surely holds at some time: a budget, in evaluations or minutes."""
        return False

    @property
    def ranks(self) -> bool:
        """Whether it cannot hold without stable ranks."""
        return False

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

    @property
    def ends(self) -> bool:
        """Always."""
        return True

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

    @property
    def clocked(self) -> bool:
        """Always."""
        return True

    @property
    def ends(self) -> bool:
        """Always."""
        return True

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

    At least 30 draws have to tell of a row before its error counts. Errors are estimated from the
    draws; what is so rare that none of them saw it is not in the errors.

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
        fine = fine & (state.estimate.counts >= LEAST)
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

    @property
    def ranks(self) -> bool:
        """Always."""
        return True

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

    @property
    def clocked(self) -> bool:
        return self.first.clocked or self.second.clocked

    @property
    def ends(self) -> bool:
        return self.first.ends and self.second.ends

    @property
    def ranks(self) -> bool:
        return self.first.ranks or self.second.ranks

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

    @property
    def clocked(self) -> bool:
        return self.first.clocked or self.second.clocked

    @property
    def ends(self) -> bool:
        return self.first.ends or self.second.ends

    @property
    def ranks(self) -> bool:
        return self.first.ranks and self.second.ranks

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
    return good | Evaluations(_budget(n))


def rule_from(given: Any, n: int) -> Stopping:
    """A rule, a number of evaluations, or None for the default; else a TypeError."""
    if given is None:
        return default_rule(n)
    if isinstance(given, Stopping):
        return given
    if isinstance(given, int | np.integer) and not isinstance(given, bool):
        return Evaluations(int(given))
    raise TypeError(
        "expected until as a rule such as RankStability(0.95) | Evaluations(5_000), or a number "
        f"of evaluations; got {given!r}"
    )


def ending(rule: Stopping, n: int) -> Stopping:
    """A rule with a budget, for samples of n rows: its own, or a hundred times the default.

    Values that are all alike never have stable ranks, and errors may never become small.

    Raises
    ------
    ValueError
        If it never holds.
    """
    if rule.ends:
        return rule
    if rule.ranks and n < FEW_ROWS:
        raise ValueError(
            f"expected a rule that {n} rows can fulfil; ranks of fewer than {FEW_ROWS} are never "
            f"surely stable, and {rule} needs them: take StandardError(), or add | Evaluations(…)"
        )
    return rule | Evaluations(CEILING * _budget(n))


def _budget(n: int) -> int:
    return max(2_000, 100 * n)
