"""The nearest players of each query, in exact order, a batch of queries at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.checks import count
from upweight.valuation.grid import Grid, make_grid
from upweight.valuation.order import nearest_places
from upweight.valuation.parallel import in_order

__all__ = ["BLOCK", "Batch", "Plan", "make_plan", "map_batches"]

T = TypeVar("T")

BLOCK = 50_000
CACHED, BATCH_BYTES = 2**23, 2**26  # of one (b, n) float64 array; a thread has some four of them
GOLDEN = 0.6180339887498949


@dataclass(frozen=True, eq=False)
class Plan:
    """Who is judged by whom.

    Attributes
    ----------
    blocks
        Positions of the players of each block, in random order.
    queries
        How many rows are asked about.
    itself
        Whether the players of a block are its queries, too, each without itself.
    """

    blocks: list[NDArray[np.intp]]
    queries: int
    itself: bool

    @property
    def players(self) -> int:
        """The fewest players that any query has."""
        return min(map(len, self.blocks)) - self.itself

    @property
    def parts(self) -> NDArray[np.int32]:
        """(queries,) the number of the block that a query is asked of."""
        parts = np.zeros(self.queries, np.int32)
        if self.itself:
            for number, members in enumerate(self.blocks):
                parts[members] = number
        return parts


@dataclass(frozen=True, eq=False)
class Batch:
    """Some queries and their nearest players.

    Attributes
    ----------
    rows
        (b,) positions of the queries.
    members
        (n,) positions of the players of this block, in random order.
    nearest
        (b, L) nearest first: ``members[nearest]`` are their positions. Equally near ones come as
        they follow upon the query, or upon some place where it is no member, in `members`.
    players
        How many players there are, without the query itself.
    own
        (b,) where in `members` the queries themselves are, if they are among them.
    squares
        A function of `keep`: the squares of `distances`.
    """

    rows: NDArray[np.intp]
    members: NDArray[np.intp]
    nearest: NDArray[np.int64]
    players: int
    own: NDArray[np.intp] | None
    squares: Callable[[int], NDArray[np.float64]]

    def distances(self, keep: int) -> NDArray[np.float32]:
        """(b, keep) Euclidean distances of the nearest."""
        with np.errstate(over="ignore"):
            return np.sqrt(self.squares(keep)).astype(np.float32)


def make_plan(rows: int, queries: int | None, block: int | None, seed: int) -> Plan:
    """All players for every query; or, where rows judge each other, random blocks of them.

    The positions 0, …, n − 1 are shuffled by `seed` and cut into ⌈n / block⌉ nearly equal parts.
    Tables are often sorted by label, so that ties must not be broken in the order of the table.
    """
    size = BLOCK if block is None else count(block, "block", 2)
    shuffled = np.random.default_rng(seed).permutation(rows)
    if queries is not None:
        return Plan([shuffled], queries, False)
    return Plan(np.array_split(shuffled, -(-rows // size)), rows, True)


def map_batches(
    work: Callable[[Batch], T],
    plan: Plan,
    x: NDArray[Any],
    x_query: NDArray[Any] | None,
    *,
    nearest: int | None,
    n_jobs: int,
    batch_size: int | None,
) -> Iterator[T]:
    """``work(batch)`` for every batch of queries, in their order; `nearest` None: all players."""

    def calls() -> Iterator[Callable[[], T]]:
        for members in plan.blocks:
            players = x[members]
            grid = make_grid(players, x_query)
            rows = members if plan.itself else np.arange(plan.queries)
            queries = players if x_query is None else x_query
            size = batch_size or _batch_size(len(members))
            part = _Part(plan, grid, members, players, rows, queries, nearest)
            for start in range(0, len(rows), size):
                yield lambda part=part, at=start, size=size: work(part.batch(at, at + size))

    return in_order(calls(), n_jobs)


def _batch_size(players: int) -> int:
    # As long as an array fits the cache; but a product with few rows mostly waits for memory.
    size = max(64, min(1024, CACHED // (8 * players)))
    return min(size, max(16, BATCH_BYTES // (8 * players)))


@dataclass(frozen=True, eq=False)
class _Part:
    plan: Plan
    grid: Grid
    members: NDArray[np.intp]
    table: NDArray[Any]
    rows: NDArray[np.intp]
    queries: NDArray[Any]
    nearest: int | None

    def batch(self, start: int, stop: int) -> Batch:
        grid, itself = self.grid, self.plan.itself
        squares = grid.queries[start:stop] @ grid.players  # (b, d + 2) @ (d + 2, n)
        b, n = squares.shape
        for far in np.flatnonzero(grid.far_queries[start : start + b]):
            squares[far] = _ranks(self.table, self.queries[start + far])
        players, first = n - itself, np.arange(start, start + b)
        own = first if itself else None
        if itself:
            squares[np.arange(b), own] = 2.0**grid.bits - 1  # farther than any other
        else:
            first = (first * GOLDEN % 1 * n).astype(np.intp)
        wanted = min(self.nearest or players, players)
        whole, nearest = nearest_places(squares, wanted, grid.shift, first)

        def exact(keep: int) -> NDArray[np.float64]:
            found: Any = whole[:, :keep] * grid.step**2
            far = grid.far_queries[start : start + b, None] | grid.far_players[nearest[:, :keep]]
            if far.any():
                query, place = np.nonzero(far)
                apart = np.subtract(
                    self.queries[start + query],
                    self.table[nearest[query, place]],
                    dtype=np.float64,
                )
                found[query, place] = np.einsum("ij,ij->i", apart, apart)
            return found

        return Batch(self.rows[start : start + b], self.members, nearest, players, own, exact)


def _ranks(table: NDArray[Any], query: NDArray[Any]) -> NDArray[np.intp]:
    """(n,) 0 for the players nearest to one query, 1 for the next, …; by plain differences."""
    apart = np.subtract(table, query, dtype=np.float64)
    return np.unique(np.einsum("ij,ij->i", apart, apart), return_inverse=True)[1]
