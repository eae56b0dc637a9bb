"""Which sets are asked for: samplers.

Unit number t of a sampler depends on the seed and t alone, so that a run can be continued, cut into
rounds of any size and spread over any number of workers, and asks for the same sets.

Letters: n rows, P_k the law of a semivalue (see `laws`), q the law of the sizes that are drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.checks import count
from upweight.valuation.samples import OrderSamples, PairSamples, Samples, SetSamples

__all__ = [
    "Asking",
    "BernoulliSubsets",
    "EverySubset",
    "KernelSubsets",
    "OwenSubsets",
    "Permutations",
    "Sampler",
    "Stratified",
    "WeightedSubsets",
    "needed",
    "sampler_from",
]

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]

BLOCK = 64  # units that one random generator draws
MAX_EVERY = 20


class Asking(Protocol):
    """Who evaluates: the part of `Evaluator` that samplers need."""

    ends: tuple[float, float]

    def masks(self, masks: Masks) -> Floats:
        """(M,) utilities."""
        ...

    def orders(
        self, orders: NDArray[np.int32], length: int, tolerance: float | None
    ) -> tuple[Floats, NDArray[np.int32]]:
        """(P, n + 1) utilities of beginnings, and how many of each were asked for."""
        ...


class Sampler(ABC):
    """A rule for which sets to ask for. All are frozen dataclasses of a few options."""

    name: ClassVar[str]

    @abstractmethod
    def collect(
        self, ask: Asking, law: Floats, seed: int, units: range, tolerance: float | None = None
    ) -> Samples:
        """Draw the units of that number, and have them evaluated; `tolerance` as of orders."""

    @abstractmethod
    def blank(self, law: Floats) -> Samples:
        """Samples of no units."""

    @abstractmethod
    def cost(self, law: Floats) -> int:
        """Evaluations that a unit takes, at most."""

    def check(self, law: Floats) -> None:
        """A ValueError where nothing can be learnt of the law from such samples."""
        if not len(law):
            raise ValueError("expected some rows to sample from; got none")

    def to_dict(self) -> dict[str, Any]:
        """Name and options, for `sampler_from`."""
        options: dict[str, Any] = asdict(self)  # pyright: ignore[reportArgumentType]
        return {"name": self.name, **options}


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
        orders = _blockwise(seed, units, lambda rng: _orders(rng, n))
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


class _Subsets(Sampler):
    """Independent sets, with a law of their size."""

    antithetic: bool

    def collect(
        self, ask: Asking, law: Floats, seed: int, units: range, tolerance: float | None = None
    ) -> SetSamples:
        """See `Sampler`."""
        n = len(law)
        sizes = self.sizes(law)
        masks = _blockwise(seed, units, lambda rng: self.draw(rng, sizes))
        if self.antithetic:
            masks = np.stack([masks, ~masks], axis=1).reshape(-1, n)
        return SetSamples(
            np.packbits(masks, axis=1), n, ask.masks(masks), sizes, ask.ends, 1 + self.antithetic
        )

    def blank(self, law: Floats) -> SetSamples:
        """See `Sampler`."""
        return _no_sets(self.sizes(law), 1 + self.antithetic)

    def cost(self, law: Floats) -> int:
        """A set, and its complement."""
        return 1 + self.antithetic

    def check(self, law: Floats) -> None:
        """Complements must be drawn from the same law."""
        sizes = self.sizes(law)
        if self.antithetic and not np.allclose(sizes, sizes[::-1], atol=1e-9):
            raise ValueError(
                "expected sizes that are as likely as those of the complements, for antithetic "
                f"sets; {self} has other ones: draw them without antithetic=True"
            )

    @abstractmethod
    def sizes(self, law: Floats) -> Floats:
        """(n + 1,) q_s."""

    def draw(self, rng: np.random.Generator, sizes: Floats) -> Masks:
        """(BLOCK, n): sizes by their law, then any rows."""
        n = len(sizes) - 1
        drawn = rng.choice(n + 1, BLOCK, p=sizes)
        return rng.random((BLOCK, n)).argsort(axis=1).argsort(axis=1) < drawn[:, None]


@dataclass(frozen=True)
class BernoulliSubsets(_Subsets):
    """Sets that have each row with probability p, independently.

    Small sets, p = 0.05 to 0.1, find wrong labels far better than half of the rows do: what a row
    adds is large where few others are there.

    Parameters
    ----------
    p
        Default 1/2.
    antithetic
        Follow every set by its complement; for p = 1/2.
    """

    p: float = 0.5
    antithetic: bool = False
    name: ClassVar[str] = "bernoulli"

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ValueError(f"expected p between 0 and 1; got {self.p}")

    def sizes(self, law: Floats) -> Floats:
        """Binomial."""
        from scipy.stats import binom

        return np.asarray(binom.pmf(np.arange(len(law) + 1), len(law), self.p), np.float64)

    def draw(self, rng: np.random.Generator, sizes: Floats) -> Masks:
        """(BLOCK, n)."""
        return rng.random((BLOCK, len(sizes) - 1)) < self.p


@dataclass(frozen=True)
class WeightedSubsets(_Subsets):
    """Sets whose sizes are those that a semivalue looks at: q_s = (P_{s−1} + P_s) / 2.

    For Shapley's value, all sizes alike.

    Parameters
    ----------
    antithetic
        Follow every set by its complement; for laws with P_k = P_{n−1−k}.
    """

    antithetic: bool = False
    name: ClassVar[str] = "weighted"

    def sizes(self, law: Floats) -> Floats:
        """See above."""
        return (np.append(law, 0.0) + np.append(0.0, law)) / 2


@dataclass(frozen=True)
class OwenSubsets(_Subsets):
    """Sets that have each row with probability p, with p from 0 to 1: the multilinear extension.

    Shapley's value is the integral over p of the mean marginal contributions to such sets. Owen,
    Multilinear extensions of games, Management Science 1972; Okhrati & Lipani, A multilinear
    sampling algorithm to estimate Shapley values, ICPR 2020.

    Parameters
    ----------
    levels
        So many values of p, the midpoints of equal parts of [0, 1], taken in turn. Default: p is
        drawn anew for each set, which has no error of discretisation.
    antithetic
        Follow every set by its complement.
    """

    levels: int | None = None
    antithetic: bool = False
    name: ClassVar[str] = "owen"

    def __post_init__(self) -> None:
        if self.levels is not None:
            count(self.levels, "levels", 1, BLOCK)

    def sizes(self, law: Floats) -> Floats:
        """A mixture of binomial laws; uniform where p is."""
        from scipy.stats import binom

        n = len(law)
        if self.levels is None:
            return np.full(n + 1, 1 / (n + 1))
        pmf = binom.pmf(np.arange(n + 1), n, self._grid()[:, None])
        return np.asarray(pmf, np.float64).mean(axis=0)

    def draw(self, rng: np.random.Generator, sizes: Floats) -> Masks:
        """(BLOCK, n)."""
        if self.levels is None:
            p = rng.random(BLOCK)
        else:  # whole turns, in random order, so that a block has each level about equally often
            turns = -(-BLOCK // self.levels)
            p = np.concatenate([rng.permutation(self._grid()) for _ in range(turns)])[:BLOCK]
        return rng.random((BLOCK, len(sizes) - 1)) < p[:, None]

    def _grid(self) -> Floats:
        assert self.levels is not None
        return (np.arange(self.levels) + 0.5) / self.levels


@dataclass(frozen=True)
class KernelSubsets(_Subsets):
    """Sets with sizes by the Shapley kernel, q_s ∝ 1 / (s (n − s)), each with its complement.

    Shapley's value is then the additive function closest to the utility in least squares, among
    those that agree with it on no rows and all rows. Charnes et al., Extremal principle solutions
    of games in characteristic function form, 1988; Lundberg & Lee, NeurIPS 2017; Covert & Lee,
    Improving KernelSHAP, AISTATS 2021.
    """

    antithetic: ClassVar[bool] = True  # pyright: ignore[reportIncompatibleVariableOverride]
    name: ClassVar[str] = "kernel"

    def sizes(self, law: Floats) -> Floats:
        """See above."""
        n = len(law)
        if n < 2:
            raise ValueError("expected at least two rows for the Shapley kernel; got one")
        s = np.arange(1, n)
        inner = 1 / (s * (n - s))
        return np.concatenate([[0.0], inner / inner.sum(), [0.0]])


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


@dataclass(frozen=True)
class EverySubset(Sampler):
    """All 2^n sets, for few rows or groups: values are exact."""

    name: ClassVar[str] = "exact"

    def check(self, law: Floats) -> None:
        """2^n must be possible."""
        if len(law) > MAX_EVERY:
            raise ValueError(
                f"expected at most {MAX_EVERY} rows, or groups of rows, for all subsets; got "
                f"{len(law)}: draw some of them with another sampler"
            )

    def blank(self, law: Floats) -> SetSamples:
        """See `Sampler`."""
        return _no_sets(np.empty(len(law) + 1), 1, exact=True)

    def cost(self, law: Floats) -> int:
        """2^n."""
        return 2 ** len(law)

    def collect(
        self, ask: Asking, law: Floats, seed: int, units: range, tolerance: float | None = None
    ) -> SetSamples:
        """See `Sampler`; there is one unit."""
        n = len(law)
        masks = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.bool_)
        size = np.bincount(masks.sum(axis=1), minlength=n + 1) / 2**n
        found = ask.masks(masks)
        return SetSamples(
            np.packbits(masks, axis=1), n, found, size, ask.ends, len(masks), exact=True
        )


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


def _no_sets(sizes: Floats, per_unit: int, *, exact: bool = False) -> SetSamples:
    n = len(sizes) - 1
    packed = np.empty((0, -(-n // 8)), np.uint8)
    return SetSamples(packed, n, np.empty(0), sizes, (0.0, 0.0), per_unit, exact)


def _blockwise(
    seed: int, units: range, draw: Callable[[np.random.Generator], NDArray[Any]]
) -> NDArray[Any]:
    """Units by number: block b of them comes from the b-th generator spawned from the seed."""
    blocks = range(units.start // BLOCK, -(-units.stop // BLOCK))
    drawn = np.concatenate(
        [
            draw(np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(block,))))
            for block in blocks
        ]
    )
    first = blocks.start * BLOCK
    return drawn[units.start - first : units.stop - first]


def _orders(rng: np.random.Generator, n: int) -> NDArray[np.int32]:
    return rng.permuted(np.tile(np.arange(n, dtype=np.int32), (BLOCK, 1)), axis=1)


def needed(law: Floats) -> int:
    """Beginnings of an order that tell of anything: one more than the last size that counts."""
    return int(np.flatnonzero(law > 0)[-1]) + 1
