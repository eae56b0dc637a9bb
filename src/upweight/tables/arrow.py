"""Columns of Arrow → columns of pandas, of few types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute

from upweight.tables.delimited import EXACT
from upweight.tables.jsonlines import as_text

pc: Any = pyarrow.compute  # its functions are made when it is imported

__all__ = ["least_bytes", "to_series"]


def to_series(column: Any) -> pd.Series:
    """A chunked array as one of: int64 (and shorter), float64, bool, text, category, date.

    Integers with missing values become floats if no digit is lost, and else text; decimals and
    durations (in seconds) floats; lists, structs and maps their JSON.
    """
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        chunks = [chunk.storage for chunk in column.chunks]
        return to_series(pa.chunked_array(chunks, type=kind.storage_type))
    if pa.types.is_dictionary(kind):
        if pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type):
            return column.unify_dictionaries().to_pandas()
        return to_series(column.cast(kind.value_type))
    if pa.types.is_null(kind):
        return pd.Series(np.full(len(column), np.nan))
    if pa.types.is_integer(kind) and column.null_count:
        low, high = pc.min_max(column).as_py().values()
        lossy = low is not None and max(abs(low), abs(high)) > EXACT
        return column.cast(pa.large_string() if lossy else pa.float64()).to_pandas()
    if pa.types.is_decimal(kind):
        return column.cast(pa.float64()).to_pandas()
    if pa.types.is_duration(kind):
        ticks = column.cast(pa.int64()).cast(pa.float64())
        return pc.divide(ticks, {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[kind.unit]).to_pandas()
    if pa.types.is_time(kind):
        return column.cast(pa.large_string()).to_pandas()
    if _is_plain(kind):
        return column.to_pandas(date_as_object=False)
    texts = [as_text(value) for chunk in column.chunks for value in chunk.to_pylist()]
    return pa.array(texts, type=pa.large_string()).to_pandas()


def least_bytes(kind: Any) -> float:
    """The least bytes that a value of an Arrow type takes in memory."""
    if pa.types.is_dictionary(kind):
        return least_bytes(kind.index_type)
    if pa.types.is_null(kind) or pa.types.is_nested(kind):
        return 0.0
    try:
        return kind.bit_width / 8
    except ValueError:  # text and bytes: at least an offset
        return 4.0


def _is_plain(kind: Any) -> bool:
    """Whether pandas has such a type."""
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    text = text or pa.types.is_string_view(kind)
    dates = pa.types.is_date(kind) or pa.types.is_timestamp(kind)
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return text or dates or numbers
