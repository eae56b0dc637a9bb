"""Rows that are there twice, or nearly so, and those that contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["Twins", "find_twins"]

NEAR = 0.01  # of the usual distance to the nearest row


@dataclass(frozen=True, eq=False)
class Twins:
    """For every row an earlier or another row, −1 where there is none.

    Attributes
    ----------
    duplicate_of
        The first row with the same cells and the same target.
    conflict_with
        The first row with the same cells and another target; rows without a target have none.
    near_duplicate_of
        The nearest row, if it is nearer than a hundredth of the median distance to the nearest, and
        no duplicate.
    share
        Of the rows whose features occur more than once: near 1, features are too few or too coarse
        to tell rows apart.
    """

    duplicate_of: NDArray[np.int64]
    conflict_with: NDArray[np.int64]
    near_duplicate_of: NDArray[np.int64]
    share: float


def find_twins(
    frame: pd.DataFrame,
    features: Sequence[str],
    y: NDArray[Any],
    judged: NDArray[np.bool_],
    near: tuple[NDArray[np.integer], NDArray[np.float32]] | None = None,
    *,
    tolerance: float = 0.0,
) -> Twins:
    """Find rows with the same or nearly the same cells.

    Parameters
    ----------
    frame
        The table.
    features
        Columns to compare; missing cells are equal.
    y, judged
        (n,) targets, and which rows have one.
    near
        Nearest rows and distances, (judged rows, k), by position among the judged rows.
    tolerance
        Targets that differ by no more are the same.

    Examples
    --------
    >>> frame = pd.DataFrame({"a": [1, 1, 1, 2]})
    >>> twins = find_twins(frame, ["a"], np.array([0, 0, 1, 0]), np.ones(4, bool))
    >>> twins.duplicate_of.tolist(), twins.conflict_with.tolist()
    ([-1, 0, -1, -1], [2, 2, 0, -1])
    """
    n = len(frame)
    table = frame[list(features)]
    hashed: Any = pd.util.hash_pandas_object(table, index=False)  # pyright: ignore[reportAttributeAccessIssue]
    keys = hashed.to_numpy()
    _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    duplicate, conflict = np.full(n, -1, dtype=np.int64), np.full(n, -1, dtype=np.int64)
    targets = np.where(judged, y.astype(np.float64), np.nan)
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)])
    for number in np.flatnonzero(counts > 1):
        rows = order[starts[number] : starts[number + 1]]
        _compare(rows, targets, tolerance, duplicate, conflict)
    close = np.full(n, -1, dtype=np.int64)
    if near is not None:
        _near(near, np.flatnonzero(judged), group, close)
    return Twins(duplicate, conflict, close, float(counts[counts > 1].sum() / max(n, 1)))


def _compare(
    rows: NDArray[np.intp],
    targets: NDArray[np.float64],
    tolerance: float,
    duplicate: NDArray[np.int64],
    conflict: NDArray[np.int64],
) -> None:
    values = targets[rows]
    # Targets in ascending order fall into groups of equal ones; a missing target equals another.
    ascending = np.argsort(values, kind="stable")
    steps = np.diff(values[ascending])
    labels = np.empty(len(rows), dtype=np.int64)
    jumps = np.where(np.isnan(steps), 0, steps > tolerance)
    missing = np.isnan(values)
    labels[ascending] = np.concatenate([[0], np.cumsum(jumps)])
    labels[missing] = -1
    first: dict[int, int] = {}
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        if label in first:
            duplicate[row] = first[label]
        else:
            first[label] = row
    known = {label: row for label, row in first.items() if label >= 0}
    if len(known) < 2:
        return
    one, other = sorted(known.values())[:2]
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        if label >= 0:
            conflict[row] = one if known[label] != one else other


def _near(
    near: tuple[NDArray[np.integer], NDArray[np.float32]],
    judged: NDArray[np.intp],
    group: NDArray[np.intp],
    close: NDArray[np.int64],
) -> None:
    indices, distances = near
    nearest = judged[indices]
    own = group[judged]
    other = group[nearest] != own[:, None]  # not an exact duplicate
    position = other.argmax(axis=1)
    at = np.arange(len(judged))
    distance = np.where(other[at, position], distances[at, position], np.inf)
    usual = distance[np.isfinite(distance) & (distance > 0)]
    if not usual.size:
        return
    found = distance < NEAR * np.median(usual)
    close[judged[found]] = nearest[at, position][found]
