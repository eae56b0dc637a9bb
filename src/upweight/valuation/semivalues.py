"""Shapley's value and its family, by sampling: one function a name, one loop for all."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from upweight.valuation.engine import Evaluator
from upweight.valuation.laws import Semivalue
from upweight.valuation.run import Settings, read_again, run
from upweight.valuation.sampling import (
    BernoulliSubsets,
    EverySubset,
    KernelSubsets,
    OwenSubsets,
    Permutations,
    Sampler,
    Stratified,
    WeightedSubsets,
)
from upweight.valuation.stopping import Stopping
from upweight.valuation.telling import tell_failed
from upweight.valuation.utility import Utility
from upweight.valuation.values import Values

__all__ = [
    "banzhaf",
    "beta_shapley",
    "delta_shapley",
    "leave_one_out",
    "semivalue",
    "shapley",
]

SamplerName = Literal[
    "permutations", "antithetic", "stratified", "subsets", "owen", "kernel", "exact"
]
SubsetName = Literal["subsets", "antithetic", "permutations", "exact"]
ReadoutName = Literal["auto", "marginal", "msr", "regression"]

_SAMPLERS: dict[str, Sampler] = {
    "permutations": Permutations(),
    "antithetic": Permutations(antithetic=True),
    "stratified": Stratified(),
    "subsets": WeightedSubsets(),
    "owen": OwenSubsets(),
    "kernel": KernelSubsets(),
    "exact": EverySubset(),
}


def shapley(
    utility: Utility | Values,
    *,
    sampler: SamplerName | Sampler = "permutations",
    truncation: float | None = None,
    readout: ReadoutName = "auto",
    until: Stopping | int | None = None,
    seed: int = 0,
    n_jobs: int = 1,
    progress: bool = True,
) -> Values:
    """Shapley values: what a row adds to a set of others, on average over all sizes and sets.

    With u the utility, over sets S of the other n − 1 rows, ::

        v_i = 1/n Σ_{k=0}^{n−1}  mean_{|S| = k, i ∉ S}  u(S ∪ i) − u(S),    Σ_i v_i = u(all) − u(∅).

    Values are in units of the utility.

    Parameters
    ----------
    utility
        A `Utility` of n rows. Or earlier `Values`, whose samples are read out anew: it costs
        nothing.
    sampler
        Which sets to ask for. ``"permutations"``: rows join in random orders. ``"antithetic"``:
        each order and its reverse. ``"subsets"``: sets of all sizes, each of which tells of every
        row. ``"owen"``: of rows with probability p, for p from 0 to 1. ``"kernel"``: least squares
        by the Shapley kernel. ``"stratified"``: one contribution at a time, size by size.
        ``"exact"``: all 2^n sets, for at most 20 rows (or groups). Or an object of
        `upweight.valuation` with options, such as ``OwenSubsets(levels=16)``.
    truncation
        A share of u(all) − u(∅), such as 0.01: an order ends where five beginnings in a row come as
        close to u(all) as that, and later rows are taken to add nothing. This is truncated
        Monte-Carlo (TMC), for permutations: cheaper, with a bias of about that size.
    readout
        How values follow from the samples; ``"auto"`` takes the one with the least variance.
    until
        When to stop: a rule of `upweight.valuation`, or a number of evaluations. Default: when
        ranks are stable, ``RankStability(0.95)``, or after 100 n evaluations (at least 2,000).
    seed
        Of the samples.
    n_jobs
        Workers, -1 for all cores: threads or processes, as the utility prefers, or those of a
        cluster with ``joblib.parallel_config(backend="dask")``. It does not change the result.
    progress
        Whether to show a bar, with the time left, on a terminal.

    Returns
    -------
    Values
        With standard errors, and `converged`: whether ranks became stable.

    Raises
    ------
    ValueError
        If options do not fit together, before long work.
    UtilityError
        If the utility of all rows, or of none, cannot be computed.

    Warns
    -----
    ValueWarning
        If a budget ended the run before values were good, or utilities failed: these are counted
        and named in `Values.failures`, and never taken for a zero.

    Notes
    -----
    Utilities are kept in the cache of the utility. So the same call after Ctrl-C, or in another
    process where the cache has a file, asks for the same sets and goes on from where it was.

    References
    ----------
    Shapley, A value for n-person games, 1953. Ghorbani & Zou, Data Shapley, ICML 2019 (TMC).
    Jia et al., Towards efficient data valuation based on the Shapley value, AISTATS 2019.

    Examples
    --------
    Three votes of 2, 1 and 1 decide with a majority of 3: the first is in 4 of 6 orders the one
    that turns a minority into a majority.

    >>> from upweight.valuation import FunctionUtility
    >>> votes = np.array([2, 1, 1])
    >>> majority = FunctionUtility(lambda rows: float(votes[rows].sum() >= 3), 3)
    >>> shapley(majority, sampler="exact").values
    array([0.667, 0.167, 0.167])
    >>> sampled = shapley(majority, until=3_000)
    >>> bool((abs(sampled.values - [2 / 3, 1 / 6, 1 / 6]) < 4 * sampled.errors).all())
    True
    """
    kind = Semivalue.of("shapley")
    settings = Settings(kind, _named(sampler), readout, truncation, seed)
    return _value(utility, settings, until, n_jobs=n_jobs, progress=progress)


def banzhaf(
    utility: Utility | Values,
    *,
    p: float = 0.5,
    sampler: SubsetName | Sampler = "subsets",
    readout: ReadoutName = "auto",
    until: Stopping | int | None = None,
    seed: int = 0,
    n_jobs: int = 1,
    progress: bool = True,
) -> Values:
    """Data Banzhaf: what a row adds to a set that has each other row with probability p.

    Over all sets S of other rows, ::

        v_i = Σ_{S ∌ i} p^|S| (1 − p)^{n−1−|S|} [u(S ∪ i) − u(S)]

    Every set that is evaluated tells of every row. Of a noisy utility, ranks by p = 1/2 are the
    most robust; to find rows that are wrong, small sets are far better: p from 0.05 to 0.1, and a
    smooth utility such as the log-likelihood.

    Parameters
    ----------
    utility
        A `Utility`, or earlier `Values` whose samples are read out.
    p
        In (0, 1).
    sampler
        ``"subsets"``: such sets, drawn at random; ``"antithetic"``: with their complements, for
        p = 1/2; ``"permutations"`` or ``"exact"``; or an object.
    readout
        ``"msr"``: mean utility of the sets with the row minus that of those without (maximum
        sample re-use). ``"regression"``: the coefficients of a linear fit to the utilities, which
        tend to the same values with less variance. Of fewer than 4 n sets, the fit has a prior
        that draws values to their mean (``provenance["shrunk"]``). ``"auto"``: the fit, for up to
        3,000 rows.
    until, seed, n_jobs, progress
        As in `shapley`.

    Returns
    -------
    Values

    Raises
    ------
    ValueError, UtilityError
        As in `shapley`.

    References
    ----------
    Wang & Jia, Data Banzhaf: a robust data valuation framework for machine learning, AISTATS 2023.
    Li & Yu, Robust data valuation with weighted Banzhaf values, NeurIPS 2023.

    Examples
    --------
    >>> from upweight.valuation import FunctionUtility
    >>> worth = np.array([3.0, -1.0, 0.0, 2.0])
    >>> additive = FunctionUtility(lambda rows: worth[rows].sum(), 4)
    >>> values = banzhaf(additive, p=0.3, until=100)
    >>> bool(np.allclose(values, worth))
    True
    """
    kind = Semivalue.of("banzhaf", p=float(p))
    if sampler in ("subsets", "antithetic"):
        sampler = BernoulliSubsets(float(p), antithetic=sampler == "antithetic")
    settings = Settings(kind, _named(sampler), readout, None, seed)
    return _value(utility, settings, until, n_jobs=n_jobs, progress=progress)


def beta_shapley(
    utility: Utility | Values,
    *,
    alpha: float = 16.0,
    beta: float = 1.0,
    sampler: SamplerName | Sampler = "permutations",
    truncation: float | None = None,
    readout: ReadoutName = "auto",
    until: Stopping | int | None = None,
    seed: int = 0,
    n_jobs: int = 1,
    progress: bool = True,
) -> Values:
    """Beta Shapley: Shapley's value with more weight on small sets (or on large ones).

    With k the rows in S, ::

        v_i = Σ_k P_k  mean_{|S| = k, i ∉ S}  u(S ∪ i) − u(S)
        P_k = C(n−1, k) B(k + β, n − 1 − k + α) / B(α, β)

    Parameters
    ----------
    utility
        A `Utility`, or earlier `Values` whose samples are read out.
    alpha, beta
        α = β = 1 is Shapley's value. The larger α, the more small sets count, in which the
        contribution of a row stands out from noise: (16, 1) by default.
    sampler, truncation, readout, until, seed, n_jobs, progress
        As in `shapley`. ``"subsets"`` asks for sizes as the value looks at them.

    Returns
    -------
    Values

    Raises
    ------
    ValueError, UtilityError
        As in `shapley`.

    References
    ----------
    Kwon & Zou, Beta Shapley: a unified and noise-reduced data valuation framework for machine
    learning, AISTATS 2022.

    Examples
    --------
    >>> from upweight.valuation import FunctionUtility
    >>> square = FunctionUtility(lambda rows: float(len(rows) ** 2), 3)
    >>> exact = beta_shapley(square, alpha=1, beta=1, sampler="exact")
    >>> exact.values, beta_shapley(exact, alpha=16).values
    (array([3., 3., 3.]), array([1.235, 1.235, 1.235]))
    """
    kind = Semivalue.of("beta", alpha=float(alpha), beta=float(beta))
    settings = Settings(kind, _named(sampler), readout, truncation, seed)
    return _value(utility, settings, until, n_jobs=n_jobs, progress=progress)


def delta_shapley(
    utility: Utility | Values,
    lower: int,
    upper: int,
    *,
    sampler: SamplerName | Sampler = "stratified",
    readout: ReadoutName = "auto",
    until: Stopping | int | None = None,
    seed: int = 0,
    n_jobs: int = 1,
    progress: bool = True,
) -> Values:
    """δ-Shapley: Shapley's value over sets of `lower` to `upper` other rows only.

    With k the rows in S, ::

        v_i = 1/(upper − lower + 1) Σ_{k=lower}^{upper}  mean_{|S| = k, i ∉ S}  u(S ∪ i) − u(S)

    Beyond some size rows add next to nothing, and models are dear.

    Parameters
    ----------
    utility
        A `Utility`, or earlier `Values` whose samples are read out.
    lower, upper
        From 0 to n − 1.
    sampler, readout, until, seed, n_jobs, progress
        As in `shapley`. ``"permutations"`` end after `upper` + 1 rows here.

    Returns
    -------
    Values

    Raises
    ------
    ValueError, UtilityError
        As in `shapley`.

    References
    ----------
    Watson, Kujawa, Andreeva, Yang, Elahi & Larson, Accelerated Shapley value approximation for data
    evaluation, 2023.

    Examples
    --------
    >>> from upweight.valuation import FunctionUtility
    >>> square = FunctionUtility(lambda rows: float(len(rows) ** 2), 4)
    >>> delta_shapley(square, 0, 1, sampler="exact").values  # (1 + 3) / 2
    array([2., 2., 2., 2.])
    """
    kind = Semivalue.of("delta", lower=lower, upper=upper)
    if sampler == "stratified":
        sampler = Stratified(lower, upper)
    settings = Settings(kind, _named(sampler), readout, None, seed)
    return _value(utility, settings, until, n_jobs=n_jobs, progress=progress)


def semivalue(
    utility: Utility | Values,
    law: ArrayLike,
    *,
    sampler: SamplerName | Sampler = "subsets",
    readout: ReadoutName = "auto",
    until: Stopping | int | None = None,
    seed: int = 0,
    n_jobs: int = 1,
    progress: bool = True,
) -> Values:
    """Any semivalue: what a row adds, weighted by how many others are there.

    With k the rows in S, ::

        v_i = Σ_k P_k  mean_{|S| = k, i ∉ S}  u(S ∪ i) − u(S)

    Parameters
    ----------
    utility
        A `Utility`, or earlier `Values` whose samples are read out.
    law
        (n,) P_k ≥ 0 with sum 1, for sets of k = 0 … n − 1 other rows.
    sampler, readout, until, seed, n_jobs, progress
        As in `shapley`. ``"subsets"`` asks for sizes as the value looks at them.

    Returns
    -------
    Values

    Raises
    ------
    ValueError, UtilityError
        As in `shapley`; or if the law is none, or not for n rows.

    Examples
    --------
    >>> from upweight.valuation import FunctionUtility
    >>> square = FunctionUtility(lambda rows: float(len(rows) ** 2), 3)
    >>> semivalue(square, [0, 0, 1], sampler="exact").values  # leaving one out: 9 − 4
    array([5., 5., 5.])
    """
    kind = Semivalue.of("law", law=law)
    settings = Settings(kind, _named(sampler), readout, None, seed)
    return _value(utility, settings, until, n_jobs=n_jobs, progress=progress)


def leave_one_out(utility: Utility, *, n_jobs: int = 1, progress: bool = True) -> Values:
    """What the score loses without a row: v_i = u(all) − u(all but i), from n + 1 evaluations.

    Exact, and of little use where a row among many moves the score by less than noise does: with
    accuracy, most values are 0.

    Parameters
    ----------
    utility
        A `Utility`; one with a method ``all_but_one()``, such as `RidgeUtility`, is asked for all
        n at once.
    n_jobs, progress
        As in `shapley`.

    Returns
    -------
    Values

    Raises
    ------
    UtilityError
        As in `shapley`.

    Examples
    --------
    >>> from upweight.valuation import FunctionUtility
    >>> square = FunctionUtility(lambda rows: float(len(rows) ** 2), 3)
    >>> leave_one_out(square).values
    array([5., 5., 5.])
    """
    n = utility.n
    quick: Any = getattr(utility, "all_but_one", None)
    with Evaluator(utility, n_jobs=n_jobs, progress=progress, total=n) as evaluator:
        found = evaluator.masks(~np.eye(n, dtype=np.bool_)) if quick is None else quick()
        failures, failed, computed = evaluator.failures, evaluator.failed, evaluator.computed
        ends = evaluator.ends
    tell_failed(failed, n, failures, "these rows have no value")
    provenance = {
        "method": "leave-one-out",
        "evaluations": n,
        "computed": computed,
        "failed": failed,
        "utility": utility.fingerprint,
        "ends": list(ends),
    }
    return Values(
        ends[1] - found,
        np.where(np.isnan(found), np.nan, 0.0),
        np.where(np.isnan(found), 0, 1).astype(np.int64),
        utility.names,
        provenance,
        stopped="every row left out once",
        failures=failures,
    )


def _named(sampler: str | Sampler) -> Sampler:
    if isinstance(sampler, Sampler):
        return sampler
    if sampler not in _SAMPLERS:
        raise ValueError(
            f"expected a sampler among {', '.join(_SAMPLERS)}, or an object; got {sampler!r}"
        )
    return _SAMPLERS[sampler]


def _value(
    utility: Utility | Values,
    settings: Settings,
    until: Stopping | int | None,
    *,
    n_jobs: int,
    progress: bool,
) -> Values:
    if not isinstance(utility, Utility | Values):
        raise TypeError(
            "expected a Utility, such as ModelUtility or FunctionUtility, or earlier Values; got "
            f"{type(utility).__name__}"
        )
    if isinstance(utility, Utility):
        return run(utility, settings, until, n_jobs=n_jobs, progress=progress)
    if until is not None or settings.tolerance is not None or settings.seed:
        raise ValueError(
            "expected only what values are read out by, beside earlier values, whose samples are "
            "there; got until, truncation or seed: give the utility to draw others, or "
            "values.more(utility, until) for more of them"
        )
    return read_again(utility, settings.semivalue, settings.readout)
