"""Rows in a fixed order: what tensors, data sets and loaders have in common.

A batch is any pytree (tuple, list, dict, …) of tensors whose first dimension counts rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

__all__ = ["Rows"]

Batch = Any


class Rows:
    """n rows of data in a fixed order, to be taken in batches of any size.

    Parameters
    ----------
    data
        One of: a pytree of tensors or arrays with a common first dimension, usually ``(x, y)``; a
        map-style `torch.utils.data.Dataset`; a `DataLoader`, of which the data set and the
        ``collate_fn`` are used, in the order of the data set and whatever its shuffling, batch size
        and ``drop_last``.
    names
        One name per row, for tables and reports. The default is the index of a pandas object, else
        the position from 0.

    Raises
    ------
    TypeError
        If the rows have no identity: an iterable-style data set, a generator.
    ValueError
        If there are no rows, lengths differ, or there is not one name per row.

    Examples
    --------
    >>> import torch
    >>> rows = Rows((torch.arange(5.0)[:, None], torch.arange(5)))
    >>> len(rows), rows.batch(3, 5)[1]
    (5, tensor([3, 4]))
    """

    def __init__(self, data: Any, names: Sequence[Any] | pd.Index | None = None) -> None:
        if isinstance(data, Rows):
            names = data.names if names is None else names
            self._length, self._take = data._length, data._take
        else:
            self._length, self._take = _source(data)
        if self._length == 0:
            raise ValueError("expected at least one row of data; got none")
        self.names = _row_names(_names_of(data) if names is None else names, self._length)

    def __len__(self) -> int:
        return self._length

    def take(self, rows: Sequence[int] | slice) -> Batch:
        """The batch of these rows (positions from 0), in the order given."""
        return self._take(rows)

    def batch(self, start: int, stop: int) -> Batch:
        """The batch of rows start … stop - 1."""
        return self._take(slice(start, stop))

    def subset(self, rows: Sequence[int]) -> Rows:
        """These rows alone, under the names that they have here."""
        rows = [int(r) for r in rows]
        chosen = object.__new__(Rows)
        take = self._take

        def take_chosen(index: Sequence[int] | slice) -> Batch:
            positions = rows[index] if isinstance(index, slice) else [rows[i] for i in index]
            return take(positions)

        chosen._length, chosen._take = len(rows), take_chosen
        chosen.names = self.names[rows]
        return chosen


def _names_of(data: Any) -> pd.Index | None:
    """The index of a pandas object, alone or first in a batch."""
    if isinstance(data, tuple | list) and data:
        data = cast("Sequence[Any]", data)[0]
    return data.index if isinstance(data, pd.DataFrame | pd.Series) else None


def _row_names(names: Any, length: int) -> pd.Index:
    if names is None:
        return pd.RangeIndex(length, name="row")
    if isinstance(names, Tensor):
        names = names.tolist()
    index = pd.Index(names)
    if len(index) != length:
        raise ValueError(f"expected one name per row, {length}; got {len(index)} names")
    if isinstance(index, pd.MultiIndex):
        index = index.to_flat_index()
    return index.rename(index.name or "row")


def _source(data: Any) -> tuple[int, Callable[[Any], Batch]]:
    """The number of rows, and a function that takes some of them."""
    if isinstance(data, DataLoader):
        return _loader_source(cast("DataLoader[Any]", data))
    if _is_plain(data):
        return _tensor_source(data.tensors)
    if isinstance(data, IterableDataset) or inspect.isgenerator(data):
        raise TypeError(
            "expected rows that can be looked up by position; got an iterable "
            f"({type(data).__name__}), whose rows have no identity. Collect it first: "
            "list(dataset) makes a map-style data set of it"
        )
    if isinstance(data, pd.DataFrame | pd.Series | np.ndarray | Tensor) or (
        isinstance(data, tuple | Mapping) or (isinstance(data, list) and _is_tensor_pair(data))
    ):
        return _tensor_source(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _dataset_source(data, default_collate)
    raise TypeError(
        f"expected (x, y) tensors, a map-style Dataset or a DataLoader; got {type(data).__name__}"
    )


def _is_tensor_pair(data: list[Any]) -> bool:
    """A list is a batch when its entries are whole arrays; else it is a data set of rows."""
    return (
        bool(data)
        and all(
            isinstance(d, np.ndarray | Tensor | pd.DataFrame | pd.Series) and d.ndim > 0
            for d in data
        )
        and (len({len(d) for d in data}) == 1 and len(data) == 2)
    )


def _is_plain(data: Any) -> bool:
    """A `TensorDataset` whose rows are those of its tensors: a subclass may transform them."""
    kind: Any = type(data)
    return (
        isinstance(data, TensorDataset)
        and kind.__getitem__ is TensorDataset.__getitem__
        and not hasattr(kind, "__getitems__")
    )


def _tensor_source(data: Any) -> tuple[int, Callable[[Any], Batch]]:
    tensors = tree_map(_as_tensor, data)
    leaves, _ = tree_flatten_with_path(tensors)
    if not leaves:
        raise ValueError("expected tensors with rows; got an empty batch")
    lengths: dict[str, int] = {}
    for path, leaf in leaves:
        name = "data" + "".join(str(p) for p in path)
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            raise TypeError(
                f"expected tensors or arrays whose first dimension counts rows; {name} is "
                f"{type(leaf).__name__} {'' if not isinstance(leaf, Tensor) else 'without rows'}"
            )
        lengths[name] = leaf.shape[0]
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise ValueError(f"expected the same number of rows everywhere; {told}")

    def take(rows: Any) -> Batch:
        index = rows if isinstance(rows, slice) else torch.as_tensor(list(rows))
        return tree_map(lambda leaf: leaf[index], tensors)

    return next(iter(lengths.values())), take


def _as_tensor(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach()
    if isinstance(leaf, pd.DataFrame | pd.Series):
        leaf = leaf.to_numpy()
    if isinstance(leaf, np.ndarray):
        if leaf.dtype.kind not in "biuf":
            raise TypeError(
                f"expected numbers; got an array of {leaf.dtype}. Encode text and categories first"
            )
        if not leaf.flags.writeable:  # of a pandas object; torch warns of tensors on such memory
            leaf = leaf.copy()
        return torch.from_numpy(np.ascontiguousarray(leaf))
    return leaf


def _dataset_source(
    dataset: Any, collate: Callable[[list[Any]], Batch]
) -> tuple[int, Callable[[Any], Batch]]:
    length = len(dataset)

    def take(rows: Any) -> Batch:
        positions = range(length)[rows] if isinstance(rows, slice) else rows
        if hasattr(dataset, "__getitems__"):
            return _plain_mappings(collate(dataset.__getitems__(list(positions))))
        return _plain_mappings(collate([dataset[int(i)] for i in positions]))

    return length, take


def _plain_mappings(batch: Any) -> Any:
    """Mappings that are no pytree (the BatchEncoding of transformers, a UserDict) as dicts."""
    if isinstance(batch, Mapping) and not isinstance(batch, dict):
        batch = dict(cast("Mapping[Any, Any]", batch))
    return batch


def _loader_source(loader: DataLoader[Any]) -> tuple[int, Callable[[Any], Batch]]:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return _source(dataset)
    if not _visits_every_row_once(loader):
        sampler: Any = loader.sampler
        if isinstance(sampler, SequentialSampler):
            sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
        raise TypeError(
            "expected a DataLoader that visits every row of its data set once; got one with a "
            f"{type(sampler).__name__}. Pass torch.utils.data.Subset(dataset, rows) instead"
        )
    if _is_plain(dataset) and loader.collate_fn is default_collate:
        return _tensor_source(tuple(cast("TensorDataset", dataset).tensors))
    if loader.batch_size is None and loader.batch_sampler is None:
        return _dataset_source(dataset, default_collate)
    return _dataset_source(dataset, loader.collate_fn)


def _visits_every_row_once(loader: DataLoader[Any]) -> bool:
    """Whether the order of a loader is all that its samplers decide, so that it can be dropped.

    A sampler that leaves rows out or repeats them makes another n than that of the data set. Those
    of torch are known; a batch sampler of the user's own is asked for its batches.
    """
    n = len(cast("Any", loader.dataset))
    batches: Any = loader.batch_sampler
    if batches is not None and not isinstance(batches, BatchSampler):
        if not isinstance(batches, tuple | list):
            with torch.random.fork_rng(devices=[]):
                batches = list(batches)
        return sorted(int(i) for batch in batches for i in batch) == list(range(n))
    sampler: Any = loader.sampler if batches is None else batches.sampler
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == n
    return isinstance(sampler, SequentialSampler)
