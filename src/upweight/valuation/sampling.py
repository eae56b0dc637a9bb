"""Samplers of marginal contributions: orders, and strata of sizes; and any sampler by its name.

Letters: n rows, P_k the law of a semivalue (see `laws`), q the law of the sizes that are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.checks import count
from upweight.valuation.drawing import BLOCK, Asking, Floats, Sampler, blockwise
from upweight.valuation.samples import OrderSamples, PairSamples
from upweight.valuation.subsets import (
    BernoulliSubsets,
    EverySubset,
    KernelSubsets,
    OwenSubsets,
    WeightedSubsets,
)

__all__ = ["Permutations", "Stratified", "needed", "sampler_from"]


@dataclass(frozen=True)
class Permutations(Sampler):
    """Random orders in which the rows join one by one.

    Every order gives each row one marginal contribution, and the contributions of all rows sum up
    to u(all) − u(none). Castro, Gómez & Tejada, Polynomial calculation of the Shapley value based
    on sampling, Computers & Operations Research 2009.

    Parameters
    ----------
    antithetic
        Follow every order by its reverse. A row that came early comes late then, which lowers the
        variance where contributions fall with the number of rows before. Mitchell et al., Sampling
        permutations for Shapley value estimation, JMLR 2022.
    """

    antithetic: bool = False
    name: ClassVar[str] = "permutations"

    def collect(
        self, ask: Asking, law: Floats, seed: int, units: range, tolerance: float | None = None
    ) -> OrderSamples:
        """See `Sampler`."""
        n = len(law)
        orders = blockwise(seed, units, lambda rng: _orders(rng, n))
        if self.antithetic:
            orders = np.stack([orders, orders[:, ::-1]], axis=1).reshape(-1, n)
        utilities, lengths = ask.orders(orders, needed(law), tolerance)
        return OrderSamples(orders, utilities, lengths, 1 + self.antithetic)

    def blank(self, law: Floats) -> OrderSamples:
        """See `Sampler`."""
        n = len(law)
        nothing = np.empty((0, n), np.int32), np.empty((0, n + 1)), np.empty(0, np.int32)
        return OrderSamples(*nothing, 1 + self.antithetic)

    def cost(self, law: Floats) -> int:
        """Of beginnings that are neither empty nor everything, which are known."""
        return max(1, min(needed(law), len(law) - 1)) * (1 + self.antithetic)


@dataclass(frozen=True)
class Stratified(Sampler):
    """Marginal contributions one by one: of every row, to a random set of every size in turn.

    Takes two evaluations for a contribution, where permutations take one, and has a say in the
    sizes: those between `lower` and `upper`, k + 1 rows and those before with a frequency ∝
    (k + 1)^−decay. Small sets vary more: Wu et al., Variance reduced Shapley value estimation for
    trustworthy data valuation, Computers & Operations Research 2023; few rows tell most: Watson et
    al., Accelerated Shapley value approximation for data evaluation, 2023.

    Parameters
    ----------
    lower, upper
        Sizes of the sets before; default: all from 0 to n − 1.
    decay
        0 for all sizes alike.
    """

    lower: int = 0
    upper: int | None = None
    decay: float = 0.0
    name: ClassVar[str] = "stratified"

    def sizes(self, n: int) -> Floats:
        """(n,) q_k."""
        upper = n - 1 if self.upper is None else count(self.upper, "upper", 0, n - 1)
        lower = count(self.lower, "lower", 0, upper)
        weights = (1.0 + np.arange(n)) ** -self.decay
        weights[:lower] = weights[upper + 1 :] = 0
        return weights / weights.sum()

    def check(self, law: Floats) -> None:
        """All sizes that count must be drawn."""
        missing = np.flatnonzero((law > 1e-12) & (self.sizes(len(law)) == 0))
        if len(missing):
            raise ValueError(
                f"expected all sizes that the value looks at among those that are drawn; {self} "
                f"leaves out sets of {missing[0]} rows"
            )

    def blank(self, law: Floats) -> PairSamples:
        """See `Sampler`."""
        n = len(law)
        return PairSamples(np.empty((0, n)), np.empty((0, n), np.int32), self.sizes(n))

    def cost(self, law: Floats) -> int:
        """Two sets for every row."""
        return 2 * len(law)

    def collect(
        self, ask: Asking, law: Floats, seed: int, units: range, tolerance: float | None = None
    ) -> PairSamples:
        """See `Sampler`."""
        n = len(law)
        sizes = self.sizes(n)
        # The sizes of a row go round from a random beginning, evenly at every moment.
        begin = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2**31,))).random(n)
        turn = (begin + np.array(units)[:, None] * GOLDEN) % 1
        inner = np.cumsum(sizes)[:-1]
        before = np.searchsorted(inner, turn, side="right").astype(np.int32)
        marginals = np.empty((len(units), n))
        for at, unit in enumerate(units):
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(unit,)))
            keys = rng.random((n, n))
            np.fill_diagonal(keys, 2.0)  # the row itself comes last
            without = keys.argsort(axis=1).argsort(axis=1) < before[at][:, None]
            together = without.copy()
            np.fill_diagonal(together, True)
            found = ask.masks(np.concatenate([without, together]))
            marginals[at] = found[n:] - found[:n]
        return PairSamples(marginals, before, sizes)


GOLDEN = 0.6180339887498949
_KINDS: dict[str, Callable[..., Sampler]] = {
    kind.name: kind
    for kind in (
        Permutations,
        BernoulliSubsets,
        WeightedSubsets,
        OwenSubsets,
        KernelSubsets,
        Stratified,
        EverySubset,
    )
}


def sampler_from(told: dict[str, Any]) -> Sampler:
    """The sampler that `Sampler.to_dict` told of."""
    options = dict(told)
    return _KINDS[options.pop("name")](**options)


def _orders(rng: np.random.Generator, n: int) -> NDArray[np.int32]:
    return rng.permuted(np.tile(np.arange(n, dtype=np.int32), (BLOCK, 1)), axis=1)


def needed(law: Floats) -> int:
    """Beginnings of an order that tell of anything: one more than the last size that counts."""
    return int(np.flatnonzero(law > 0)[-1]) + 1
