"""Cells that do not fit the rest of their row.

Letters: n rows, c numeric columns, d columns in all, S their covariance, Θ its inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cells", "judge_cells"]

Floats = NDArray[np.float64]

REACH = 8.0  # robust standard deviations where a number is squashed
RIDGE = 0.02
QUANTILE, NORMAL = 0.85, 1.4395  # P(|z| < 1.4395) = 0.85 for a normal z: one in seven may be wrong
FENCE = 2.0
LEAST = 5.0
DOUBTFUL = 5.0
CHUNK = 2**16
EXPONENT = 80.0


@dataclass(frozen=True, eq=False)
class Cells:
    """How well numbers fit the rest of their row.

    Attributes
    ----------
    surprise
        (n, c) float32: distance of a number from what the other columns let expect, in robust
        standard deviations of that distance; 0 where it is missing.
    expected
        (n, c) float32: what they let expect.
    row
        (n,) the largest surprise of a row.
    column
        (n,) where it is.
    threshold
        Rows above it are flagged.
    suspicion
        (n,) row / (row + threshold), in [0, 1): 1/2 at the threshold.
    """

    surprise: NDArray[np.float32]
    expected: NDArray[np.float32]
    row: Floats
    column: NDArray[np.intp]
    threshold: float

    @property
    def suspicion(self) -> Floats:
        """See above."""
        return self.row / (self.row + self.threshold)

    @property
    def flags(self) -> NDArray[np.bool_]:
        """(n,) whether a row has a number that does not fit."""
        return self.row > self.threshold


def judge_cells(numeric: Floats, others: NDArray[np.floating]) -> Cells:
    """Distances of numbers from what all other columns let expect of them.

    For a row z of robustly standardised columns with inverse covariance Θ,

        z_j − E[z_j | the others] = (Θ (z − mean))_j / Θ_jj,

    exactly so for normal columns and as the best linear guess for all. In units of its robust
    standard deviation over the rows this is the surprise of a number. An error that breaks the
    relation to other columns shows, also where the number itself is a usual one; one in a column
    that has no relation to others shows only if the number is extreme.

    Of columns without zeros and negative numbers it is the mean of the surprise of the number and
    of its logarithm, which sees numbers that are too small by a factor.

    A row is flagged if its largest surprise is above max(5, Q3 (Q3 / Q1)²), a fence as
    Tukey's for the logarithms of all rows.

    Parameters
    ----------
    numeric
        (n, c) the numbers, NaN where missing.
    others
        (n, d − c) the remaining columns as numbers, the target among them.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> height = rng.normal(170, 10, 200)
    >>> table = np.stack([height, height - 100 + rng.normal(0, 3, 200)], axis=1)
    >>> table[7] = [165.0, 6.5]
    >>> found = judge_cells(table, np.empty((200, 0)))
    >>> np.flatnonzero(found.flags).tolist(), int(found.column[7])
    ([7], 1)
    """
    c = numeric.shape[1]
    surprise, expected = _distances(numeric, others)
    with np.errstate(invalid="ignore"):
        positive = (np.isnan(numeric) | (numeric > 0)).all(axis=0)
    if positive.any():
        logs = numeric.copy()
        np.log(logs, out=logs, where=positive)
        other, other_expected = _distances(logs, others)
        del logs
        surprise = np.float32(0.5) * (surprise + other)
        # of a column that only the logarithm can tell, that is the better guess
        expected[:, positive] = np.exp(np.minimum(other_expected[:, positive], EXPONENT))
    row, column = (
        surprise.max(axis=1, initial=0.0).astype(np.float64),
        np.zeros(len(numeric), np.intp),
    )
    if c:
        column = surprise.argmax(axis=1)
    return Cells(surprise, expected, row, column, _fence(row))


def _distances(
    numeric: Floats, others: NDArray[np.floating]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Surprise and expected number of every cell, (n, c) each.

    In a second pass, cells that were surprising in the first do not count for scales, relations and
    the other cells of their row.
    """
    others = others.astype(np.float32)
    doubtful = np.zeros(numeric.shape, dtype=np.bool_)
    surprise, expected = _one_pass(numeric, others, doubtful)
    doubtful = surprise > DOUBTFUL
    return _one_pass(numeric, others, doubtful) if doubtful.any() else (surprise, expected)


def _one_pass(
    numeric: Floats, others: NDArray[np.float32], doubtful: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    n, c = numeric.shape
    known = np.where(doubtful, np.nan, numeric)
    empty = np.isnan(known).all(axis=0)
    known[:, empty] = 0.0
    centre = np.nanmedian(known, axis=0) if c else np.zeros(0)
    known -= centre
    scale = _spread(known)
    del known
    z = _squash(np.nan_to_num((numeric - centre) / scale)).astype(np.float32)
    table = np.concatenate([np.where(doubtful, np.float32(0), z), others], axis=1)
    mean = table.mean(axis=0, dtype=np.float64).astype(np.float32)
    covariance = np.zeros((table.shape[1],) * 2)
    for start in range(0, n, CHUNK):
        part = table[start : start + CHUNK] - mean
        covariance += part.T @ part
    covariance /= n
    ridge = RIDGE * np.diag(covariance) + 1e-6
    precision = np.linalg.inv(covariance + np.diag(ridge))
    weights = (precision[:, :c] / np.diag(precision)[:c]).astype(np.float32)
    surprise = np.empty((n, c), dtype=np.float32)
    for start in range(0, n, CHUNK):
        surprise[start : start + CHUNK] = (table[start : start + CHUNK] - mean) @ weights
    surprise += z - table[:, :c]  # a doubtful cell itself is where it is
    expected = (centre + scale * _unsquash(z - surprise)).astype(np.float32)
    surprise[np.isnan(numeric)] = np.nan
    usual = _spread(np.where(doubtful, np.float32(np.nan), surprise))
    return np.nan_to_num(np.abs(surprise) / usual).astype(np.float32), expected


def _spread(values: NDArray[np.floating]) -> Floats:
    """A standard deviation per column that up to 15 % of wrong values do not move much."""
    if not values.size:
        return np.ones(values.shape[1])
    size = np.abs(values)
    mean = np.nanmean(np.where(np.isnan(size).all(axis=0), 0.0, size), axis=0)
    found = np.nanquantile(np.where(np.isnan(size).all(axis=0), 0.0, size), QUANTILE, axis=0)
    found = np.maximum(found / NORMAL, 0.125 * mean)
    return np.where(found > 0, found, 1.0).astype(np.float64)


def _squash(z: Floats) -> Floats:
    return z / np.sqrt(1 + (z / REACH) ** 2)


def _unsquash(u: NDArray[np.floating]) -> Floats:
    bounded = np.clip(u.astype(np.float64), -0.99 * REACH, 0.99 * REACH)
    return bounded / np.sqrt(1 - (bounded / REACH) ** 2)


def _fence(row: Floats) -> float:
    positive = row[row > 0]
    if not positive.size:
        return LEAST
    low, high = np.quantile(positive, [0.25, 0.75])
    return float(max(LEAST, high * (high / low) ** FENCE))
