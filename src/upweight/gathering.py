"""What the ranks of a cluster compute each for their share of the training rows, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from upweight.stream import ArraySink

if TYPE_CHECKING:
    from upweight.cluster import Cluster

__all__ = ["ColumnSink", "Share", "gather_top", "on_all_ranks"]

# Options that may be written in another way on another rank.
PATHS = ("to", "factors")

P = ParamSpec("P")
R = TypeVar("R")


class _Clustered(Protocol):
    cluster: Cluster | None

    def settings(self) -> dict[str, str]: ...


S = TypeVar("S", bound=_Clustered)


def on_all_ranks(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that all ranks of the object's cluster call, and that fails on all or on none."""

    @wraps(method)
    def run(self: S, *args: P.args, **options: P.kwargs) -> R:
        if self.cluster is None:
            return method(self, *args, **options)
        plain = {**{f"argument {at}": one for at, one in enumerate(args)}, **options}
        told = {
            name: repr(one)
            for name, one in plain.items()
            if isinstance(one, str | int | float | None) and name not in PATHS
        }
        with self.cluster.together(f"{method.__name__}()"):
            self.cluster.same({**self.settings(), **told}, "settings")
            return method(self, *args, **options)

    return run


@dataclass(frozen=True)
class Share:
    """The training rows whose scores this rank computes.

    Attributes
    ----------
    cluster
        None: there is one process.
    n
        All rows.
    rows
        Those of this rank. Where it has none, one row, so that all ranks do the same; it is left
        out by `gather`.
    """

    cluster: Cluster | None
    n: int

    @property
    def rows(self) -> slice:  # noqa: D102
        own = slice(0, self.n) if self.cluster is None else self.cluster.share(self.n)
        return own if own.stop > own.start else slice(self.n - 1, self.n)

    @property
    def count(self) -> int:
        """How many of `rows` count here: all, or none."""
        own = slice(0, self.n) if self.cluster is None else self.cluster.share(self.n)
        return own.stop - own.start

    @property
    def shards(self) -> list[slice]:
        """Slices that cover all rows, `rows` among them."""
        own = self.rows
        every = [slice(0, own.start), own, slice(own.stop, self.n)]
        return [piece for piece in every if piece.stop > piece.start]

    def gather(self, values: Tensor) -> Tensor:
        """Values of `rows`, (rows, …) → those of all rows, (n, …), on every rank."""
        if self.cluster is None:
            return values
        return self.cluster.gather_rows(values[: self.count], "values of rows")


class ColumnSink:
    """A matrix (m, n, …) in memory, of which this rank fills the columns of its share."""

    def __init__(self, share: Share, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._share, own = share, share.rows
        self._sink = ArraySink((shape[0], own.stop - own.start, *shape[2:]), dtype)

    def write(self, rows: slice, columns: slice, block: Tensor) -> None:
        """Set the block at these test rows and training columns."""
        start = self._share.rows.start
        self._sink.write(rows, slice(columns.start - start, columns.stop - start), block)

    def finish(self) -> Tensor:
        """All of the matrix, on every rank."""
        values = self._sink.finish()
        if self._share.cluster is None:
            return values
        return self._share.gather(values.transpose(0, 1)).transpose(0, 1).contiguous()


def gather_top(
    share: Share, values: Tensor, places: Tensor, k: int, *, harmful: bool
) -> tuple[Tensor, Tensor]:
    """The k best of all ranks from those of each, (m, k'); of equal ones the earlier column."""
    if share.cluster is None:
        return values, places
    values, places = (share.gather(x.T).T for x in (values, places))
    best: Any = torch.argsort(values, dim=1, descending=not harmful, stable=True)[:, :k]
    return values.gather(1, best), places.gather(1, best)
