"""Frames in memory: pandas, polars, Arrow, and what else narwhals knows."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import narwhals as nw
import numpy as np
import pandas as pd
import pandas.util
import pyarrow as pa

from upweight.tables.arrow import to_series
from upweight.tables.delimited import unique_names
from upweight.tables.errors import TableError, quoted

__all__ = ["content_digest", "from_frame"]


def from_frame(source: Any) -> pd.DataFrame:
    """Any data frame as one of pandas with the row positions as its index.

    An index of pandas that is more than the positions becomes the first column, named ``index``
    if it has no name.
    """
    if not isinstance(source, pd.DataFrame):
        return _from_arrow(_to_arrow(source))
    frame = source
    trivial = frame.index.nlevels == 1 and frame.index.name is None
    if not (trivial and pd.api.types.is_integer_dtype(frame.index.dtype)) or not np.array_equal(
        frame.index.to_numpy(), np.arange(len(frame))
    ):
        frame = frame.reset_index()
    names = unique_names([_name_of(name) for name in frame.columns], "the frame")
    columns = {
        name: _plain(frame.iloc[:, at].reset_index(drop=True), name)
        for at, name in enumerate(names)
    }
    return pd.DataFrame(columns, index=pd.RangeIndex(len(frame)), copy=False)


def content_digest(frame: pd.DataFrame) -> str:
    """SHA-256 over names, types and cells of a frame."""
    hashed: Any = pandas.util.hash_pandas_object  # pandas names it in no `__all__`
    digest = hashlib.sha256()
    for name in frame.columns:
        column = frame[name]
        digest.update(f"{name}\0{column.dtype}\0".encode("utf-8", errors="surrogatepass"))
        digest.update(hashed(column, index=False).to_numpy().tobytes())
    return digest.hexdigest()


def _to_arrow(source: Any) -> Any:
    if isinstance(source, pa.RecordBatch):
        source = pa.Table.from_batches([source])
    if isinstance(source, pa.Table):
        return source
    try:
        frame = nw.from_native(source)
        return (frame.collect() if isinstance(frame, nw.LazyFrame) else frame).to_arrow()
    except TypeError as error:
        raise TableError(
            "expected the path of a file, or a frame of pandas, polars or Arrow; got "
            f"{type(source).__module__}.{type(source).__qualname__}"
        ) from error


def _from_arrow(table: Any) -> pd.DataFrame:
    names = unique_names([str(name) for name in table.column_names], "the frame")
    columns = {name: to_series(table.column(at)) for at, name in enumerate(names)}
    return pd.DataFrame(columns, index=pd.RangeIndex(table.num_rows), copy=False)


def _name_of(name: Any) -> str:
    if isinstance(name, tuple):  # of columns with several levels
        return " / ".join(str(part) for part in name if str(part))
    unnamed = name is None or (isinstance(name, float) and math.isnan(name))
    return "" if unnamed else str(name)


def _plain(column: pd.Series, name: str) -> pd.Series:
    """A column with one of the types that `to_series` gives."""
    kind = column.dtype
    if isinstance(kind, np.dtype) and kind.kind == "c":
        raise TableError(f"column {quoted(name)} holds complex numbers; split it into two columns")
    if isinstance(kind, np.dtype) and kind.kind in "biufM":
        return column.astype(np.float32) if kind == np.float16 else column
    if isinstance(kind, pd.CategoricalDtype | pd.DatetimeTZDtype):
        return column
    if isinstance(kind, pd.SparseDtype):
        return _plain(pd.Series(np.asarray(column)), name)
    try:
        array: Any = pa.array(column, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return _mixed(column)
    return to_series(array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array]))


def _mixed(column: pd.Series) -> pd.Series:
    """Objects that are of no single type: numbers if all are, and else text."""
    if pd.api.types.infer_dtype(column, skipna=True) in ("mixed-integer-float", "decimal"):
        return pd.Series(pd.to_numeric(column))
    missing = column.isna().to_numpy()
    texts = [None if gone else str(value) for value, gone in zip(column, missing, strict=True)]
    return pa.array(texts, type=pa.large_string()).to_pandas()
