"""Shapley's value and its family, by sampling: one function a name, one loop for all."""

from __future__ import annotations

from typing import Literal

from numpy.typing import ArrayLike

from upweight.valuation.dispatch import answer
from upweight.valuation.drawing import Sampler
from upweight.valuation.laws import Semivalue
from upweight.valuation.sampling import Stratified
from upweight.valuation.stopping import Stopping
from upweight.valuation.subsets import BernoulliSubsets
from upweight.valuation.utility import Utility
from upweight.valuation.values import Values

__all__ = [
    "banzhaf",
    "beta_shapley",
    "delta_shapley",
    "semivalue",
    "shapley",
]

SamplerName = Literal[
    "auto", "permutations", "antithetic", "stratified", "subsets", "owen", "kernel", "exact"
]
SubsetName = Literal["auto", "subsets", "antithetic", "permutations", "exact"]
ReadoutName = Literal["auto", "marginal", "msr", "regression"]


def shapley(
    utility: Utility | Values,
    *,
    sampler: SamplerName | Sampler = "auto",
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
        Which sets to ask for. ``"auto"``: all 2^n of at most ten rows (or groups), where `until`
        has room for them and no clock, and none of them fails; permutations otherwise.
        ``"permutations"``: rows join in random orders. ``"antithetic"``: each order and its
        reverse. ``"subsets"``: sets of all sizes, each of which tells of every row. ``"owen"``: of
        rows with probability p, for p from 0 to 1. ``"kernel"``: least squares by the Shapley
        kernel. ``"stratified"``: one contribution at a time, size by size. ``"exact"``: all 2^n
        sets, for at most 20 rows. Or an object of `upweight.valuation` with options, such as
        ``OwenSubsets(levels=16)``.
    truncation
        A share of u(all) − u(∅), such as 0.01: an order ends where five beginnings in a row come as
        close to u(all) as that, and later rows are taken to add nothing. This is truncated
        Monte-Carlo (TMC), for permutations: cheaper, with a bias of about that size.
    readout
        How values follow from the samples; ``"auto"`` takes the one with the least variance.
    until
        When to stop: a rule of `upweight.valuation`, or a number of evaluations. Default: when
        ranks are stable, ``RankStability(0.95)``, or after 100 n evaluations (at least 2,000). Of
        fewer than eight rows, whose ranks agree by chance, when all standard errors are small,
        ``StandardError(0.1)``.
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
        With standard errors, and `converged`: whether values became as good as `until` says.

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

    >>> import numpy as np
    >>> from upweight.valuation import FunctionUtility
    >>> votes = np.array([2, 1, 1])
    >>> majority = FunctionUtility(lambda rows: float(votes[rows].sum() >= 3), 3)
    >>> shapley(majority, sampler="exact").values
    array([0.667, 0.167, 0.167])
    >>> sampled = shapley(majority, sampler="permutations", until=3_000)
    >>> bool((abs(sampled.values - [2 / 3, 1 / 6, 1 / 6]) < 4 * sampled.errors).all())
    True
    """
    kind = Semivalue.of("shapley")
    return answer(
        utility,
        kind,
        sampler,
        until,
        usual="permutations",
        readout=readout,
        truncation=truncation,
        seed=seed,
        n_jobs=n_jobs,
        progress=progress,
    )


def banzhaf(
    utility: Utility | Values,
    *,
    p: float = 0.5,
    sampler: SubsetName | Sampler = "auto",
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
        p = 1/2; ``"permutations"`` or ``"exact"``; or an object. ``"auto"``: as in `shapley`, but
        subsets.
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
    >>> import numpy as np
    >>> from upweight.valuation import FunctionUtility
    >>> worth = np.array([3.0, -1.0, 0.0, 2.0])
    >>> additive = FunctionUtility(lambda rows: worth[rows].sum(), 4)
    >>> values = banzhaf(additive, p=0.3, until=100)
    >>> bool(np.allclose(values, worth))
    True
    """
    kind = Semivalue.of("banzhaf", p=float(p))
    own = {
        "subsets": BernoulliSubsets(float(p)),
        "antithetic": BernoulliSubsets(float(p), antithetic=True),
    }
    return answer(
        utility,
        kind,
        sampler,
        until,
        usual="subsets",
        own=own,
        readout=readout,
        seed=seed,
        n_jobs=n_jobs,
        progress=progress,
    )


def beta_shapley(
    utility: Utility | Values,
    *,
    alpha: float = 16.0,
    beta: float = 1.0,
    sampler: SamplerName | Sampler = "auto",
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
    return answer(
        utility,
        kind,
        sampler,
        until,
        usual="permutations",
        readout=readout,
        truncation=truncation,
        seed=seed,
        n_jobs=n_jobs,
        progress=progress,
    )


def delta_shapley(
    utility: Utility | Values,
    lower: int,
    upper: int,
    *,
    sampler: SamplerName | Sampler = "auto",
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
        As in `shapley`, but ``"stratified"`` for ``"auto"``. ``"permutations"`` end after
        `upper` + 1 rows here.

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
    return answer(
        utility,
        kind,
        sampler,
        until,
        usual="stratified",
        own={"stratified": Stratified(lower, upper)},
        readout=readout,
        seed=seed,
        n_jobs=n_jobs,
        progress=progress,
    )


def semivalue(
    utility: Utility | Values,
    law: ArrayLike,
    *,
    sampler: SamplerName | Sampler = "auto",
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
        As in `shapley`, but ``"subsets"`` for ``"auto"``, which asks for sizes as the value looks
        at them.

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
    return answer(
        utility,
        kind,
        sampler,
        until,
        usual="subsets",
        readout=readout,
        seed=seed,
        n_jobs=n_jobs,
        progress=progress,
    )
