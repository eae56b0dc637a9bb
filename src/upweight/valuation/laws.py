"""Semivalues: how much the marginal contribution of a row to a set of k others counts.

A semivalue is v_i = Σ_k P_k · mean over S with |S| = k, i ∉ S of [u(S ∪ i) − u(S)], a weighted mean
of mean marginal contributions, k = 0 … n − 1, with a *law* P_k ≥ 0, Σ_k P_k = 1: the distribution
of the number of rows that are there before row i comes. In the notation with a weight for each
set, w(k) = P_k / C(n − 1, k).

Dubey, Neyman & Weber, Value theory without efficiency, Mathematics of Operations Research 1981.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.valuation.checks import count

__all__ = ["Semivalue", "banzhaf_law", "beta_law", "delta_law", "shapley_law"]

Floats = NDArray[np.float64]


def shapley_law(n: int) -> Floats:
    """(n,) 1/n: every number of rows before counts the same (Shapley 1953).

    Examples
    --------
    >>> shapley_law(4)
    array([0.25, 0.25, 0.25, 0.25])
    """
    return np.full(n, 1 / n)


def banzhaf_law(n: int, p: float = 0.5) -> Floats:
    """(n,) binomial: every other row is there with probability p; Banzhaf's value has p = 1/2.

    Wang & Jia, Data Banzhaf, AISTATS 2023; for other p, Li & Yu, Robust data valuation with
    weighted Banzhaf values, NeurIPS 2023.

    Examples
    --------
    >>> banzhaf_law(3)
    array([0.25, 0.5 , 0.25])
    """
    from scipy.stats import binom

    return np.asarray(binom.pmf(np.arange(n), n - 1, p), np.float64)


def beta_law(n: int, alpha: float = 16.0, beta: float = 1.0) -> Floats:
    """(n,) P_k = C(n−1, k) B(k + β, n − 1 − k + α) / B(α, β): beta-binomial.

    (1, 1) is Shapley's value; the larger α, the more small sets count. Kwon & Zou, Beta Shapley,
    AISTATS 2022, equation (3) with j = k + 1.

    Examples
    --------
    >>> beta_law(3, 1, 1)
    array([0.333, 0.333, 0.333])
    >>> beta_law(3, 16, 1)
    array([0.889, 0.105, 0.007])
    """
    from scipy.stats import betabinom

    return np.asarray(betabinom.pmf(np.arange(n), n - 1, beta, alpha), np.float64)


def delta_law(n: int, lower: int, upper: int) -> Floats:
    """(n,) the same for lower ≤ k ≤ upper rows before, and 0 for others.

    Watson et al., Accelerated Shapley value approximation for data evaluation, 2023.

    Examples
    --------
    >>> delta_law(4, 1, 2)
    array([0. , 0.5, 0.5, 0. ])
    """
    law = np.zeros(n)
    law[lower : upper + 1] = 1 / (upper - lower + 1)
    return law


@dataclass(frozen=True)
class Semivalue:
    """A name for people, and the law.

    Attributes
    ----------
    kind
        ``"shapley"``, ``"banzhaf"``, ``"beta"``, ``"delta"`` or ``"law"``.
    options
        What the law depends on but n: plain numbers, or the law itself.

    Examples
    --------
    >>> Semivalue.of("banzhaf", p=0.1).law(2)
    array([0.9, 0.1])
    """

    kind: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, kind: str, **options: Any) -> Semivalue:
        """With its options, checked but for those that depend on n."""
        if kind == "banzhaf" and not 0 < options["p"] < 1:
            raise ValueError(f"expected p between 0 and 1; got {options['p']}")
        if kind == "beta" and not (options["alpha"] > 0 and options["beta"] > 0):
            raise ValueError(
                f"expected alpha and beta above 0; got {options['alpha']} and {options['beta']}"
            )
        if kind == "law":
            options = {"law": tuple(float(p) for p in _law(options["law"]))}
        return cls(kind, tuple(options.items()))

    def law(self, n: int) -> Floats:
        """(n,) P_k; a ValueError where the options do not fit n rows."""
        given = dict(self.options)
        if self.kind == "law":
            law = np.array(given["law"])
            if len(law) != n:
                raise ValueError(
                    f"expected a law of {n} numbers, one for each size of the set before; got "
                    f"{len(law)}"
                )
            return law
        if self.kind == "delta":
            low = count(given["lower"], "lower", 0, n - 1)
            return delta_law(n, low, count(given["upper"], "upper", low, n - 1))
        return _LAWS[self.kind](n, **given)

    @property
    def p(self) -> float | None:
        """Of Banzhaf's; None of others."""
        return dict(self.options)["p"] if self.kind == "banzhaf" else None

    def __str__(self) -> str:
        told = [f"{k}={v:g}" for k, v in self.options if isinstance(v, (int, float))]
        return f"{self.kind}({', '.join(told)})" if told else self.kind


_LAWS: dict[str, Callable[..., Floats]] = {
    "shapley": shapley_law,
    "banzhaf": banzhaf_law,
    "beta": beta_law,
}


def _law(given: ArrayLike) -> Floats:
    law = np.asarray(given, np.float64)
    if law.ndim != 1 or not len(law) or not (law >= 0).all():
        raise ValueError(
            f"expected a law as numbers ≥ 0 of shape (n,), one for each size of the set before; "
            f"got shape {law.shape}"
        )
    if not math.isclose(law.sum(), 1.0, rel_tol=1e-6):
        raise ValueError(f"expected a law with sum 1; got {law.sum():g}")
    return law / law.sum()
