"""What a run has asked and what came, sets or orders with their utilities; what follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "OrderSamples", "PairSamples", "Samples", "SetSamples"]

Floats: TypeAlias = NDArray[np.float64]

CHUNK = 2**22  # numbers of masks at once


@dataclass(frozen=True, eq=False)
class OrderSamples:
    """P orders of n rows with the utilities of their beginnings.

    Attributes
    ----------
    orders
        (P, n) positions of rows, in the order in which they join.
    utilities
        (P, n + 1) of the first 0, 1, …, n; NaN where a set failed, or was not asked for.
    lengths
        (P,) how many of them were asked for: beyond, rows are taken to add nothing.
    per_unit
        Orders that were drawn together, and are not independent: 1, or 2 of antithetic ones.
    """

    orders: NDArray[np.int32]
    utilities: Floats
    lengths: NDArray[np.int32]
    per_unit: int = 1

    @property
    def n(self) -> int:
        """Rows."""
        return self.orders.shape[1]

    @property
    def units(self) -> int:
        """Independent draws."""
        return len(self.orders) // self.per_unit

    @property
    def evaluations(self) -> int:
        """Sets that were asked for; those of no rows and of all rows are known."""
        return int(np.minimum(self.lengths, self.n - 1).sum())

    def joined(self, other: OrderSamples) -> OrderSamples:
        """These, and others behind them."""
        return OrderSamples(
            np.concatenate([self.orders, other.orders]),
            np.concatenate([self.utilities, other.utilities]),
            np.concatenate([self.lengths, other.lengths]),
            self.per_unit,
        )

    def chosen(self, units: NDArray[np.intp]) -> OrderSamples:
        """Some of the draws."""
        at = _members(units, self.per_unit)
        return OrderSamples(self.orders[at], self.utilities[at], self.lengths[at], self.per_unit)


@dataclass(frozen=True, eq=False)
class SetSamples:
    """M sets with their utilities. Given its size, every set is as likely as any other.

    Attributes
    ----------
    packed
        (M, ⌈n/8⌉) the sets as bits, by `numpy.packbits`.
    n
        Rows.
    utilities
        (M,) NaN where a set failed.
    sizes
        (n + 1,) q_s: the probability that a set which was drawn has s rows.
    ends
        Utilities of no rows and of all rows.
    per_unit
        Sets that were drawn together: 1, or 2 of complements.
    exact
        All sets there are, each once.
    """

    packed: NDArray[np.uint8]
    n: int
    utilities: Floats
    sizes: Floats
    ends: tuple[float, float]
    per_unit: int = 1
    exact: bool = False

    @property
    def units(self) -> int:
        """Independent draws."""
        return len(self.packed) // self.per_unit

    @property
    def evaluations(self) -> int:
        """Sets that were asked for."""
        return len(self.packed)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(M, n)."""
        return np.unpackbits(self.packed, axis=1, count=self.n).view(np.bool_)

    def chunks(self) -> Iterator[tuple[slice, Floats]]:
        """The masks as numbers (b, n), whole draws of about 32 MB at a time."""
        step = max(1, CHUNK // (self.n * self.per_unit)) * self.per_unit
        for at in range(0, len(self.packed), step):
            some = slice(at, min(at + step, len(self.packed)))
            bits = np.unpackbits(self.packed[some], axis=1, count=self.n)
            yield some, bits.astype(np.float64)

    def joined(self, other: SetSamples) -> SetSamples:
        """These, and others behind them."""
        return replace(
            self,
            packed=np.concatenate([self.packed, other.packed]),
            utilities=np.concatenate([self.utilities, other.utilities]),
        )

    def chosen(self, units: NDArray[np.intp]) -> SetSamples:
        """Some of the draws."""
        at = _members(units, self.per_unit)
        return replace(self, packed=self.packed[at], utilities=self.utilities[at])


@dataclass(frozen=True, eq=False)
class PairSamples:
    """T marginal contributions, each of one row to one set; n of them are a draw, one a row.

    Attributes
    ----------
    marginals
        (T, n) u(S ∪ i) − u(S) of row i in draw t; NaN where one of both failed.
    before
        (T, n) |S|.
    sizes
        (n,) q_k: how often a set of k rows is drawn, in the long run.
    """

    marginals: Floats
    before: NDArray[np.int32]
    sizes: Floats

    @property
    def n(self) -> int:
        """Rows."""
        return self.marginals.shape[1]

    @property
    def units(self) -> int:
        """Independent draws."""
        return len(self.marginals)

    @property
    def evaluations(self) -> int:
        """Sets that were asked for."""
        return 2 * self.marginals.size

    def joined(self, other: PairSamples) -> PairSamples:
        """These, and others behind them."""
        return PairSamples(
            np.concatenate([self.marginals, other.marginals]),
            np.concatenate([self.before, other.before]),
            self.sizes,
        )

    def chosen(self, units: NDArray[np.intp]) -> PairSamples:
        """Some of the draws."""
        return PairSamples(self.marginals[units], self.before[units], self.sizes)


@dataclass(frozen=True, eq=False)
class Estimate:
    """Values of n rows.

    Attributes
    ----------
    values
        (n,) NaN for a row of which nothing was seen.
    errors
        (n,) their standard errors; 0 where exact, NaN where unknown.
    counts
        (n,) draws that tell of the row.
    """

    values: Floats
    errors: Floats
    counts: NDArray[np.int64]


Samples: TypeAlias = OrderSamples | SetSamples | PairSamples


def _members(units: NDArray[np.intp], per_unit: int) -> NDArray[np.intp]:
    return (units[:, None] * per_unit + np.arange(per_unit)).ravel()
