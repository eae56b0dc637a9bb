"""`read_target`: classes or numbers, and which rows can be judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from upweight.tables.cells import PARSES, Encoded, encode, natural, parse_numbers
from upweight.tables.errors import TableError, quoted

__all__ = ["Target", "Task", "read_target"]

Task = Literal["classification", "regression"]

FEWEST_ROWS = 10
FEW_CLASSES = 20


@dataclass(frozen=True, eq=False)
class Target:
    """What should be predicted.

    Attributes
    ----------
    task
        Classification or regression.
    y
        (n,): positions in `classes` as int64, −1 where the target is missing; or float64, NaN where
        it is.
    classes
        Names of the classes, numbers by size and others by alphabet with the numbers in them by
        size; None in regression.
    judged
        (n,) bool: rows that have a target.
    """

    task: Task
    y: np.ndarray
    classes: tuple[str, ...] | None
    judged: np.ndarray


def read_target(column: pd.Series, task: Task | None = None) -> Target:
    """Take a column as the target.

    Parameters
    ----------
    column
        As `read_table` gives it. Blanks around texts do not count.
    task
        None decides by the values.

    Raises
    ------
    TableError
        If fewer than 10 rows have a value, or all have the same; in classification, if there are
        more classes than half the rows, or a class has a single row (whoever has not seen that row
        cannot know the class); in regression, if a cell is no finite number.

    Notes
    -----
    Without a `task` it is regression if the values are numbers with decimals, or integers with too
    many values for classes; dates are refused. Integers are classes if there are at most 20
    different ones, or up to √n that count from 0 or 1 without a gap and have two rows each; and if
    there are two rows for each on average. Texts, truth values and categories are classes.

    Examples
    --------
    >>> target = read_target(pd.Series(["no", "yes", None, "yes", "no"] * 3))
    >>> target.task, target.classes
    ('classification', ('no', 'yes'))
    >>> target.y[:5]
    array([ 0,  1, -1,  1,  0])
    """
    name = quoted(column.name) if column.name is not None else ""
    of = f"the target {name}".rstrip()
    if task not in (None, "classification", "regression"):
        raise TableError(f"expected the task classification or regression; got {quoted(task)}")
    if column.dtype.kind in "mM":
        raise TableError(
            f"{of} holds dates; turn them into numbers (days since a start) or classes"
        )
    encoded = encode(column)
    if encoded.present == 0:
        raise TableError(f"{of} is missing in all {len(column)} rows")
    if encoded.present < FEWEST_ROWS:
        raise TableError(
            f"{of} has a value in {encoded.present} of {len(column)} rows only; at least "
            f"{FEWEST_ROWS} are needed"
        )
    if len(encoded.levels) == 1:
        raise TableError(
            f"{of} is {quoted(encoded.levels[0])} in every row; there is nothing to predict"
        )
    _check_finite(column, encoded, of)
    if task is None:
        task = _decided(column, encoded)
    return _numbers(column, encoded, of) if task == "regression" else _classes(encoded, of)


def _decided(column: pd.Series, encoded: Encoded) -> Task:
    if isinstance(column.dtype, pd.CategoricalDtype) or column.dtype.kind == "b":
        return "classification"
    numbers = parse_numbers(encoded)
    distinct = len(encoded.levels)
    if numbers.share < 1:
        # A few cells that are no numbers among many that are: a number that was mistyped.
        mistyped = numbers.share >= PARSES and distinct > max(
            FEW_CLASSES, math.isqrt(encoded.present)
        )
        return "regression" if mistyped else "classification"
    values = np.sort(numbers.values[np.isfinite(numbers.values)])
    if (values != np.floor(values)).any():
        return "regression"
    counted = values[0] in (0, 1) and values[-1] - values[0] == distinct - 1
    codes = counted and distinct <= math.isqrt(encoded.present) and encoded.counts.min() >= 2
    few = distinct <= FEW_CLASSES or codes
    return "classification" if few and 2 * distinct <= encoded.present else "regression"


def _classes(encoded: Encoded, of: str) -> Target:
    levels = [str(level) for level in encoded.levels]
    if 2 * len(levels) > encoded.present:
        raise TableError(
            f"{of} has {len(levels)} classes in {encoded.present} rows, more than one for two "
            "rows; if it is a number, pass --task regression, else choose another target"
        )
    alone = [level for level, count in zip(levels, encoded.counts, strict=True) if count == 1]
    if alone:
        listed = ", ".join(quoted(level) for level in alone[:3]) + (" …" if len(alone) > 3 else "")
        rows = [encoded.first_row(np.array([level == a for level in levels])) for a in alone[:1]]
        raise TableError(
            f"{of} has {len(alone)} {'class' if len(alone) == 1 else 'classes'} with a single row: "
            f"{listed} (row {rows[0]}); whoever has not seen that row cannot know the class: merge "
            "it with another class, or remove the row"
        )
    order = sorted(range(len(levels)), key=lambda at: natural(levels[at]))
    place = np.empty(len(levels), dtype=np.int64)
    place[order] = np.arange(len(levels))
    y = encoded.spread(place, -1)
    return Target("classification", y, tuple(levels[at] for at in order), y >= 0)


def _numbers(column: pd.Series, encoded: Encoded, of: str) -> Target:
    if column.dtype.kind in "biuf" and isinstance(column.dtype, np.dtype):
        y = column.to_numpy(dtype=np.float64)
        return Target("regression", y, None, ~np.isnan(y))
    numbers = parse_numbers(encoded)
    if numbers.bad.any():
        row = encoded.first_row(numbers.bad)
        value, count = encoded.levels[encoded.codes[row]], int(encoded.counts[numbers.bad].sum())
        more = f" ({count} such cells)" if count > 1 else ""
        raise TableError(
            f"{of} is {quoted(value)} in row {row}, which is no number{more}: correct or empty it, "
            "or pass --task classification"
        )
    y = encoded.spread(numbers.values, np.nan)
    return Target("regression", y, None, ~np.isnan(y))


def _check_finite(column: pd.Series, encoded: Encoded, of: str) -> None:
    if isinstance(column.dtype, np.dtype) and column.dtype.kind == "f":
        infinite = np.isinf(column.to_numpy())
    else:
        words = {"inf", "infinity"}
        levels = [str(v).lstrip("+-").lower() in words for v in encoded.levels]
        infinite = encoded.spread(np.array(levels), False)
        if parse_numbers(encoded).share < PARSES:
            return
    if infinite.any():
        raise TableError(
            f"{of} is infinite in row {int(np.flatnonzero(infinite)[0])}: correct or empty the cell"
        )
