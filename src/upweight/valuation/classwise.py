"""Shapley values class by class: what a row does for its own class, and for the others.

Letters: n rows, m test rows, C classes, T units: a random order of the rows of every class, each
behind a random set of rows of the other classes.
"""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.checks import count
from upweight.valuation.engine import Evaluator
from upweight.valuation.model_utility import ModelUtility, without_warnings_of_small_sets
from upweight.valuation.readouts import moderated
from upweight.valuation.run import next_round
from upweight.valuation.samples import Estimate
from upweight.valuation.states import State
from upweight.valuation.stopping import Stopping, Verdict, ending, rule_from
from upweight.valuation.telling import tell, tell_failed
from upweight.valuation.utility import Evaluated, Utility, UtilityError, each
from upweight.valuation.values import Values

__all__ = ["class_wise_shapley"]

Floats = NDArray[np.float64]


def class_wise_shapley(
    utility: ModelUtility,
    *,
    until: Stopping | int | None = None,
    out_of_class: float = 0.5,
    normalize: bool = True,
    seed: int = 0,
    n_jobs: int = 1,
    progress: bool = True,
) -> Values:
    """Class-wise Shapley values (CS-Shapley): what a row adds for the test rows of its own class.

    A row that helps its class may harm others, and accuracy over all classes does not tell. Here,
    for rows D_c of class c and a set O of rows of other classes, sets S of D_c are worth ::

        u_c(S | O) = a_c(S ∪ O) · exp(a_{−c}(S ∪ O))
        a_c    = test rows of class c that a model of S ∪ O predicts right / m
        a_{−c} = test rows of other classes, likewise / m

    and the value of a row i of class c is ::

        v_i = mean over random O ≠ ∅ of the Shapley value of i in the game u_c(· | O) over D_c.

    Parameters
    ----------
    utility
        Of a classifier. Its scoring does not matter. Without test rows, the training rows are the
        test rows, in folds, each predicted by models that have not seen its fold.
    until
        When to stop: a rule, or a number of evaluations. Default: as in `shapley`.
    out_of_class
        The probability in (0, 1] with which each row of the other classes is in O. 1/2 makes all
        sets alike, as in the paper.
    normalize
        Scale the values of every class so that their sum is a_c of the model of all rows: the
        accuracy within the class, as a share of all test rows. A class whose values have no sum
        above 0 is not scaled.
    seed, n_jobs, progress
        As in `shapley`.

    Returns
    -------
    Values
        With standard errors over units; where values are scaled, those of a ratio of means. A unit
        takes n + C evaluations, one contribution for every row. Without scaling, values are in
        units of u_c; its range is 0 to e.

    Raises
    ------
    TypeError
        If the utility is not a `ModelUtility`.
    ValueError
        If it is one of a regression, or of a function; or options are wrong.
    UtilityError
        As in `shapley`.

    Warns
    -----
    ValueWarning
        If a budget ended the run before values were good, utilities failed, a class has no test
        rows (its values are 0), or has not been scaled.

    Notes
    -----
    Utilities are kept in the cache of the utility, so a longer run takes up where this one ended.

    The first rows of a class that join count for most. A model that makes little of one or two rows
    of a class, such as Gaussian naive Bayes with its variances, ranks rows badly here.

    References
    ----------
    Schoch, Xu & Ji, CS-Shapley: class-wise Shapley values for data valuation in classification,
    NeurIPS 2022, eq. 3 to 6.

    Examples
    --------
    >>> from sklearn.neighbors import KNeighborsClassifier
    >>> x = np.array([[0.0], [0.2], [0.3], [1.0], [1.1], [0.1]])  # the last one is mislabelled
    >>> y = ["low", "low", "low", "high", "high", "high"]
    >>> test = [[0.06], [0.25], [1.05], [1.2]], ["low", "low", "high", "high"]
    >>> utility = ModelUtility(KNeighborsClassifier(1), (x, y), test)
    >>> values = class_wise_shapley(utility, until=800, progress=False)
    >>> int(values.values.argmin()), round(float(values.values[:3].sum()), 6)
    (5, 0.25)
    """
    game = _InClass(utility)
    rule, seed = ending(rule_from(until, utility.n), utility.n), count(seed, "seed", 0)
    if not 0 < out_of_class <= 1:
        raise ValueError(f"expected out_of_class above 0 and at most 1; got {out_of_class}")
    accuracies = game.accuracies()
    wanted = accuracies if normalize else None
    began = time.monotonic()
    cost, terms = utility.n + game.classes, np.empty((0, utility.n))
    room = rule.room(None)
    state: State | None = None
    verdict = Verdict(False, None, "")
    total = room if np.isfinite(room) else None
    with Evaluator(game, n_jobs=n_jobs, progress=progress, total=total) as evaluator:
        while not verdict.stop:
            more = next_round(len(terms), cost, rule, state)
            if not more:
                break
            units = range(len(terms), len(terms) + more)
            new = _contributions(game, evaluator, units, seed, out_of_class)
            terms = np.concatenate([terms, new])
            state = _state(terms, game.codes, wanted, evaluator.asked, time.monotonic() - began)
            verdict = rule.judge(state)
        failures = evaluator.failures
    failures["size"] -= 1  # the class is no row
    assert state is not None
    provenance = {
        "method": "class-wise Shapley",
        "sampler_name": "permutations",
        "out_of_class": float(out_of_class),
        "normalized": normalize,
        "seed": seed,
        "until": str(rule),
        "evaluations": evaluator.asked,
        "computed": evaluator.computed,
        "failed": evaluator.failed,
        "seconds": state.seconds,
        "utility": utility.fingerprint,
    }
    found = state.estimate
    values = Values(
        found.values,
        found.errors,
        found.counts,
        utility.names,
        provenance,
        verdict.converged,
        verdict.why,
        failures,
    )
    _warn(values, game, terms, wanted)
    return values


class _InClass(Utility):
    """u_c(S): rows are followed by one more player for every class, of which a set has one.

    So the sets of all classes are evaluated and kept side by side. Of several classes, or none, the
    utility is the sum.
    """

    def __init__(self, utility: ModelUtility) -> None:
        import pandas as pd

        _check(utility)
        self.inner = utility
        self.codes, labels = utility.codes, utility.classes
        self.labels = [str(label) for label in labels]
        self.classes, self.rows = len(labels), utility.n
        self.n = self.rows + self.classes
        self.names = pd.Index([*utility.names, *(f"class {label}" for label in self.labels)])
        self.cache, self.prefer = utility.cache, utility.prefer
        self.test = utility.test_codes

    @property
    def fingerprint(self) -> str | None:
        """Of the utility."""
        from upweight.valuation.fingerprints import digest

        inner = self.inner.fingerprint
        return None if inner is None else digest("class-wise", inner)

    @cached_property
    def problem(self) -> str:
        """By that of the utility, which is asked again and again; this object is not."""
        return self.fingerprint or f"{self.inner.problem}, class-wise"

    def evaluate(self, masks: NDArray[np.bool_]) -> Evaluated:
        """Set by set, one fit for each."""
        with without_warnings_of_small_sets():
            return each(masks, self._worth)

    def accuracies(self) -> Floats:
        """(C,) a_c of the model of all rows; a UtilityError, caused by its own, if it fails."""
        with without_warnings_of_small_sets():
            try:
                right = self.inner.right(np.arange(self.rows))
            except Exception as error:
                raise UtilityError(
                    f"expected a model of all {self.rows} rows; it ended with "
                    f"{type(error).__name__}: {error}"
                ) from error
        codes = self.test[right]
        return np.bincount(codes, minlength=self.classes) / len(right)

    def _worth(self, players: NDArray[np.intp]) -> float:
        rows, judged = players[players < self.rows], players[players >= self.rows] - self.rows
        right = self.inner.right(rows)
        total = 0.0
        for code in judged:
            within = np.count_nonzero(right & (self.test == code)) / len(right)
            beyond = np.count_nonzero(right & (self.test != code)) / len(right)
            total += within * np.exp(beyond)
        return total


def _check(utility: Any) -> None:
    if not isinstance(utility, ModelUtility):
        raise TypeError(
            "expected a ModelUtility, whose model can be asked for the classes of the test rows; "
            f"got {type(utility).__name__}"
        )
    if utility.task != "classification":
        raise ValueError(f"expected the utility of a classifier; got one of a {utility.task}")


def _contributions(
    game: _InClass, evaluator: Evaluator, units: range, seed: int, p: float
) -> Floats:
    """(T, n) u_c(with i) − u_c(before i), in the order of the unit; NaN where one failed."""
    members = [np.flatnonzero(game.codes == code) for code in range(game.classes)]
    orders: list[list[NDArray[np.intp]]] = []
    masks: list[NDArray[np.bool_]] = []
    for unit in units:
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(unit,)))
        orders.append([])
        for code, rows in enumerate(members):
            others = _others(rng, game.codes != code, p)
            order = rng.permutation(rows)
            chain = np.zeros((len(rows) + 1, game.n), np.bool_)
            chain[:, : game.rows] = others
            chain[:, game.rows + code] = True
            chain[:, order] = np.arange(len(rows) + 1)[:, None] > np.arange(len(rows))
            orders[-1].append(order)
            masks.append(chain)
    found = evaluator.masks(np.concatenate(masks))
    terms, at = np.empty((len(units), game.rows)), 0
    for line, unit_orders in zip(terms, orders, strict=True):
        for order in unit_orders:
            line[order] = np.diff(found[at : at + len(order) + 1])
            at += len(order) + 1
    return terms


def _others(rng: np.random.Generator, among: NDArray[np.bool_], p: float) -> NDArray[np.bool_]:
    """(n,) each of them with probability p, not none."""
    while True:
        drawn = among & (rng.random(len(among)) < p)
        if drawn.any():
            return drawn


def _state(
    terms: Floats, codes: NDArray[np.intp], wanted: Floats | None, evaluations: int, seconds: float
) -> State:
    def read(units: NDArray[np.intp] | None) -> Estimate:
        return _estimate(terms if units is None else terms[units], codes, wanted)

    return State(read, len(terms), evaluations, seconds)


def _estimate(terms: Floats, codes: NDArray[np.intp], wanted: Floats | None) -> Estimate:
    """Means over units, scaled by class: v_i = s_c t_i, s_c = a_c / Σ_{j of c} t_j.

    By the delta method a unit moves v_i by s_c (δ_i − t_i Σ_j δ_j / Σ_j t_j), for δ its terms minus
    their means t.
    """
    there = ~np.isnan(terms)
    counts = there.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(there, terms, 0.0).sum(axis=0) / counts
        apart = np.where(there, terms - means, 0.0)
        total, scaled = _totals(means, codes, wanted)
        scale = np.ones(len(means))
        if wanted is not None and scaled.any():
            among = scaled[codes]
            scale[among] = (wanted / total)[codes[among]]
            of_class = apart @ (codes[:, None] == np.arange(len(total)))  # (T, C)
            shares = (means / total[codes])[among]
            apart[:, among] -= shares * of_class[:, codes[among]]
        variances = (apart**2).sum(axis=0) / (counts - 1) / counts
    variances[counts < 2] = np.nan
    errors = np.abs(scale) * np.sqrt(moderated(variances, counts))
    return Estimate(means * scale, errors, counts.astype(np.int64))


def _totals(
    means: Floats, codes: NDArray[np.intp], wanted: Floats | None
) -> tuple[Floats, NDArray[np.bool_]]:
    """(C,) sums of values by class, and which classes can be scaled."""
    if wanted is None:
        return np.empty(0), np.zeros(0, np.bool_)
    total = np.bincount(codes, np.nan_to_num(means), len(wanted)).astype(np.float64)
    return total, (total > 0) & (wanted > 0)


def _warn(values: Values, game: _InClass, terms: Floats, wanted: Floats | None) -> None:
    told = values.provenance
    tell_failed(told["failed"], told["evaluations"], values.failures)
    seen = np.bincount(game.test[game.test >= 0], minlength=game.classes) > 0
    if not seen.all():
        tell(
            f"no test row is of the classes {_listed(game, ~seen)}: their rows have values of 0, "
            "which say nothing"
        )
    if wanted is not None:
        means = np.nan_to_num(_estimate(terms, game.codes, None).values)
        unscaled = seen & ~_totals(means, game.codes, wanted)[1]
        if unscaled.any():
            tell(
                f"values of the classes {_listed(game, unscaled)} are not scaled: their sum is not "
                "above 0, or the model of all rows is never right there"
            )
    if values.converged is False:
        tell(
            f"values did not converge: {values.provenance['until']} was asked for, and the run "
            f"ended with {values.stopped}; a call with a larger budget takes up from there"
        )


def _listed(game: _InClass, which: NDArray[np.bool_]) -> str:
    names = [game.labels[code] for code in np.flatnonzero(which)]
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
