"""Games whose values are known, and values in the slowest and plainest way: over all subsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.valuation.cache import UtilityCache
from upweight.valuation.utility import Evaluated, Utility, row_names

Floats = NDArray[np.float64]


class TableUtility(Utility):
    """Utilities of all 2^n sets in one array; row i is bit i of the position. NaN: it fails."""

    prefer = "threads"

    def __init__(
        self, table: ArrayLike, *, cache: UtilityCache | None = None, fingerprint: str | None = None
    ) -> None:
        self.table = np.asarray(table, np.float64)
        self.n = len(self.table).bit_length() - 1
        self.names = row_names(None, self.n)
        self.cache = UtilityCache() if cache is None else cache
        self.asked = 0
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> str | None:
        return self._fingerprint

    def evaluate(self, masks: NDArray[np.bool_]) -> Evaluated:
        self.asked += len(masks)
        values = self.table[positions(masks)]
        return Evaluated(values, {int(at): "no luck" for at in np.flatnonzero(np.isnan(values))})


class ChainedTable(TableUtility):
    """The same, order by order."""

    chained = 0

    def chains(self, orders: NDArray[np.intp]) -> Floats:
        self.chained += len(orders)
        bits = 1 << np.asarray(orders, np.int64)
        whole = np.cumsum(
            np.concatenate([np.zeros((len(bits), 1), np.int64), bits], axis=1), axis=1
        )
        return self.table[whole]


class Looked:
    """Evaluates for samplers by nothing but a look at the table: no cache, no workers."""

    def __init__(self, table: Floats) -> None:
        self.table, self.n = table, len(table).bit_length() - 1
        self.ends = float(table[0]), float(table[-1])

    def masks(self, masks: NDArray[np.bool_]) -> Floats:
        return self.table[positions(masks)]

    def orders(
        self, orders: NDArray[np.int32], length: int, tolerance: float | None
    ) -> tuple[Floats, NDArray[np.int32]]:
        assert tolerance is None
        utilities = ChainedTable(self.table).chains(orders.astype(np.intp))
        utilities[:, length + 1 :] = np.nan
        return utilities, np.full(len(orders), length, np.int32)


def positions(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of sets in a table."""
    return masks @ (1 << np.arange(masks.shape[1], dtype=np.int64))


def table_of(n: int, utility: Callable[[list[int]], float]) -> Floats:
    """(2^n,) utilities of all sets, given as a function of their rows."""
    return np.array([utility([i for i in range(n) if s >> i & 1]) for s in range(2**n)], np.float64)


def enumerated(table: ArrayLike, law: ArrayLike) -> Floats:
    """(n,) Σ_k P_k · mean over |S| = k, i ∉ S of u(S ∪ i) − u(S): one set after another."""
    table, law = np.asarray(table, np.float64), np.asarray(law, np.float64)
    n = len(law)
    values = np.zeros(n)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for k in range(n):
            for chosen in combinations(others, k):
                s = sum(1 << j for j in chosen)
                values[i] += law[k] / comb(n - 1, k) * (table[s | 1 << i] - table[s])
    return values


@dataclass(frozen=True)
class Game:
    """A table, and what is known of its values without it."""

    table: Floats
    shapley: Floats
    known: dict[str, Any] = field(default_factory=dict)


def additive(worth: ArrayLike) -> Game:
    """Every row has its worth, whoever is there: all semivalues are that."""
    worth = np.asarray(worth, np.float64)
    table = table_of(len(worth), lambda rows: float(worth[rows].sum()))
    return Game(table, worth, {"banzhaf": worth})


def symmetric(of_size: ArrayLike) -> Game:
    """Only the number of rows matters."""
    f = np.asarray(of_size, np.float64)
    n = len(f) - 1
    banzhaf = sum(comb(n - 1, k) * (f[k + 1] - f[k]) for k in range(n)) / 2 ** (n - 1)
    return Game(
        table_of(n, lambda rows: float(f[len(rows)])),
        np.full(n, (f[n] - f[0]) / n),
        {"banzhaf": np.full(n, banzhaf)},
    )


def unanimity(n: int, needed: list[int]) -> Game:
    """1 if all of some rows are there, else 0."""
    share, half = np.zeros(n), np.zeros(n)
    share[needed], half[needed] = 1 / len(needed), 0.5 ** (len(needed) - 1)
    table = table_of(n, lambda rows: float(set(needed) <= set(rows)))
    return Game(table, share, {"banzhaf": half})


def airport(costs: ArrayLike) -> Game:
    """The runway that the largest aircraft needs (Littlechild & Owen 1973); costs ascend.

    Aircraft j and larger ones share what it needs beyond the next smaller one.
    """
    costs = np.asarray(costs, np.float64)
    n = len(costs)
    steps = np.diff(costs, prepend=0.0) / (n - np.arange(n))
    table = table_of(n, lambda rows: float(max(costs[rows], default=0.0)))
    return Game(table, np.cumsum(steps))


def gloves(right: int) -> Game:
    """One left glove, some right ones; only a pair is worth something."""
    n = right + 1
    table = table_of(n, lambda rows: float(0 in rows and len(rows) > 1))
    values = np.full(n, 1 / (right * n))
    values[0] = right / n
    banzhaf = np.full(n, 0.5**right)
    banzhaf[0] = 1 - 0.5**right
    return Game(table, values, {"banzhaf": banzhaf})


def voting(weights: ArrayLike, quota: float, shapley: ArrayLike, banzhaf: ArrayLike) -> Game:
    """1 if the votes reach the quota, else 0."""
    weights = np.asarray(weights, np.float64)
    table = table_of(len(weights), lambda rows: float(weights[rows].sum() >= quota))
    return Game(
        table, np.asarray(shapley, np.float64), {"banzhaf": np.asarray(banzhaf, np.float64)}
    )


# The council of ministers of the six in 1958: Luxembourg's vote never mattered.
COUNCIL = voting(
    [4, 4, 4, 2, 2, 1],
    12,
    np.array([14, 14, 14, 9, 9, 0]) / 60,
    np.array([10, 10, 10, 6, 6, 0]) / 32,
)
GAMES: dict[str, Game] = {
    "additive": additive([3.0, -1.0, 0.0, 0.5, 2.0]),
    "symmetric": symmetric(np.sqrt(np.arange(8))),
    "unanimity": unanimity(6, [0, 2, 5]),
    "airport": airport([1.0, 1.0, 2.0, 3.5, 5.0, 5.0, 7.0, 9.0]),
    "gloves": gloves(6),
    "council": COUNCIL,
}


def rough(n: int, seed: int = 0, noise: float = 0.3) -> Floats:
    """A utility as models have it: it saturates in the sum of worths, with noise of each set."""
    rng = np.random.default_rng(seed)
    worth = rng.exponential(size=n) - 0.3
    table = table_of(n, lambda rows: float(np.tanh(worth[rows].sum() / np.sqrt(n))))
    return table + noise / n * rng.standard_normal(2**n)
