"""What the functions of this package are given, checked."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Encoded",
    "Task",
    "check_columns",
    "check_order",
    "check_pair",
    "check_pairs",
    "check_r2",
    "codes_in",
    "count",
    "encode",
    "features",
    "targets",
    "task_of",
]

Task = Literal["classification", "regression"]


@dataclass(frozen=True)
class Encoded:
    """Labels as positions in the sorted classes: ``classes[codes]`` are the labels."""

    codes: NDArray[np.int32]
    classes: NDArray[Any]


def features(x: ArrayLike, name: str = "x", *, columns: int | None = None) -> NDArray[Any]:
    """Finite numbers of shape (n, d), not copied where they are floats; else a ValueError."""
    array = np.asarray(x)
    if array.dtype.kind in "biuO" or array.dtype == np.longdouble:
        array = array.astype(np.float64)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    if array.dtype.kind != "f":
        raise ValueError(f"expected {name} as real numbers; got {array.dtype}: encode it first")
    wanted = "(rows, features)" if columns is None else f"(rows, {columns})"
    if array.ndim != 2 or 0 in array.shape or columns not in (None, array.shape[1]):
        raise ValueError(f"expected {name} of shape {wanted}; got {array.shape}")
    with np.errstate(all="ignore"):
        total = array.sum(dtype=np.float64)
    if not np.isfinite(total):  # a mask only if something may be wrong
        wrong = np.argwhere(~np.isfinite(array))
        if len(wrong):
            row, column = (int(i) for i in wrong[0])
            raise ValueError(
                f"expected finite {name}; got {array[row, column]} in row {row}, column {column} "
                f"({len(wrong)} of {array.size} are not finite): fill in missing values first"
            )
    return array


def check_order(x: Any, y: Any, what: str = "x and y", mend: str = "y.loc[x.index]") -> None:
    """A ValueError where both have an index, with the same names in different orders."""
    import pandas as pd

    if not isinstance(x, pd.DataFrame | pd.Series) or not isinstance(y, pd.Series | pd.DataFrame):
        return
    if not x.index.equals(y.index) and set(x.index) == set(y.index):
        raise ValueError(
            f"expected {what} in the same order; their indexes have the same names in different "
            f"orders: take {mend}"
        )


def check_columns(x: Any, x_test: Any, what: str = "test", like: str = "train") -> None:
    """A ValueError where both have names of columns, and other ones or in another order."""
    ours, theirs = (getattr(some, "columns", None) for some in (x, x_test))
    if ours is not None and theirs is not None and list(ours) != list(theirs):
        raise ValueError(
            f"expected the columns of {like} in {what}, {list(ours)}; got {list(theirs)}"
        )


def check_pair(pair: Any, name: str) -> None:
    """A ValueError where it is no (x, y), or x and y are in different orders."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"expected {name} as a pair (x, y); got {type(pair).__name__}")
    x, y = pair
    check_order(x, y, f"x and y of {name}")


def check_pairs(train: Any, test: Any) -> None:
    """A ValueError where pairs (x, y) are none, or do not belong together; test may be None."""
    check_pair(train, "train")
    if test is not None:
        check_pair(test, "test")
        check_columns(train[0], test[0])


def check_r2(y: NDArray[Any], where: str) -> None:
    """A ValueError where all rows that judge have one number, of which r2 makes 0 / 0."""
    if len(np.unique(y)) < 2:
        raise ValueError(
            f"expected different y in {where} for r2; all {len(y)} are {y[0]}: take "
            "scoring='neg_mean_squared_error'"
        )


def targets(y: ArrayLike, rows: int | None, name: str = "y") -> NDArray[Any]:
    """One label or number for each row, none of them missing; else a ValueError."""
    array = np.asarray(y)
    if array.dtype.kind in "US" and isinstance(y, (list, tuple)):
        array = np.asarray(y, dtype=object)  # else NaN among text has become "nan"
    if array.ndim != 1 or rows not in (None, len(array)):
        wanted = "n" if rows is None else rows
        raise ValueError(f"expected {name} of shape ({wanted},), one per row; got {array.shape}")
    missing = _missing(array)
    if len(missing):
        raise ValueError(
            f"expected no missing {name}; row {missing[0]} has none ({len(missing)} of "
            f"{len(array)}): leave such rows out"
        )
    return array


def task_of(y: NDArray[Any], task: Task | None) -> Task:
    """The task as given, or regression if the targets are numbers that are not all whole."""
    if task not in (None, "classification", "regression"):
        raise ValueError(f"expected task 'classification' or 'regression'; got {task!r}")
    if task == "regression" and y.dtype.kind not in "fiub":
        raise ValueError(f"expected y as numbers for a regression; got {y.dtype}")
    if task is not None:
        return task
    whole = y.dtype.kind != "f" or bool((y == np.round(y)).all())
    return "classification" if whole else "regression"


def encode(y: NDArray[Any], name: str = "y") -> Encoded:
    """Labels of any type that can be sorted as codes; at least two classes, else a ValueError."""
    if y.dtype.kind == "O":
        given = y.tolist()
        try:
            values = sorted(set(given))
        except TypeError as error:
            raise ValueError(
                f"expected labels {name} of one type, such as text; got a mixture ({error})"
            ) from None
        place = {value: code for code, value in enumerate(values)}
        codes = np.fromiter((place[value] for value in given), np.int32, len(given))
        classes = np.asarray(values)
    else:
        classes, inverse = np.unique(y, return_inverse=True)
        codes = inverse.astype(np.int32)
    if len(classes) < 2:
        raise ValueError(
            f"expected at least two classes in {name}; all {len(y)} rows are {classes[0]!s}"
        )
    return Encoded(codes, classes)


def codes_in(classes: NDArray[Any], y: NDArray[Any]) -> NDArray[np.intp]:
    """Positions of labels in classes that were found before; a ValueError for any other label."""
    place = {label: code for code, label in enumerate(classes.tolist())}
    codes = np.array([place.get(label, -1) for label in y.tolist()], np.intp)
    unknown = np.flatnonzero(codes < 0)
    if len(unknown):
        raise ValueError(
            f"expected labels y among the classes {', '.join(map(str, list(place)[:5]))}"
            f"{', …' if len(place) > 5 else ''}; row {unknown[0]} has {y[unknown[0]]!s}"
        )
    return codes


def count(value: Any, name: str, low: int, high: int | None = None, why: str = "") -> int:
    """A whole number in [low, high]; else a ValueError."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"expected {name} as a whole number; got {value!r}") from None
    if number < low or (high is not None and number > high):
        reach = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"expected {name} {reach}{why and f' ({why})'}; got {number}")
    return number


def _missing(y: NDArray[Any]) -> NDArray[np.intp]:
    if y.dtype.kind == "f":
        return np.flatnonzero(~np.isfinite(y))
    if y.dtype.kind in "mM":
        return np.flatnonzero(np.isnat(y))
    if y.dtype.kind == "O":
        return np.flatnonzero([_is_missing(value) for value in y.tolist()])
    return np.empty(0, np.intp)


def _is_missing(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")
