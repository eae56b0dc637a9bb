"""The least core: payoffs that leave no set of rows much less than what it is worth alone.

Letters: n rows, M sets, Z (M, n) the sets as 0 and 1, v (M,) what they are worth, x (n,) payoffs,
e the deficit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.checks import count
from upweight.valuation.drawing import Sampler
from upweight.valuation.engine import Evaluator
from upweight.valuation.laws import shapley_law
from upweight.valuation.samples import SetSamples
from upweight.valuation.sampling import Permutations, Stratified
from upweight.valuation.subsets import BernoulliSubsets, EverySubset
from upweight.valuation.telling import tell_failed
from upweight.valuation.utility import Utility
from upweight.valuation.values import Values

__all__ = ["least_core"]

Floats = NDArray[np.float64]

SLACK = 1e-9  # of the largest worth: how much the deficit may grow for the least norm
SOLVED = 1e-7  # likewise: how far off constraints may be in the end
NO_END = -3.0  # likewise: deficits are above −2 unless there is no least one


def least_core(
    utility: Utility | Values,
    *,
    subsets: int | None = None,
    sampler: Literal["subsets", "exact"] | Sampler = "subsets",
    egalitarian: bool = True,
    seed: int = 0,
    n_jobs: int = 1,
    progress: bool = True,
) -> Values:
    """Payoffs of the least core: no set of rows gets much less than it is worth on its own.

    With v(S) = u(S) − u(∅), over M sets S that are neither empty nor everything, ::

        min e   such that   Σ_{i∈S} x_i ≥ v(S) − e  for all S,   Σ_i x_i = v(all).

    The deficit e is what the worst-off set lacks. It may be negative: then every set gets more than
    it is worth. Payoffs are in units of the utility.

    Parameters
    ----------
    utility
        A `Utility` of n ≥ 2 rows. Or earlier `Values` whose samples are sets, such as those of
        `banzhaf`: nothing is evaluated then.
    subsets
        M. Default: 10 n, at least 1,000. Not for ``"exact"``, which takes all 2^n.
    sampler
        ``"subsets"``: sets that have each row with probability 1/2, each with its complement.
        ``"exact"``: all sets, for at most 20 rows (or groups). Or an object that draws sets, such
        as ``WeightedSubsets()``.
    egalitarian
        Many payoffs may have the least deficit. Among them, take those of least Σ x_i², which are
        unique, and the same for rows that no set tells apart. False: any of them.
    seed, n_jobs, progress
        As in `shapley`.

    Returns
    -------
    Values
        `values` are x. `errors` are NaN, because how far x is from that of all sets is not known.
        ``provenance["deficit"]`` is e, ``provenance["constraints"]`` how many different sets there
        were. `counts` are those sets that hold the row.

    Raises
    ------
    TypeError
        If there is neither a utility nor values.
    ValueError
        If options do not fit together, or draw sets where values have theirs, before long work; if
        values have no samples, or others than sets; if the sets set no bound to e, because
        payoffs can be shifted between rows that too few sets tell apart; or if too many failed.
    UtilityError
        As in `shapley`.

    Warns
    -----
    ValueWarning
        If utilities failed. Their sets constrain nothing.

    Notes
    -----
    The deficit is that of the sets that were drawn: the more sets, the larger e. Other sets may
    lack more, but few do: sets that are drawn at random in the order of n / δ² leave a share of at
    most about δ of all sets lacking more than e (Yan & Procaccia, on sampling). A set and its
    complement together bound e from below, which is why both are drawn.

    e is solved for by linear programming. For the least norm it may grow by 1e-9 of the largest
    ``|v|``, and what comes out is checked against all sets.

    References
    ----------
    Yan & Procaccia, If you like Shapley then you'll love the core, AAAI 2021. Maschler, Peleg &
    Shapley, Geometric properties of the kernel, nucleolus, and related solution concepts, 1979.
    Lawson & Hanson, Solving least squares problems, 1974, ch. 23 (least distance programming).

    Examples
    --------
    One has a left glove, two have a right one; only a pair is worth something. The left one is
    scarce.

    >>> from upweight.valuation import FunctionUtility
    >>> gloves = FunctionUtility(lambda rows: float(0 in rows and len(rows) > 1), 3)
    >>> values = least_core(gloves, sampler="exact")
    >>> np.abs(values.values.round(6)), abs(round(values.provenance["deficit"], 6))
    (array([1., 0., 0.]), 0.0)
    """
    if not isinstance(utility, Utility | Values):
        raise TypeError(
            "expected a Utility, such as ModelUtility or FunctionUtility, or earlier Values; got "
            f"{type(utility).__name__}"
        )
    if isinstance(utility, Values):
        if subsets is not None or sampler != "subsets" or seed:
            raise ValueError(
                "expected only how payoffs are chosen, beside earlier values, whose samples are "
                "there; got subsets, sampler or seed: give the utility to draw others"
            )
        samples, told, failures = _sets_of(utility), _told_before(utility), utility.failures
    else:
        samples, told, failures = _drawn(
            utility, subsets, sampler, seed, n_jobs=n_jobs, progress=progress
        )
    x, e, masks = _solved(samples, egalitarian)
    provenance: dict[str, Any] = {
        "method": "least core",
        "deficit": e,
        "constraints": len(masks),
        "egalitarian": egalitarian,
        **told,
    }
    return Values(
        x,
        np.full(samples.n, np.nan),
        masks.sum(axis=0, dtype=np.int64),
        utility.names,
        provenance,
        stopped=f"least deficit of {len(masks):,} sets",
        failures=failures,
        samples=samples,
    )


def _drawn(
    utility: Utility,
    subsets: int | None,
    sampler: str | Sampler,
    seed: int,
    *,
    n_jobs: int,
    progress: bool,
) -> tuple[SetSamples, dict[str, Any], Any]:
    """Sets and their utilities, where they come from, and what failed."""
    n = utility.n
    _check_rows(n)
    chosen = _named(sampler)
    law = shapley_law(n)
    chosen.check(law)
    count(seed, "seed", 0)
    if isinstance(chosen, EverySubset):
        if subsets is not None:
            raise ValueError(
                f"expected no number of subsets with sampler='exact', which takes all 2^{n}; got "
                f"{subsets}"
            )
        units = 1
    else:
        wanted = max(1_000, 10 * n) if subsets is None else count(subsets, "subsets", 1)
        units = -(-wanted // chosen.cost(law))
    total = units * chosen.cost(law)
    with Evaluator(utility, n_jobs=n_jobs, progress=progress, total=total) as evaluator:
        samples = chosen.collect(evaluator, law, seed, range(units))
        failures, failed = evaluator.failures, evaluator.failed
    if not isinstance(samples, SetSamples):
        raise ValueError(f"expected a sampler that draws sets; got {chosen}")
    tell_failed(failed, evaluator.asked, failures, "constrain nothing")
    told = {
        "sampler_name": chosen.name,
        "seed": seed,
        "evaluations": evaluator.asked,
        "computed": evaluator.computed,
        "failed": failed,
        "utility": utility.fingerprint,
        "ends": list(evaluator.ends),
    }
    return samples, told, failures


def _named(sampler: str | Sampler) -> Sampler:
    if sampler == "subsets":
        return BernoulliSubsets(antithetic=True)
    if sampler == "exact":
        return EverySubset()
    if not isinstance(sampler, Sampler) or isinstance(sampler, Permutations | Stratified):
        raise ValueError(
            "expected sampler 'subsets', 'exact', or an object that draws sets, such as "
            f"WeightedSubsets(); got {sampler!r}"
        )
    return sampler


def _sets_of(values: Values) -> SetSamples:
    if not isinstance(values.samples, SetSamples):
        raise ValueError(
            "expected values whose samples are sets, to find the least core of them; these have "
            f"{'none' if values.samples is None else 'orders of rows, or marginal contributions'}: "
            "start from banzhaf(…), from shapley(…, sampler='subsets'), or from a utility"
        )
    _check_rows(values.n)
    return values.samples


def _told_before(values: Values) -> dict[str, Any]:
    kept = ("sampler_name", "seed", "evaluations", "computed", "failed", "utility", "ends")
    return {name: values.provenance[name] for name in kept if name in values.provenance}


def _check_rows(n: int) -> None:
    if n < 2:
        raise ValueError("expected at least two rows for the least core; got one")


def _solved(samples: SetSamples, egalitarian: bool) -> tuple[Floats, float, NDArray[np.bool_]]:
    """Payoffs, the deficit, and the different sets that they hold for."""
    masks, v, total = _constraints(samples)
    if not len(masks):
        raise ValueError(
            "expected sets that are neither empty nor everything, and whose utilities are known; "
            "there is none: draw more of them"
        )
    scale = max(float(np.abs(v).max()), abs(total)) or 1.0  # all numbers are about 1 from here on
    z, v, total = masks.astype(np.float64), v / scale, total / scale
    x, sets = _least_deficit(z, v, total)
    e = float((v - z @ x).max())
    if egalitarian:
        x = _least_norm(z, v - e, total, x, sets)
        e = float((v - z @ x).max())
    return x * scale, e * scale, masks


def _constraints(samples: SetSamples) -> tuple[NDArray[np.bool_], Floats, float]:
    """Different sets that are neither empty nor everything, what they and all are worth."""
    masks, size = samples.masks, samples.masks.sum(axis=1)
    good = ~np.isnan(samples.utilities) & (size > 0) & (size < samples.n)
    _, first = np.unique(samples.packed[good], axis=0, return_index=True)
    at = np.flatnonzero(good)[np.sort(first)]
    none, every = samples.ends
    return masks[at], samples.utilities[at] - none, every - none


def _least_deficit(z: Floats, v: Floats, total: float) -> tuple[Floats, NDArray[np.intp]]:
    """Payoffs with the least deficit, and the sets that were looked at to find them."""
    from scipy.optimize import linprog

    n = z.shape[1]

    def solve(some: NDArray[np.intp]) -> tuple[Floats, float]:
        # Without a bound, no answer would come where there is no least e. With one, e is there.
        found: Any = linprog(
            np.append(np.zeros(n), 1.0),
            A_ub=-np.hstack([z[some], np.ones((len(some), 1))]),
            b_ub=-v[some],
            A_eq=np.append(np.ones(n), 0.0)[None],
            b_eq=[total],
            bounds=[(None, None)] * n + [(NO_END, None)],
            method="highs-ipm",
            options={"primal_feasibility_tolerance": 1e-9, "dual_feasibility_tolerance": 1e-9},
        )
        if found.x is None or found.status != 0:
            raise RuntimeError(f"the least deficit could not be found: {found.message}")
        x = found.x[:n]
        return x + (total - x.sum()) / n, float(found.x[n])

    first = np.random.default_rng(0).permutation(len(z))[: max(1_000, 20 * n)]
    x, e, sets = _with_few_sets(z, v, solve, first)
    if e < (NO_END - 2) / 2:
        raise ValueError(
            f"expected sets that bound the deficit; payoffs can be shifted between rows that these "
            f"{len(z):,} sets do not tell apart, and nothing is ever lacking: draw more sets, or "
            "sets with their complements (sampler='subsets')"
        )
    return x, sets


def _least_norm(
    z: Floats, least: Floats, total: float, x: Floats, sets: NDArray[np.intp]
) -> Floats:
    """min ‖x‖ such that Z x ≥ least and Σ x = total, which the given x fulfil.

    With x = total / n + y, Σ y = 0 and centred sets G = Z − |S| / n, it is min ‖y‖ such that
    G y ≥ h. Lawson and Hanson: for u ≥ 0 with least ‖[Gᵀ; hᵀ] u − [0; 1]‖ and the residual r there,
    y = −r_{1…n} / r_{n+1}.
    """
    from scipy.optimize import nnls

    n = z.shape[1]
    mean = total / n
    size = float(np.linalg.norm(x - mean))
    if size < SLACK:
        return np.full(n, mean)

    def solve(some: NDArray[np.intp]) -> tuple[Floats, float]:
        g = z[some] - z[some].mean(axis=1)[:, None]
        # In units of a y that is long enough: then r_{n+1} is at least 1/2.
        h = (least[some] - SLACK - z[some].sum(axis=1) * mean) / size
        u, _ = nnls(np.vstack([g.T, h]), np.append(np.zeros(n), 1.0), maxiter=10 * len(some) + 100)
        r = np.append(g.T @ u, h @ u - 1.0)
        y = -r[:n] / r[n] * size
        return mean + y - y.mean(), 0.0

    found, _, _ = _with_few_sets(z, least, solve, sets)
    off = max(float((least - z @ found).max()), abs(float(found.sum()) - total))
    if not off <= SOLVED:
        raise RuntimeError(
            f"the least norm could not be found: constraints are off by {off:.1e} of the largest "
            "worth; take egalitarian=False"
        )
    return found


def _with_few_sets(
    z: Floats,
    v: Floats,
    solve: Callable[[NDArray[np.intp]], tuple[Floats, float]],
    sets: NDArray[np.intp],
) -> tuple[Floats, float, NDArray[np.intp]]:
    """Solve for some of the sets, add those that are worst off, up to as many again; repeat."""
    while True:
        x, e = solve(sets)
        lacking = v - z @ x - e
        lacking[sets] = -np.inf
        worst = np.argsort(-lacking, kind="stable")[: len(sets)]
        worst = worst[lacking[worst] > 2 * SLACK]
        if not len(worst):
            return x, e, sets
        sets = np.concatenate([sets, worst])
