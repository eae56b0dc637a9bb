"""Names of rows and provenances as JSON can hold them, and back."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["index_from", "index_to", "plain"]


def plain(value: Any, name: str) -> Any:
    """Numbers, text, truth values, None, lists and dicts of these, from what numpy has for them.

    Raises
    ------
    TypeError
        If there is something else, with its name.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), name)
    if isinstance(value, tuple | list | set | frozenset):
        parts = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(part, f"{name}[{i}]") for i, part in enumerate(parts)]
    if isinstance(value, Mapping):
        return {str(key): plain(part, f"{name}[{key!r}]") for key, part in value.items()}
    raise TypeError(
        f"expected {name} as numbers, text, lists or dicts; got a {type(value).__name__}"
    )


def index_to(index: pd.Index) -> dict[str, Any]:
    """What `index_from` makes the same index of, type included; categories are their labels.

    Raises
    ------
    TypeError
        If a name is of a kind that no file here can hold.
    """
    import pandas as pd

    if isinstance(index, pd.RangeIndex):
        return {"kind": "range", "values": [index.start, index.stop, index.step]}
    if isinstance(index, pd.CategoricalIndex):
        index = index.astype(index.categories.dtype)
    if isinstance(index, pd.DatetimeIndex | pd.TimedeltaIndex):
        return {"kind": "time", "dtype": str(index.dtype), "values": index.asi8.tolist()}
    dtype = None if index.dtype == object else str(index.dtype)
    return {"kind": "plain", "dtype": dtype, "values": [_to(name) for name in index.tolist()]}


def index_from(told: dict[str, Any] | list[Any]) -> pd.Index:
    """The index that `index_to` told of; of a list, as the first format had it, what it says."""
    import pandas as pd

    if isinstance(told, list):
        return pd.Index(told, name="row")
    values = told["values"]
    if told["kind"] == "range":
        return pd.RangeIndex(*values, name="row")
    if told["kind"] == "time":
        dtype: Any = pd.api.types.pandas_dtype(told["dtype"])
        numbers = np.asarray(values, np.int64)
        if isinstance(dtype, pd.DatetimeTZDtype):
            utc = pd.DatetimeIndex(numbers.view(f"M8[{dtype.unit}]"), tz="UTC")
            return utc.tz_convert(dtype.tz).rename("row")
        return pd.Index(numbers.view(dtype), name="row")
    names = [_from(name) for name in values]
    if told["dtype"] is None:
        return pd.Index(_objects(names), dtype=object, name="row")
    return pd.Index(names, name="row").astype(told["dtype"])


def _objects(names: list[Any]) -> np.ndarray[Any, Any]:
    """Tuples stay tuples in it."""
    found = np.empty(len(names), object)
    found[:] = names
    return found


def _to(name: Any) -> Any:
    import pandas as pd

    if isinstance(name, np.generic) and not isinstance(name, np.datetime64 | np.timedelta64):
        name = name.item()
    if name is None or isinstance(name, str | bool | int | float):
        return name
    if isinstance(name, bytes):
        return {"bytes": name.hex()}
    if isinstance(name, tuple):
        return {"tuple": [_to(part) for part in name]}
    if isinstance(name, pd.Timestamp):
        return {"timestamp": name.isoformat()}
    if isinstance(name, datetime.datetime) and name is not pd.NaT:
        return {"datetime": name.isoformat()}
    if isinstance(name, datetime.date) and name is not pd.NaT:
        return {"date": name.isoformat()}
    raise TypeError(
        "expected names of rows as numbers, text, dates, bytes or tuples of these, to write them "
        f"to a file; got a {type(name).__name__}: give others first, values.named(…)"
    )


def _from(told: Any) -> Any:
    import pandas as pd

    if not isinstance(told, dict):
        return told
    ((kind, value),) = told.items()
    if kind == "bytes":
        return bytes.fromhex(value)
    if kind == "tuple":
        return tuple(_from(part) for part in value)
    if kind == "timestamp":
        return pd.Timestamp(value)
    if kind == "datetime":
        return datetime.datetime.fromisoformat(value)
    return datetime.date.fromisoformat(value)
