"""Values and their standard errors from samples, for any law of a semivalue: linear algebra.

Letters: n rows, M sets, u_m utilities, Z (M, n) the sets as 0 and 1, P_k the law, q_s the law of
the sizes that were drawn.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.laws import Semivalue
from upweight.valuation.regressions import constrained_regression, subset_regression
from upweight.valuation.reuse import is_matched, reused
from upweight.valuation.samples import (
    Estimate,
    OrderSamples,
    PairSamples,
    Samples,
    SetSamples,
)

__all__ = ["FailedSubsets", "Readout", "choose_readout", "moderated", "read_out"]

Readout = Literal["marginal", "msr", "regression", "exact"]
Floats: TypeAlias = NDArray[np.float64]

MANY_ROWS = 3_000  # beyond, a regression on them is too dear


class FailedSubsets(ValueError):
    """Not all subsets have a utility, so that values are not exact."""


def choose_readout(samples: Samples, semivalue: Semivalue, asked: str) -> Readout:
    """The read-out by name; ``"auto"``: the one with the least variance that is there."""
    if asked not in ("auto", "marginal", "msr", "regression"):
        raise ValueError(
            f"expected readout 'auto', 'marginal', 'msr' or 'regression'; got {asked!r}"
        )
    if not isinstance(samples, SetSamples):
        if asked not in ("auto", "marginal"):
            raise ValueError(
                f"expected independent sets for the read-out {asked!r}; these are marginal "
                "contributions: use readout='marginal', or another sampler"
            )
        return "marginal"
    if samples.exact:
        return "exact"
    if asked == "marginal":
        raise ValueError(
            "expected marginal contributions, from permutations or strata, for "
            "readout='marginal'; these are independent sets"
        )
    fits = _regression_fits(samples, semivalue)
    if asked == "regression" and not fits:
        raise ValueError(
            f"expected sets that have each row with probability p for a regression for Banzhaf's "
            f"value with that p, or sets by the Shapley kernel for Shapley's; got {semivalue} from "
            "other sets: use readout='msr'"
        )
    if asked == "auto":
        return "regression" if fits and samples.n <= MANY_ROWS else "msr"
    return "msr" if asked == "msr" else "regression"


def read_out(
    samples: Samples, semivalue: Semivalue, readout: Readout, *, errors: bool = True
) -> Estimate:
    """Values and standard errors; these are left out where they are dear and nobody asks.

    Raises
    ------
    ValueError
        If the samples hardly tell of what the value looks at.
    """
    law = semivalue.law(samples.n)
    if isinstance(samples, OrderSamples):
        return _from_orders(samples, law)
    if isinstance(samples, PairSamples):
        return _from_pairs(samples, law)
    if readout == "exact":
        return _from_all(samples, law)
    if readout == "regression":
        if semivalue.p is not None:
            return Estimate(*subset_regression(samples, errors=errors))
        return Estimate(*constrained_regression(samples))
    return reused(samples, law, semivalue)


def _from_orders(samples: OrderSamples, law: Floats) -> Estimate:
    """v_i = mean over orders of n P_k Δ, k rows before i, Δ = u(with i) − u(without).

    Every number k before is equally likely; so each contribution counts n P_k.
    """
    orders, n = samples.orders.astype(np.intp), samples.n
    weights = n * law
    marginals = np.diff(samples.utilities, axis=1)
    marginals[np.arange(n) >= samples.lengths[:, None]] = 0.0  # add nothing, or count nothing
    terms = np.empty_like(marginals)
    np.put_along_axis(terms, orders, marginals * weights, axis=1)
    return _of_terms(terms.reshape(samples.units, samples.per_unit, n))


def _from_pairs(samples: PairSamples, law: Floats) -> Estimate:
    """v_i = mean over draws of P_k / q_k Δ.

    Sizes go round evenly, so that most of what they make of Δ is no error. The variance is that of
    second differences of neighbours by size, d = x − 2 y + z: a sixth of their mean square; and of
    the plain variance min(n, T) / (3 T), because each of n sizes occurs once too often, or not.
    """
    unseen = float(law[samples.sizes == 0].sum())
    if unseen > 1e-12:
        raise ValueError(
            f"expected sets of all sizes that the value looks at; {unseen:.2g} of it is about "
            "sizes that were never drawn: sample for this value"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(samples.sizes > 0, law / samples.sizes, 0.0)
    terms = samples.marginals * weights[samples.before]
    found = _of_terms(terms[:, None])
    last = np.where(np.isnan(terms), samples.n, samples.before)
    terms = np.take_along_axis(terms, last.argsort(axis=0, kind="stable"), axis=0)
    apart = (terms[:-2] - 2 * terms[1:-1] + terms[2:]) ** 2
    there = (~np.isnan(apart)).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.nansum(apart, axis=0) / there / 6 / found.counts
        rest = np.minimum(samples.n, found.counts) / (3 * found.counts)
        variances = errors + rest * found.errors**2
    return Estimate(found.values, np.sqrt(moderated(variances, found.counts)), found.counts)


def moderated(variances: Floats, counts: NDArray[np.int64]) -> Floats:
    """Variances of means, with the mean variance of a draw over all rows as one draw more.

    A row whose draws happen to be alike is not known for sure. One prior degree of freedom in
    Smyth, Linear models and empirical Bayes methods for assessing differential expression, 2004.
    """
    draw = variances * counts
    known = ~np.isnan(draw)
    typical = float(draw[known].mean()) if known.any() else np.nan
    return ((counts - 1) * draw + typical) / np.maximum(counts, 1) ** 2


def _of_terms(terms: Floats) -> Estimate:
    """Means over units, of the means of (units, members, n); failed ones left out."""
    there = ~np.isnan(terms)
    members = there.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(there, terms, 0.0).sum(axis=1) / members  # (units, n)
        known = members > 0
        counts = known.sum(axis=0)
        values = np.where(known, means, 0.0).sum(axis=0) / counts
        apart = np.where(known, means - values, 0.0)
        variances = (apart**2).sum(axis=0) / (counts - 1) / counts
    variances[counts < 2] = np.nan
    errors = np.sqrt(moderated(variances, counts))
    return Estimate(values, errors, counts * terms.shape[1])


def _from_all(samples: SetSamples, law: Floats) -> Estimate:
    """v_i = Σ over all S of w_in(|S|) u(S) where i is in S, − w_out(|S|) u(S) where it is not.

    With w_in(s) = P_{s−1} / C(n−1, s−1) and w_out(s) = P_s / C(n−1, s).
    """
    failed = int(np.isnan(samples.utilities).sum())
    if failed:
        raise FailedSubsets(
            f"expected utilities of all subsets for exact values; {failed} of "
            f"{len(samples.utilities)} failed: give small sets a utility (ModelUtility has "
            "min_rows for that), or draw sets with another sampler"
        )
    from scipy.special import comb

    n, masks = samples.n, samples.masks
    choose = comb(n - 1, np.arange(n))
    inside = np.append(0.0, law / choose)  # by size s = 0 … n
    outside = np.append(law / choose, 0.0)
    size = masks.sum(axis=1)
    # u less the utility of nothing: the same values, and sums of smaller numbers
    u = samples.utilities - samples.ends[0]
    values = masks.T @ ((inside + outside)[size] * u) - (outside[size] * u).sum()
    counts = np.full(n, len(masks), np.int64)
    return Estimate(values, np.zeros(n), counts)


def _regression_fits(samples: SetSamples, semivalue: Semivalue) -> bool:
    if semivalue.kind == "shapley" and samples.n > 1:
        s = np.arange(1, samples.n)
        inner = 1 / (s * (samples.n - s))
        wanted = np.concatenate([[0.0], inner / inner.sum(), [0.0]])
        return bool(np.allclose(samples.sizes, wanted, atol=1e-12))
    return is_matched(samples, semivalue)
