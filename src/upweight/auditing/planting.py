"""Planted faults: what the suspicion of wrong labels looks like, and what that says of the rest.

Wrong labels are planted into the table, everything is judged again, and the suspicion of the
planted rows is kept. With R(t) the share of planted rows above a threshold t and U(t) the share of
all rows of the original table above it, a share π of wrong labels explains at most U(t) of them::

    π R(t) ≤ U(t)   for every t,   so   π ≤ min_t U(t) / R(t),

with equality where only wrong labels are so suspicious. The minimum of noisy ratios is too low, so
the mean of the lowest third of them is taken, over thresholds above which lie 30 % to 90 % of the
planted rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.auditing.audit import Expected
from upweight.tables import Task

__all__ = ["Calibration", "calibrate", "plant"]

Floats = NDArray[np.float64]

SHARES = np.linspace(0.3, 0.9, 25)  # of the planted rows that lie above a threshold
HARD = 0.004  # rows of a clean table that look wrong (benchmarks/audit.py, clean tables)
LIFT = 2.0  # how much more frequent planted faults must be among flagged rows than all rows are
DRAWS = 200


def plant(
    y: NDArray[Any],
    task: Task,
    share: float,
    rng: np.random.Generator,
    among: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Make some targets wrong: another class at random, or the number of another row.

    Parameters
    ----------
    y
        (n,) positions of the classes, or numbers.
    task
        Classification or regression.
    share
        Of the rows, at least one.
    rng
        Which rows, and which targets.
    among
        (n,) rows that may be chosen; default all.

    Returns
    -------
    y : ndarray
        With wrong targets.
    planted : ndarray
        (n,) bool: which.
    """
    allowed = np.arange(len(y)) if among is None else np.flatnonzero(among)
    count = min(max(1, round(share * len(y))), len(allowed))
    rows = rng.choice(allowed, count, replace=False)
    spoiled = y.copy()
    if task == "classification":
        classes = int(y.max()) + 1
        spoiled[rows] = (y[rows] + rng.integers(1, classes, count)) % classes
        # A class of two rows can lose both; judges must have the same classes as before.
        while len(lost := np.setdiff1d(y, spoiled)):
            back = [np.flatnonzero(y == code)[0] for code in lost]
            spoiled[back] = lost
    else:
        spoiled[rows] = y[rng.permutation(len(y))[:count]]
    planted = np.zeros(len(y), dtype=np.bool_)
    planted[rows] = spoiled[rows] != y[rows]
    return spoiled, planted


@dataclass(frozen=True)
class Calibration:
    """What a suspicion means.

    Attributes
    ----------
    threshold
        Rows above it are flagged: it maximises the expected F1 of the flags.
    noise
        Estimated share of wrong targets; None if planted faults look like any row, so that nothing
        can be told.
    recall
        Share of the planted wrong targets that are above the threshold.
    precision
        Expected share of truly wrong rows among the flagged, with an interval of 90 %; None if no
        more are flagged than look wrong in clean tables.
    expected
        How many of the k most suspicious rows are expected to be wrong.
    """

    threshold: float
    noise: float | None
    recall: float
    precision: tuple[float, float, float] | None
    expected: tuple[Expected, ...]


def calibrate(
    suspicion: Floats, planted: Floats, *, first: Sequence[int] = (), seed: int = 0
) -> Calibration:
    """Threshold, share of wrong targets and expected precision from planted faults.

    The expected number of wrong rows among the k most suspicious, with t between the k-th and the
    next, is

        min(n π̂ R(t), k − h),   h = max(1, 0.004 n) min(1, k / n_flagged),

    where h stands for rows that look wrong and are right: clean tables have that many of them. Its
    share among the first k is made to fall with k.

    Parameters
    ----------
    suspicion
        (n,) of the rows of the table as it is.
    planted
        (m,) of planted faults, in tables that had them.
    first
        The k for which the expected number is wanted.
    seed
        Of the resamples behind the intervals.

    Examples
    --------
    >>> rows = np.append(np.linspace(0, 0.2, 95), np.linspace(0.8, 1, 5))
    >>> found = calibrate(rows, np.linspace(0.75, 1, 20), first=[5])
    >>> round(found.noise, 2), int((rows > found.threshold).sum())
    (0.06, 5)
    """
    rows, faults = np.sort(suspicion), np.sort(planted)
    noise = _noise(rows, faults)
    threshold = _threshold(rows, faults, noise)
    flagged = int((rows > threshold).sum())
    wanted = [k for k in first if 0 < k <= len(rows)]
    rng = np.random.default_rng(seed)
    draws = np.array(
        [
            _wrong(r, f, _noise(r, f), [flagged, *wanted], flagged)
            for r, f in (
                (np.sort(rng.choice(rows, len(rows))), np.sort(rng.choice(faults, len(faults))))
                for _ in range(DRAWS)
            )
        ]
    )
    best = _wrong(rows, faults, noise, [flagged, *wanted], flagged)
    # Planting does not tell how many hard rows there are: no more than h, or none at all.
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    spare = _hard(len(rows), np.array([flagged, *wanted]), flagged)
    low = np.maximum(np.minimum(low, best) - spare, 0)
    high = np.minimum(np.maximum(high, best) + spare, [flagged, *wanted])
    precision = None
    if flagged > _hard(len(rows), np.array([flagged]), flagged)[0]:
        estimate, lowest, highest = (float(v[0]) / flagged for v in (best, low, high))
        precision = (estimate, lowest, highest)
    expected = tuple(
        Expected(k, float(b), float(lo), float(hi))
        for k, b, lo, hi in zip(wanted, best[1:], low[1:], high[1:], strict=True)
    )
    recall = float(_above(faults, threshold))
    told = None if noise >= 1 / LIFT else noise
    return Calibration(threshold, told, recall, precision, expected)


def _above(ascending: Floats, t: float | Floats) -> Floats:
    """Share of the values that are larger than t."""
    return 1 - np.searchsorted(ascending, t, side="right") / len(ascending)


def _noise(rows: Floats, faults: Floats) -> float:
    at = np.quantile(faults, 1 - SHARES, method="lower")
    caught = 1 - np.searchsorted(faults, at, side="left") / len(faults)
    reached = 1 - np.searchsorted(rows, at, side="left") / len(rows)
    ratio = (reached + 0.5 / len(rows)) / caught
    return float(min(np.sort(ratio)[: len(ratio) // 3].mean(), 1 / LIFT))


def _threshold(rows: Floats, faults: Floats, noise: float) -> float:
    """Where 2 π R / (U + π), the expected F1, is largest; never inside a run of equal values.

    Only where R ≥ 2 U: else planted faults look like any row, and it would be best to flag all.
    """
    at = np.unique(rows)
    share, caught = _above(rows, at), _above(faults, at)
    useful = (share > 0) & (caught >= LIFT * share)
    f1 = np.where(useful, 2 * noise * caught / (share + noise), 0.0)
    return float(at[f1.argmax()]) if f1.max() > 0 else float(at[-1])


def _hard(n: int, k: NDArray[np.integer], flagged: int) -> Floats:
    return max(1.0, HARD * n) * np.minimum(1.0, k / max(flagged, 1))


def _wrong(rows: Floats, faults: Floats, noise: float, counts: list[int], flagged: int) -> Floats:
    k = np.array(counts)
    n = len(rows)
    below = rows[np.clip(n - k - 1, 0, n - 1)]
    found = np.minimum(n * noise * _above(faults, below), k - _hard(n, k, flagged))
    # More suspicious rows are wrong at least as often as less suspicious ones.
    order = np.argsort(-k, kind="stable")
    share = np.maximum(found[order], 0.0) / np.maximum(k[order], 1)
    wrong = np.empty(len(k))
    wrong[order] = np.maximum.accumulate(share) * k[order]
    return wrong
