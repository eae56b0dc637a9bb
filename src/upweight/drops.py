"""Which rows are removed together, in any form that a person would give them.

Letters: n training rows, G groups.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

__all__ = ["Drop", "masks_of"]

Drop = Mapping[Any, Any] | Iterable[Any] | np.ndarray | Tensor | pd.Series


def masks_of(drop: Drop, names: pd.Index) -> tuple[Tensor, pd.Index]:
    """Which rows each group drops, (G, n) booleans, and the names of the groups.

    Parameters
    ----------
    drop
        Rows of one group: positions from 0, names that are text, or a mask (n,). Several groups: a
        mapping from names to such rows, a sequence of such sequences, or masks (G, n).
    names
        Of the n rows.

    Raises
    ------
    ValueError, IndexError, KeyError
        If there are no rows with these positions or names, or a group leaves none.
    """
    n = len(names)
    if drop is None or isinstance(drop, str | bytes | int | float | np.generic):
        raise TypeError(
            f"expected rows to drop, as a sequence; got {drop!r}. One row alone is [{drop!r}]"
        )
    if isinstance(drop, Mapping):
        groups = pd.Index(list(drop), name="group", tupleize_cols=False)
        masks = [_mask(rows, names) for rows in drop.values()]
    else:
        masks = [_mask(rows, names) for rows in _groups_in(drop)]
        groups = pd.RangeIndex(len(masks), name="group")
    if not masks:
        raise ValueError("expected at least one group of rows to drop; got none")
    found = torch.stack(masks)
    for group, mask in zip(groups, found, strict=True):
        if not bool(mask.any()):
            raise ValueError(f"group {group!r} drops no row")
        if bool(mask.all()):
            raise ValueError(f"group {group!r} drops all {n} rows: none is left to train on")
    return found, groups


def _groups_in(drop: Any) -> list[Any]:
    """The groups of a sequence of groups or of a matrix; a sequence of rows is one group."""
    if isinstance(drop, Tensor | np.ndarray):
        return list(drop) if drop.ndim == 2 else [drop]
    if isinstance(drop, pd.Series | pd.Index | pd.DataFrame):
        return [drop]
    entries: list[Any] = list(drop)
    first = entries[0] if entries else None
    several = isinstance(first, Sequence | set | frozenset | pd.Series | pd.Index) or (
        isinstance(first, Tensor | np.ndarray) and first.ndim == 1
    )
    return entries if several and not isinstance(first, str) else [entries]


def _mask(rows: Any, names: pd.Index) -> Tensor:
    """The rows of one group as booleans (n,)."""
    n = len(names)
    array = _row_array(rows, names)
    kind = array.dtype.kind
    if kind == "b":
        if array.shape != (n,):
            raise ValueError(
                f"expected a mask of shape ({n},) over the training rows; got {array.shape}"
            )
        return torch.from_numpy(array.copy())
    if array.ndim != 1:
        raise ValueError(f"expected positions of rows (k,) or a mask ({n},); got {array.shape}")
    mask = torch.zeros(n, dtype=torch.bool)
    if not len(array):
        return mask
    if kind in "OUTMm":
        given = pd.Index(array, tupleize_cols=False)
        missing = given[~given.isin(names)]
        if len(missing):
            raise KeyError(f"no training row is called {missing[0]!r}")
        return torch.from_numpy(names.isin(given))
    if kind not in "iu":
        raise TypeError(f"expected positions of rows, names or a mask; got {array.dtype}")
    if array.min() < 0 or array.max() >= n:
        raise IndexError(
            f"expected positions of rows from 0 to {n - 1}; got {array.min()} to {array.max()}"
        )
    found, times = np.unique(array, return_counts=True)
    if len(found) < len(array):
        raise ValueError(
            f"expected different rows; position {found[times.argmax()]} comes {times.max()} times. "
            "A mask has booleans, not 0 and 1"
        )
    mask[torch.from_numpy(found.astype(np.int64))] = True
    return mask


def _row_array(rows: Any, names: pd.Index) -> np.ndarray:
    """Positions, names or a mask as an array of a dtype that says which."""
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu().numpy() if not rows.is_floating_point() else rows.tolist()
    if isinstance(rows, set | frozenset):
        rows = list(cast("set[Any]", rows))
    try:
        array = np.asarray(rows)
    except ValueError as error:
        raise ValueError(f"expected the rows of one group; got {rows!r}") from error
    if array.dtype.kind == "O" and array.ndim == 1:
        strange = [row for row in array if not isinstance(row, Hashable)]
        if strange:
            raise TypeError(f"expected positions of rows, names or a mask; got {strange[0]!r}")
        # what pandas keeps as objects
        kind = pd.api.types.infer_dtype(array, skipna=False)
        array = array.astype({"boolean": bool, "integer": np.int64}.get(kind, object))
    of_names = isinstance(rows, pd.Series) and array.dtype.kind == "b" and len(rows) == len(names)
    if of_names and not _same_order(cast("pd.Series", rows).index, names):
        raise ValueError(
            "expected a mask in the order of the training rows; the index of this Series is "
            "another one than their names. Reindex it, or pass mask.to_numpy()"
        )
    return array


def _same_order(index: pd.Index, names: pd.Index) -> bool:
    return index.equals(names) or index.equals(pd.RangeIndex(len(names)))
