"""Scores as tables: the highest and the lowest, and sums and means by class, source or cluster.

Letters: m test rows, n training rows, b rows in a block, t and g groups of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

__all__ = [
    "Groups",
    "Reduce",
    "group_scores",
    "group_values",
    "grouped_mean",
    "make_groups",
    "ranked",
]

Reduce = Literal["sum", "mean"]

MISSING = "(missing)"


@dataclass(frozen=True)
class Groups:
    """Which group each row is in.

    Attributes
    ----------
    codes
        The group of every row, (rows,).
    names
        The groups, in order.
    """

    codes: Tensor
    names: pd.Index

    @property
    def counts(self) -> Tensor:
        """How many rows are in every group."""
        return torch.bincount(self.codes, minlength=len(self.names))

    def told(self) -> dict[Any, int]:
        """The counts by name."""
        return dict(zip(self.names.tolist(), self.counts.tolist(), strict=True))


def make_groups(labels: Any, rows: pd.Index, what: str) -> Groups:
    """The groups that labels make of rows: one label a row, sorted where that is possible.

    A pandas Series whose index has the names of the rows in another order is put in their order;
    all other labels are taken by position. Rows without a label (None, NaN) are a group of their
    own at the end.

    Raises
    ------
    ValueError
        If there is not one label for every row.

    Examples
    --------
    >>> groups = make_groups(["b", "a", None, "b"], pd.RangeIndex(4), "training")
    >>> groups.told()
    {'a': 1, 'b': 2, '(missing)': 1}
    """
    if isinstance(labels, str) or not hasattr(labels, "__len__"):
        raise TypeError(
            f"expected one label for every {what} row, as a sequence; got {type(labels).__name__}"
        )
    if len(labels) != len(rows):
        raise ValueError(
            f"expected one label for every {what} row, {len(rows)}; got {len(labels)} labels"
        )
    if isinstance(labels, pd.Series):
        labels = _in_order(labels, rows)
    elif isinstance(labels, Tensor):
        labels = labels.cpu().numpy()
    elif not isinstance(labels, pd.Index | np.ndarray | pd.Categorical):
        # not np.asarray, which makes texts of a list of numbers and texts
        labels = pd.Series(list(labels), dtype=object).infer_objects()
    if getattr(labels, "ndim", 1) != 1:
        raise ValueError(f"expected one label a {what} row; got an array of shape {labels.shape}")
    codes, names = pd.factorize(labels, sort=True)
    names = pd.Index(names)
    if bool((codes < 0).any()):
        own = MISSING
        while own in names:
            own = f"({own})"
        codes = np.where(codes < 0, len(names), codes)
        names = pd.Index([*names, own], dtype=object)
    return Groups(torch.from_numpy(codes.astype(np.int64)), names.rename("group"))


def _in_order(labels: pd.Series, rows: pd.Index) -> pd.Series:
    """A Series in the order of the rows, where its index tells it; else as it is."""
    positions = pd.RangeIndex(len(rows))
    # Rows without names are numbered: an index of numbers says nothing of their places then, it may
    # be left from a table that was shuffled before rows were taken of it.
    if rows.equals(positions) or labels.index.equals(rows):
        return labels
    if labels.index.is_unique and rows.is_unique and rows.isin(labels.index).all():
        return labels.reindex(rows)
    return labels


def group_columns(block: Tensor, groups: Groups, reduce: Reduce) -> Tensor:
    """Sums or means over groups of the last dimension: (b, n) → (b, g), in float64."""
    out = torch.zeros(len(block), len(groups.names), dtype=torch.float64)
    out.index_add_(1, groups.codes, block.to("cpu", torch.float64))
    if reduce == "mean":
        return out / groups.counts
    if reduce != "sum":
        raise ValueError(f"expected reduce 'sum' or 'mean'; got {reduce!r}")
    return out


def grouped_mean(blocks: Iterable[tuple[int, Tensor]], groups: Groups) -> Tensor:
    """Means over groups of rows that come in blocks: (m, n) → (t, n), in float64."""
    total: Tensor | None = None
    for start, block in blocks:
        if total is None:
            total = torch.zeros(len(groups.names), block.shape[1], dtype=torch.float64)
        own = groups.codes[start : start + len(block)]
        total.index_add_(0, own, block.to("cpu", torch.float64))
    assert total is not None
    return total / groups.counts[:, None]


def group_scores(
    blocks: Iterator[tuple[int, Tensor]],
    train: Groups,
    test: Groups | None,
    test_names: pd.Index,
    reduce: Reduce,
) -> pd.DataFrame:
    """Test rows or groups of them down, groups of training rows across."""
    reduced = ((start, group_columns(block, train, reduce)) for start, block in blocks)
    if test is None:
        values, index = torch.cat([block for _, block in reduced]), test_names
    else:
        values, index = grouped_mean(reduced, test), test.names
    frame = pd.DataFrame(values.numpy(), index=index, columns=train.names)
    frame.attrs["train_rows"] = train.told()
    if test is not None:
        frame.attrs["test_rows"] = test.told()
    return frame


def group_values(values: Tensor, groups: Groups) -> pd.DataFrame:
    """Sum, mean, count and share of negative values of every group: values (n,)."""
    both = torch.stack([values.to("cpu", torch.float64), (values < 0).to("cpu", torch.float64)])
    total = group_columns(both, groups, "sum")
    counts = groups.counts
    return pd.DataFrame(
        {
            "sum": total[0].numpy(),
            "mean": (total[0] / counts).numpy(),
            "count": counts.numpy(),
            "negative": (total[1] / counts).numpy(),
        },
        index=groups.names,
    )


def ranked(
    what: str, rows: pd.Index, columns: pd.Index, values: Tensor, *, k: int, harmful: bool
) -> pd.DataFrame:
    """The k highest or lowest values of every row, (b, n), with the name of their column."""
    if not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"expected a whole number k of at least 1; got {k!r}")
    order = torch.argsort(values, dim=1, descending=not harmful, stable=True)[:, :k]
    return pd.DataFrame(
        {
            what: rows.repeat(order.shape[1]),
            "train_row": columns[order.flatten().numpy()],
            "score": values.gather(1, order).flatten().numpy(),
            "rank": np.tile(np.arange(1, order.shape[1] + 1), len(values)),
        }
    )
