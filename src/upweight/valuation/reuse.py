"""Maximum sample re-use: every set tells of every row, by the rows that it has and has not.

Letters: n rows, M sets, u_m utilities, P_k the law, q_s the law of the sizes that were drawn.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.laws import Semivalue
from upweight.valuation.samples import Estimate, SetSamples

__all__ = ["check_seen", "is_matched", "reused"]

Floats: TypeAlias = NDArray[np.float64]

UNSEEN = 0.05  # of what a value looks at may be in sets of a size that was hardly ever drawn
ROWS = 2**12  # sets at once


def reused(samples: SetSamples, law: Floats, semivalue: Semivalue) -> Estimate:
    """Every set tells of every row: weighted mean over the sets with it minus that without it.

    v_i = Σ_{m: i ∈ S_m} r_in u_m / Σ_{m: i ∈ S_m} r_in − Σ_{m: i ∉ S_m} r_out u_m / Σ … r_out

    with r_in(s) = P_{s−1} n / (s q_s), r_out(s) = P_s n / ((n − s) q_s): constant for Banzhaf's
    value and sets with each row with probability p. For other values, u less its mean over sets of
    about that size is taken, and the difference that the sizes make is added as a whole. Sizes that
    are never drawn count with a difference of 0: the Shapley kernel leaves out none and all rows.
    """
    good = ~np.isnan(samples.utilities)
    check_seen(samples.sizes, law, int(good.sum()))
    masks, u = samples.masks, np.where(good, samples.utilities, 0.0)
    size = masks.sum(axis=1)
    r_in, r_out = _ratios(samples.sizes, law)
    share = 0.0
    if is_matched(samples, semivalue):
        u = u - (u[good].mean() if good.any() else 0.0)
    else:
        by_size = _mean_by_size(size[good], u[good], samples.ends, samples.n)
        scale = _unshrunk(size, good, samples.n)
        u = np.where(good, (u - by_size[size]) * scale, 0.0)
        share = float(law @ np.diff(by_size))
    drawn = samples.sizes > 0
    inside = _Side(np.where(good, r_in[size], 0.0), u, float(law[drawn[1:]].sum()))
    outside = _Side(np.where(good, r_out[size], 0.0), u, float(law[drawn[:-1]].sum()))
    inside.sums = _transposed(masks, inside.powers)
    outside.sums = outside.powers.sum(axis=0) - _transposed(masks, outside.powers)
    values = inside.mean - outside.mean + share
    if samples.per_unit == 1:
        errors = np.sqrt(inside.variance + outside.variance)
    else:
        errors = _errors_by_unit(samples, masks, inside, outside)
    if semivalue.kind == "shapley":  # what all rows together are worth is known
        known = ~np.isnan(values)
        gap = samples.ends[1] - samples.ends[0] - values[known].sum()
        values = values + gap / max(1, known.sum())
    seen = _transposed(masks, good[:, None].astype(np.float64))[:, 0]
    counts = np.minimum(seen, good.sum() - seen).astype(np.int64)
    return Estimate(values, errors, counts)


class _Side:
    """The sets with a row, or those without: weights (M,), and sums over them for each row."""

    def __init__(self, weights: Floats, u: Floats, part: float) -> None:
        self.weights, self.u = weights, u
        self.part = part  # of the law that is about sizes that are drawn
        self.powers = np.stack(
            [weights, weights * u, weights**2, weights**2 * u, weights**2 * u**2], axis=1
        )
        self.sums = np.empty((0, 5))  # (n, 5) of the powers

    @property
    def total(self) -> Floats:
        """(n,) Σ r; NaN for a row without such a set."""
        return np.where(self.sums[:, 0] > 0, self.sums[:, 0], np.nan)

    @property
    def mean(self) -> Floats:
        """(n,) Σ r u / Σ r, times the part."""
        return self.part * self.sums[:, 1] / self.total

    @property
    def variance(self) -> Floats:
        """(n,) of the mean over independent sets; NaN for a row with fewer than two of them.

        Σ r² (u − mean)² / (Σ r)², and the mean variance of a set over all rows as one set more:
        utilities that happen to be alike are not known for sure.
        """
        mean = self.sums[:, 1] / self.total
        spread = self.sums[:, 4] - 2 * mean * self.sums[:, 3] + mean**2 * self.sums[:, 2]
        found = np.maximum(spread, 0) / self.total**2
        sets = self.total**2 / self.sums[:, 2]  # as many of equal weight tell as much
        sets[~(sets > 1 + 1e-9)] = np.nan
        typical = np.nansum(found * sets**2) / max(float(np.nansum(sets - 1)), 1e-300)
        return self.part**2 * (found + typical / sets**2)

    def terms(self, some: slice) -> Floats:
        """(b, n) r (u − mean) / Σ r of some sets."""
        apart = self.part * self.u[some, None] - self.mean
        return self.weights[some, None] * apart / self.total


def _errors_by_unit(
    samples: SetSamples, masks: NDArray[np.bool_], inside: _Side, outside: _Side
) -> Floats:
    """Standard errors where the sets of a unit depend on each other: spread of sums over units."""
    total, units = np.zeros(samples.n), samples.units
    step = max(1, ROWS // samples.per_unit) * samples.per_unit
    for at in range(0, len(masks), step):
        some = slice(at, at + step)
        terms = np.where(masks[some], inside.terms(some), -outside.terms(some))
        total += (terms.reshape(-1, samples.per_unit, samples.n).sum(axis=1) ** 2).sum(axis=0)
    if units < 2:
        return np.full(samples.n, np.nan)
    typical = float(np.nanmean(total)) if not np.isnan(total).all() else np.nan
    return np.sqrt(total + typical / (units - 1))  # as in `_Side.variance`


def _ratios(sizes: Floats, law: Floats) -> tuple[Floats, Floats]:
    """(n + 1,) r_in and r_out by size; 0 where a size is never drawn, or does not count."""
    n = len(law)
    s = np.arange(n + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        r_in = np.where((s > 0) & (sizes > 0), np.append(0.0, law) * n / (s * sizes), 0.0)
        r_out = np.where((s < n) & (sizes > 0), np.append(law, 0.0) * n / ((n - s) * sizes), 0.0)
    return r_in, r_out


def check_seen(sizes: Floats, law: Floats, count: int) -> None:
    """A ValueError where sizes that the value looks at are hardly among so many sets."""
    near = np.convolve(sizes, np.ones(2), "valid")  # of k and of k + 1 rows
    # few sets of each of many sizes will do, where they are as many as the value looks at
    rare = (near * max(1, count) < 0.05) & (near < law / 2)
    unseen = float(law[rare].sum())
    if unseen > UNSEEN:
        raise ValueError(
            f"expected sets of all sizes that the value looks at; {unseen:.0%} of it is about "
            "sizes that are hardly ever drawn: sample for this value, or start from permutations"
        )


def is_matched(samples: SetSamples, semivalue: Semivalue) -> bool:
    """Whether sets were drawn with each row with the p of Banzhaf's value."""
    if semivalue.p is None:
        return False
    from scipy.stats import binom

    wanted = binom.pmf(np.arange(samples.n + 1), samples.n, semivalue.p)
    return bool(np.allclose(samples.sizes, wanted, atol=1e-12))


def _bins(size: NDArray[np.intp], n: int) -> NDArray[np.intp]:
    """(n + 1,) a bin for every size: neighbouring sizes together, √M bins of about √M sets."""
    drawn = np.bincount(size, minlength=n + 1)
    wanted = max(1, round(np.sqrt(drawn.sum())))
    return np.minimum((np.cumsum(drawn) - drawn) // wanted, drawn.sum() // wanted).astype(np.intp)


def _mean_by_size(size: NDArray[np.intp], u: Floats, ends: tuple[float, float], n: int) -> Floats:
    """(n + 1,) about the mean utility by size: linear between bins; as it is at both ends."""
    bins = _bins(size, n)[size]
    many = np.bincount(bins)
    there = many > 0
    at = np.bincount(bins, size)[there] / many[there]
    mean = np.bincount(bins, u)[there] / many[there]
    curve = np.interp(np.arange(n + 1), at, mean)
    curve[0], curve[n] = ends
    return curve


def _unshrunk(size: NDArray[np.intp], good: NDArray[np.bool_], n: int) -> Floats:
    """(M,) c / (c − 1): a set has a part in the mean of the c sets that it is compared with."""
    bins = _bins(size[good], n)[size]
    many = np.bincount(bins[good], minlength=int(bins.max()) + 1)[bins]
    return np.where(many > 1, many / np.maximum(many - 1, 1), 1.0)


def _transposed(masks: NDArray[np.bool_], columns: Floats) -> Floats:
    """Zᵀ @ columns, in float64, some sets at a time."""
    total = np.zeros((masks.shape[1], columns.shape[1]))
    for at in range(0, len(masks), ROWS):
        total += masks[at : at + ROWS].T.astype(np.float64) @ columns[at : at + ROWS]
    return total
