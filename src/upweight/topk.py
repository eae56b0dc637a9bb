"""The highest or lowest values of every row of a matrix that comes in blocks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["RunningTop"]


class RunningTop:
    """The k highest or lowest values of each of m rows, as blocks of them come.

    No more than k values of each row are kept. Of equal values the one in the earlier column is
    first, whatever the order of the blocks.

    Parameters
    ----------
    rows
        m.
    k
        How many, at most.
    dtype
        Of the values.
    harmful
        The lowest in place of the highest.

    Examples
    --------
    >>> top = RunningTop(1, 2, torch.float32)
    >>> top.write(slice(0, 1), slice(2, 4), torch.tensor([[3.0, 1.0]]))
    >>> top.write(slice(0, 1), slice(0, 2), torch.tensor([[0.0, 3.0]]))
    >>> top.finish()
    (tensor([[3., 3.]]), tensor([[1, 2]]))
    """

    def __init__(self, rows: int, k: int, dtype: torch.dtype, *, harmful: bool = False) -> None:
        if not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"expected a whole number k of at least 1; got {k!r}")
        self._k, self._harmful = int(k), harmful
        # Empty places come after all values: no number is below -inf, or behind NaN, and of equal
        # ones theirs is the last column.
        empty = float("nan") if harmful else -float("inf")
        self._values = torch.full((rows, self._k), empty, dtype=dtype)
        self._places = torch.full((rows, self._k), torch.iinfo(torch.int64).max)
        self._seen = torch.zeros(rows, dtype=torch.int64)

    def write(self, rows: slice, columns: slice, block: Tensor) -> None:
        """A block (rows, columns) that has not been there yet."""
        block = block.detach().to("cpu", self._values.dtype)
        at = torch.arange(columns.start, columns.stop).expand(len(block), -1)
        values = torch.cat([self._values[rows], block], 1)
        places = torch.cat([self._places[rows], at], 1)
        if not bool((self._places[rows] < columns.start).all()):
            order = torch.argsort(places, dim=1, stable=True)
            values, places = values.gather(1, order), places.gather(1, order)
        best = torch.argsort(values, dim=1, descending=not self._harmful, stable=True)
        self._values[rows] = values.gather(1, best[:, : self._k])
        self._places[rows] = places.gather(1, best[:, : self._k])
        self._seen[rows] += columns.stop - columns.start

    def finish(self) -> tuple[Tensor, Tensor]:
        """Values and columns, both (m, k), from the first place on."""
        k = min(self._k, int(self._seen.min()))
        return self._values[:, :k], self._places[:, :k]
