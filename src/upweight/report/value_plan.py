"""What ``upweight value --plan`` prints: what was made of each column, and what it will take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from upweight.report.value_run import TREES, Ready, make_utility, ready, rule_of
from upweight.report.value_settings import SAMPLED, ValueSettings

__all__ = ["ValuePlan", "plan"]

TRIAL = 8  # sets that are evaluated for an estimate of the time
PAIR, TREE = 1.2e-8, 3e-8  # seconds per pair of rows, and per row, tree and doubling of the rows


@dataclass(frozen=True, eq=False)
class ValuePlan:
    """What `upweight value --plan` prints.

    Attributes
    ----------
    ready
        The table.
    evaluations
        Of the utility, at most; None where there are none, or minutes alone bound them.
    seconds
        Expected, with one worker, at most.
    """

    ready: Ready
    evaluations: int | None
    seconds: float

    def __str__(self) -> str:
        """Columns, then costs."""
        found = self.ready
        width = min(max((len(column.name) for column in found.columns), default=4), 30)
        lines = [f"{c.name[:30]:<{width}}  {c.kind:<9} {c.note}" for c in found.columns]
        classes = "" if found.classes is None else f" of {len(found.classes)} classes"
        lines += [
            "",
            f"{found.task}{classes}: {len(found.rows):,} of {len(found.table):,} rows have a target"
            f", {found.x.shape[1]} features",
            found.described,
            self._cost(),
        ]
        return "\n".join(lines)

    def _cost(self) -> str:
        settings = self.ready.settings
        told = told_time(self.seconds)
        if settings.method not in SAMPLED:
            some = "" if self.evaluations is None else f"{self.evaluations:,} evaluations, "
            return f"{some}about {told}"
        most = "" if self.evaluations is None else f"at most {self.evaluations:,} evaluations, "
        return (
            f"{most}about {told} with one worker; less where ranks are stable "
            f"(≥ {settings.until_stable:g}) before"
        )


def told_time(seconds: float) -> str:
    """A time in a word or two."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3600:.1f} h"


def plan(source: Any, settings: ValueSettings) -> ValuePlan:
    """What was made of each column, and what the values will take; a few sets are evaluated."""
    found = ready(source, settings)
    settings, n = found.settings, len(found.rows)
    if settings.method == "knn-shapley":
        judges = n if found.y_test is None else len(found.y_test)
        return ValuePlan(found, None, judges * n * PAIR)
    if settings.method == "oob":
        return ValuePlan(found, None, TREES * TREE * n * (np.log2(n) + 2))
    each = _trial(found)
    if settings.method == "loo":
        return ValuePlan(found, n, n * each)
    most = rule_of(settings, n).room(None)
    limit = np.inf if settings.minutes is None else 60 * settings.minutes
    return ValuePlan(
        found, int(most) if np.isfinite(most) else None, float(min(most * each, limit))
    )


def _trial(found: Ready) -> float:
    """Seconds that an evaluation takes, from a few of them."""
    utility, n = make_utility(found), len(found.rows)
    rng = np.random.default_rng(0)
    quick: Any = getattr(utility, "all_but_one", None)
    chains: Any = getattr(utility, "chains", None)
    method = found.settings.method
    sizes = n * (np.arange(TRIAL) + 0.5) / TRIAL
    if method == "loo":
        sizes = np.full(TRIAL, n - 1)
    elif method == "banzhaf":
        sizes = np.full(TRIAL, n * (found.p or 0.5))
    masks = np.stack([rng.permutation(n) < max(1, round(size)) for size in sizes])
    start = time.perf_counter()
    if method == "loo" and quick is not None:
        quick()
        return (time.perf_counter() - start) / n
    if method != "banzhaf" and chains is not None:
        chains(rng.permutation(n)[None])
        return (time.perf_counter() - start) / n
    utility.evaluate(masks)
    return (time.perf_counter() - start) / TRIAL
