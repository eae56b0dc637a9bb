"""What `LabelAudit` is given, checked: features, targets, and the rows as they came.

Letters: n rows, d features, C classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import narwhals as nw
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, validate_data

from upweight.tables import Column, TableError, Task, plan_columns, prepare, read_target
from upweight.tables.frames import from_frame

__all__ = ["Inputs", "Labels", "read_inputs"]

FEWEST_ROWS = 10


@dataclass(frozen=True, eq=False)
class Labels:
    """Classes as positions.

    Positions count the classes by their first row, so that other names for the same classes are
    the same problem.

    Attributes
    ----------
    classes
        (C,) sorted, in the user's type.
    order
        (C,) where in `classes` the class of a position is.
    codes
        (n,) positions.
    """

    classes: NDArray[Any]
    order: NDArray[np.intp]
    codes: NDArray[np.int64]

    @classmethod
    def of(cls, y: NDArray[Any]) -> Labels:
        """From labels.

        Raises
        ------
        ValueError
            If there are more classes than half the rows.
        TypeError
            If labels are of types that cannot be sorted together.

        Warns
        -----
        UserWarning
            If a class has a single row: whoever has not seen that row cannot know the class.
        """
        try:
            classes, first, found = np.unique(y, return_index=True, return_inverse=True)
        except TypeError as error:
            raise TypeError(f"expected labels of one type; {error}") from error
        if 2 * len(classes) > len(y):
            raise ValueError(
                f"y has {len(classes)} classes in {len(y)} rows, more than one for two rows; if it "
                "is a number, pass task='regression'"
            )
        check_classification_targets(y)
        alone = np.bincount(found) == 1
        if alone.any():
            warnings.warn(
                f"classes with a single row: {classes[alone].tolist()[:3]}, in rows "
                f"{first[alone].tolist()[:3]}; whoever has not seen that row cannot know the "
                "class, so it will look wrong: merge it with another class, or leave the row out",
                stacklevel=4,
            )
        order = np.argsort(first)
        return cls(classes, order, np.argsort(order)[found].astype(np.int64))

    def by_name(self, view: NDArray[np.floating]) -> NDArray[np.floating]:
        """Probabilities (n, C) with columns in the order of `classes`."""
        return view[:, np.argsort(self.order)]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Rows to audit.

    Attributes
    ----------
    x
        (n, d) float32: features of the embedded judges.
    raw
        The rows as an estimator gets them: an array of numbers, or the frame that was given.
    numbers
        (n, d) as an array; None if there are columns of other kinds.
    task
        Classification or regression.
    y
        (n,) positions of the classes, or numbers.
    labels
        None in regression.
    """

    x: NDArray[np.float32]
    raw: Any
    numbers: NDArray[Any] | None
    task: Task
    y: NDArray[Any]
    labels: Labels | None


def read_inputs(audit: Any, x: Any, y: Any, task: Task | None, seed: int) -> Inputs:
    """Check and prepare what `fit` is given; sets what an estimator remembers of its input.

    Parameters
    ----------
    audit
        The estimator, for `validate_data`.
    x, y
        Rows and targets.
    task
        None decides by the targets, as `audit` does.
    seed
        Of the directions of texts.

    Raises
    ------
    ValueError
        If shapes do not fit, numbers are infinite, targets are missing, or there are too few rows
        or classes.
    TypeError
        If x is sparse or complex, or the names of its columns are of mixed types.
    """
    frame, x = _frame_of(x)
    raw, numbers = x, None
    if frame is None or all(pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes):
        checked: Any = validate_data(
            audit,
            x,
            y,
            ensure_all_finite="allow-nan",
            ensure_min_samples=FEWEST_ROWS,
        )
        numbers, y = checked
        raw = numbers if frame is None else x
        names = [f"x{at}" for at in range(numbers.shape[1])]
        frame = pd.DataFrame(numbers, columns=pd.Index(names), copy=False)
    else:
        y = validate_data(audit, y=y)
        validate_data(audit, x, skip_check_array=True)
        check_consistent_length(frame, y)
        if len(frame) < FEWEST_ROWS:
            raise ValueError(f"expected at least {FEWEST_ROWS} rows; got {len(frame)}")
    _check(y)
    task = task or _task_of(y)
    features = prepare(frame, _columns(frame), seed=seed)
    if task == "regression":
        return Inputs(features.x, raw, numbers, task, _numbers(y), None)
    labels = Labels.of(y)
    return Inputs(features.x, raw, numbers, task, labels.codes, labels)


def _frame_of(x: Any) -> tuple[pd.DataFrame | None, Any]:
    """A plain frame of the rows, None for an array; and what was given, as rows can be taken of."""
    given = nw.from_native(x, eager_only=True, pass_through=True)
    if not isinstance(given, nw.DataFrame):
        return None, x
    kind = given.implementation
    frame = from_frame(x.reset_index(drop=True) if kind.is_pandas() else x)
    return frame, x if kind.is_pandas() or kind.is_polars() else frame


def _columns(frame: pd.DataFrame) -> list[Column]:
    """As an audit of a table has them, but that numbers are features and not names of rows."""
    target = next(name for name in map(str, range(frame.shape[1] + 1)) if name not in frame)
    planned = plan_columns(frame.assign(**{target: 0}), target=target)
    return [
        replace(column, kind="numeric")
        if column.kind in ("id", "ignored") and pd.api.types.is_numeric_dtype(frame[column.name])
        else column
        for column in planned
    ]


def _check(y: NDArray[Any]) -> None:
    missing = np.flatnonzero(pd.isna(y))
    if len(missing):
        raise ValueError(
            f"y is missing in {len(missing)} rows, the first is row {missing[0]}: leave these rows "
            "out (upweight.audit takes tables with missing targets)"
        )
    if len(pd.unique(y)) < 2:
        raise ValueError(
            f"y has 1 class or number, {y[:1].tolist()[0]!r}, in all {len(y)} rows; there is "
            "nothing to predict"
        )


def _task_of(y: NDArray[Any]) -> Task:
    if y.dtype.kind not in "iuf":
        return "classification"
    try:
        return read_target(pd.Series(y)).task
    except TableError:  # of classes, which are looked at again
        return "classification"


def _numbers(y: NDArray[Any]) -> NDArray[np.float64]:
    try:
        return y.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected numbers as y in regression; {error}") from error
