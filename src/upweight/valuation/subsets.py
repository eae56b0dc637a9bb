"""Samplers of sets, each of which tells of every row; and all subsets.

Letters: n rows, P_k the law of a semivalue (see `laws`), q the law of the sizes that are drawn.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from upweight.valuation.checks import count
from upweight.valuation.drawing import BLOCK, Asking, Floats, Masks, Sampler, blockwise
from upweight.valuation.samples import SetSamples

__all__ = [
    "BernoulliSubsets",
    "EverySubset",
    "KernelSubsets",
    "OwenSubsets",
    "WeightedSubsets",
]

MAX_EVERY = 20


class _Subsets(Sampler):
    """Independent sets, with a law of their size."""

    antithetic: bool

    def collect(
        self, ask: Asking, law: Floats, seed: int, units: range, tolerance: float | None = None
    ) -> SetSamples:
        """See `Sampler`."""
        n = len(law)
        sizes = self.sizes(law)
        masks = blockwise(seed, units, lambda rng: self.draw(rng, sizes))
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


def _no_sets(sizes: Floats, per_unit: int, *, exact: bool = False) -> SetSamples:
    n = len(sizes) - 1
    packed = np.empty((0, -(-n // 8)), np.uint8)
    return SetSamples(packed, n, np.empty(0), sizes, (0.0, 0.0), per_unit, exact)
