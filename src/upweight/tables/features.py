"""`prepare`: a table → numbers for networks and distances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from upweight.tables import encoders
from upweight.tables.cells import encode
from upweight.tables.columns import MAX_LEVELS, Column, Kind, parse_as
from upweight.tables.encoders import Part
from upweight.tables.errors import TableError, quoted

__all__ = ["Features", "prepare"]

USED: tuple[Kind, ...] = ("numeric", "category", "boolean", "date", "text")
OFTEN_MISSING = 0.01
ONE_HOT_CELLS = 150_000_000
FEWEST_LEVELS = 5
CHUNK = 2**16


@dataclass(frozen=True, eq=False)
class Features:
    """A table as numbers.

    Attributes
    ----------
    x
        (n, d) float32: features for networks and distances; no value is missing.
    names
        d names, such as ``age`` or ``colour=red``.
    column
        (d,) the position in `columns` of the column that each feature came from, ascending.
    columns
        Names of the columns that have features.
    numeric
        (n, c) float64: the numbers themselves, NaN where missing; dates as days since 1970-01-01.
    numeric_columns
        c names.
    """

    x: np.ndarray
    names: tuple[str, ...]
    column: np.ndarray
    columns: tuple[str, ...]
    numeric: np.ndarray
    numeric_columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Any) -> Features:
        """Some rows, by position or as a mask, with the same features."""
        return replace(self, x=self.x[rows], numeric=self.numeric[rows])


def prepare(frame: pd.DataFrame, columns: Sequence[Column], *, seed: int = 0) -> Features:
    """Turn the columns of a table into features.

    Parameters
    ----------
    frame
        As `read_table` gives it.
    columns
        As `plan_columns` gives them.
    seed
        Of the directions of texts.

    Raises
    ------
    TableError
        If a number is infinite (column and row are named), or no column is left.

    Notes
    -----
    Columns of all kinds weigh about the same: the mean squared distance of two rows in the features
    of one column is about 2 (of numbers: if they are normally distributed).

    - *numeric*: u = v / √(1 + (v/4)²) with v = (x − median) / scale and scale = interquartile range
      / 1.349, or the standard deviation where that is 0; so ``|u| < 4``. Before, log(1 + x/q) is
      taken of numbers ≥ 0 that are strongly skewed to the right, q being their lower quartile above
      0; the feature is then called ``log(name)``. Missing values lie at the median.
    - *boolean*: (x − p) / √(p(1 − p)) with p the share of yes; missing values lie at 0.
    - *date*: days as numbers; month and weekday, where they vary, as points on a circle, which
      weigh half a column each.
    - *category*: a feature for each of the 30 commonest levels (fewer if there are very many rows,
      so that all of them have at most 150 million cells), one for the others, one for missing
      values. All are 0 or 1 / √(1 − Σ p²), with p the shares of the levels. If more than a fifth of
      the cells would be others and skrub is installed, its `StringEncoder` places similar
      spellings near each other instead.
    - *text*: TF-IDF weights of words in their first 20 singular directions.

    p(1 − p) and 1 − Σ p² count as at least 0.05 and 0.1. A column other than a category of which at
    least 1 % is missing has another feature that says so, a boolean. Features that are the same in
    all rows are left out.

    The order of the rows does not matter, and the same seed gives the same features.

    Examples
    --------
    >>> from upweight.tables import plan_columns
    >>> frame = pd.DataFrame({"colour": ["red", "blue", "red"], "size": [1.5, 2.5, 9]})
    >>> frame["y"] = [0, 1, 0]
    >>> features = prepare(frame, plan_columns(frame, target="y"))
    >>> features.names
    ('colour=blue', 'colour=red', 'size')
    >>> features.x.round(2)
    array([[ 0.  ,  1.5 , -0.36],
           [ 1.5 ,  0.  ,  0.  ],
           [ 0.  ,  1.5 ,  2.02]], dtype=float32)
    """
    used = [column for column in columns if column.kind in USED]
    numeric_columns = [column for column in used if column.kind in ("numeric", "date")]
    numeric = np.empty((len(frame), len(numeric_columns)))
    for at, column in enumerate(numeric_columns):
        numeric[:, at] = _numbers(_series(frame, column.name), column)
    places = {column.name: at for at, column in enumerate(numeric_columns)}
    levels = _levels(len(frame), used)
    parts: list[tuple[str, Part]] = []
    for column in used:
        values = numeric[:, places[column.name]] if column.name in places else None
        found = _parts(_series(frame, column.name), column, values, levels, seed)
        parts += [(column.name, part) for part in found]
    return _written(frame, columns, parts, numeric, [column.name for column in numeric_columns])


def _parts(
    series: pd.Series, column: Column, values: np.ndarray | None, levels: int, seed: int
) -> Iterator[Part]:
    """The features of one column."""
    name = column.name
    missing = None if values is None else np.isnan(values)
    if column.kind == "date" and values is not None:
        yield from encoders.dates(name, values)
    elif values is not None:
        yield from encoders.numbers(name, values)
    elif column.kind == "boolean":
        yes = _numbers(series, column)
        missing = np.isnan(yes)
        yield from encoders.switch(name, yes)
    else:
        encoded = encode(series)
        if column.kind == "text":
            missing = encoded.codes < 0
            yield from encoders.texts(name, encoded, seed)
        else:
            spelt = encoders.messy(encoded, MAX_LEVELS)
            found = encoders.strings(name, encoded, seed) if spelt else None
            missing = None if found is None else encoded.codes < 0
            yield from found or encoders.categories(name, encoded, levels)
    if missing is not None and missing.mean() >= OFTEN_MISSING:
        yield from encoders.switch(f"{name} missing", missing.astype(np.float32))


def _numbers(series: pd.Series, column: Column) -> np.ndarray:
    """(n,) float64 of a numeric, boolean or date column."""
    kind = series.dtype
    if column.kind != "date" and isinstance(kind, np.dtype) and kind.kind in "biuf":
        values = series.to_numpy(dtype=np.float64)
    elif column.kind == "date" and kind.kind == "M":
        zoned = isinstance(kind, pd.DatetimeTZDtype)
        plain = series.dt.tz_convert("UTC").dt.tz_localize(None) if zoned else series
        stamps = plain.to_numpy(dtype="datetime64[us]")
        values = np.where(np.isnat(stamps), np.nan, stamps.astype(np.int64) / 86_400e6)
    else:
        encoded = encode(series)
        parsed = parse_as(column.kind, encoded)
        if parsed is None:
            raise TableError(
                f"column {quoted(column.name)} is planned as {column.kind}, but is none; plan again"
            )
        values = encoded.spread(parsed.values, np.nan)
    infinite = np.isinf(values)
    if infinite.any():
        row = int(np.flatnonzero(infinite)[0])
        raise TableError(
            f"column {quoted(column.name)} has {int(infinite.sum())} infinite values, the first in "
            f"row {row}: put a number there or empty the cell (missing values are no problem), or "
            "leave the column out with --ignore"
        )
    return values


def _levels(n: int, used: Sequence[Column]) -> int:
    """Levels of a category that get a feature of their own."""
    count = sum(column.kind == "category" for column in used)
    affordable = ONE_HOT_CELLS // max(1, n * count)
    return int(np.clip(affordable, FEWEST_LEVELS, MAX_LEVELS))


def _written(
    frame: pd.DataFrame,
    columns: Sequence[Column],
    parts: list[tuple[str, Part]],
    numeric: np.ndarray,
    numeric_columns: list[str],
) -> Features:
    """All parts side by side, without features that are constant."""
    x = np.empty((len(frame), sum(len(part.names) for _, part in parts)), dtype=np.float32)
    at = 0
    for _, part in parts:
        part.write(x[:, at : at + len(part.names)])
        at += len(part.names)
    varies = np.zeros(x.shape[1], dtype=bool)
    for start in range(0, len(x), CHUNK):
        varies |= (x[start : start + CHUNK] != x[0]).any(0)
    if not varies.any():
        told = ", ".join(f"{quoted(c.name)} ({c.kind})" for c in columns[:12])
        raise TableError(
            f"no column is left to explain the target: {told}; say what a column is with --kind, "
            "such as --kind NAME=numeric"
        )
    names = [(name, feature) for name, part in parts for feature in part.names]
    names = [pair for pair, varied in zip(names, varies, strict=True) if varied]
    used = list(dict.fromkeys(name for name, _ in names))
    return Features(
        x if varies.all() else x[:, varies],
        tuple(feature for _, feature in names),
        np.array([used.index(name) for name, _ in names], dtype=np.int64),
        tuple(used),
        numeric,
        tuple(numeric_columns),
    )


def _series(frame: pd.DataFrame, name: str) -> pd.Series:
    """A column as a series, which pandas types as a series or a frame."""
    found: Any = frame[name]
    return found
