"""Rank correlations of many columns at once."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from upweight.frames import users_frame

__all__ = [
    "bootstrap_spearman",
    "constant_columns",
    "enough",
    "spearman",
    "split_half_reliability",
    "tell_of",
]

Array = NDArray[np.float64]

ROUND_OFF = 1e-12  # relative; sums of the same numbers in another order differ by less
MAX_ENTRIES = 2**16  # of a (subsets, resamples) array: as many as stay in the processor's cache


def constant_columns(values: Array) -> NDArray[np.bool_]:
    """Which columns of (S, m) hold one value only, but for round-off."""
    return np.ptp(values, axis=0) <= ROUND_OFF * np.abs(values).max(axis=0)


def enough(subsets: int) -> None:
    """Refuse fewer than three subsets: two are always in perfect order, or in its reverse."""
    if subsets < 3:
        raise ValueError(f"expected outputs of at least three subsets to rank; got {subsets}")


def tell_of(constant: NDArray[np.bool_]) -> None:
    """Warn of test rows (m,) that are constant, and refuse if all are."""
    if constant.all():
        raise ValueError(
            "expected outputs and predictions that vary over the subsets; those of all "
            f"{len(constant)} test rows are constant"
        )
    if constant.any():
        warnings.warn(
            f"{constant.sum()} of {len(constant)} test rows are left out: their outputs or "
            f"predictions are the same for all subsets (the first is row {constant.argmax()})",
            UserWarning,
            stacklevel=users_frame(),
        )


def spearman(x: Array, y: Array) -> Array:
    """(m,) Spearman's ρ of the columns of x and y (S, m), with mean ranks for ties.

    Examples
    --------
    >>> spearman(np.array([[1.0], [2.0], [3.0]]), np.array([[5.0], [9.0], [7.0]]))
    array([0.5])
    """
    from scipy.stats import rankdata

    a, b = rankdata(x, axis=0), rankdata(y, axis=0)
    return _correlation(a - a.mean(axis=0), b - b.mean(axis=0))


def _correlation(a: Array, b: Array) -> Array:
    """Σ a b / √(Σ a² Σ b²) over the rows of columns that are centred."""
    with np.errstate(invalid="ignore"):
        ratio = _dots(a, b) / np.sqrt(_dots(a, a) * _dots(b, b))
    return np.clip(ratio, -1.0, 1.0)


def _dots(a: Array, b: Array) -> Array:
    return np.einsum("ij,ij->j", a, b)


def bootstrap_spearman(x: Array, y: Array, count: int, rng: np.random.Generator) -> Array:
    """(B,) means over columns of Spearman's ρ, with rows and columns of x, y (S, m) resampled.

    A resample is how often each row was drawn, w (S,). Sorting it is not needed: where x is sorted,
    the mean rank of a value is half of [Σ w of smaller values + Σ w of values up to it + 1], and ρ
    is the correlation of these ranks with weights w. Columns without variation in a resample are
    left out of its mean.
    """
    rows, columns = x.shape
    means = np.empty(count)
    size = max(1, MAX_ENTRIES // rows)
    plan = [(_Ranker(a), _Ranker(b)) for a, b in zip(x.T, y.T, strict=True)]
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        b = part.stop - part.start
        w = rng.multinomial(rows, np.full(rows, 1 / rows), size=b).T.astype(np.float64)  # (S, b)
        drawn = rng.multinomial(columns, np.full(columns, 1 / columns), size=b).T  # (m, b)
        root = np.sqrt(w)
        rho = np.array([_correlation(p(w) * root, q(w) * root) for p, q in plan])  # (m, b)
        there = np.where(np.isnan(rho), 0, drawn)
        with np.errstate(invalid="ignore"):
            means[part] = (there * np.nan_to_num(rho)).sum(axis=0) / there.sum(axis=0)
    return means


class _Ranker:
    """Twice the mean ranks, centred, of one column of values in every resample."""

    def __init__(self, values: Array) -> None:
        self.order = np.argsort(values, kind="stable")
        self.smaller = np.searchsorted(values[self.order], values, side="left")
        self.up_to = np.searchsorted(values[self.order], values, side="right")

    def __call__(self, w: Array) -> Array:
        total = np.zeros((len(w) + 1, w.shape[1]))
        np.cumsum(w[self.order], axis=0, out=total[1:])
        ranks = total[self.smaller]
        ranks += total[self.up_to]
        ranks -= len(w)  # twice the mean of all ranks, (S + 1) / 2, less the 1 of the formula
        return ranks


def split_half_reliability(outputs: Array, splits: int, rng: np.random.Generator) -> Array:
    """(m,) reliability of the mean over the R seeds of outputs (S, R, m), at least 0."""
    seeds = outputs.shape[1]
    h = seeds // 2
    total, known = np.zeros(outputs.shape[2]), np.zeros(outputs.shape[2])
    for _ in range(1 if seeds == 2 else splits):
        order = rng.permutation(seeds)
        one, other = outputs[:, order[:h]], outputs[:, order[h : 2 * h]]
        rho = spearman(one.mean(axis=1), other.mean(axis=1))
        known += ~np.isnan(rho)
        total += np.nan_to_num(rho)
    # a half that never varies while the whole does tells nothing of it
    r = np.clip(total / np.maximum(known, 1), 0.0, 1.0)
    k = seeds / h
    return k * r / (1 + (k - 1) * r)
