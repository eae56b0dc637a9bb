"""How good probabilities or predictions are on m test rows: one number, higher is better.

Letters: m test rows, C classes, s rows in a training set. Every function takes the outputs of one
model, or of a stack of models with leading axes "…"; each model's score is bitwise the same alone
and in any stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.valuation.checks import Task

__all__ = [
    "PredictionScore",
    "ProbaScore",
    "Scoring",
    "accuracy",
    "brier",
    "classification_scores",
    "get_scoring",
    "laplace",
    "log_likelihood",
    "neg_mean_squared_error",
    "r2",
    "regression_scores",
    "score_many",
]

ProbaScore = Callable[[NDArray[np.float64], NDArray[np.intp]], Any]
"""proba (…, m, C), codes (m,) → (…,)"""
PredictionScore = Callable[[NDArray[np.float64], NDArray[np.float64]], Any]
"""predicted (…, m), targets (m,) → (…,)"""


@dataclass(frozen=True)
class Scoring:
    """A score by its name.

    Attributes
    ----------
    name
        As in `classification_scores` or `regression_scores`.
    task
        ``"classification"`` or ``"regression"``.
    function
        (outputs, wanted) → (…,): a `ProbaScore` or a `PredictionScore`.
    smoothed
        Whether `laplace` comes first.
    """

    name: str
    task: Task
    function: Callable[[NDArray[np.float64], NDArray[Any]], Any]
    smoothed: bool = False


def accuracy(proba: NDArray[np.float64], codes: NDArray[np.intp]) -> Any:
    """Share of test rows whose class is the most probable one: mean [argmax_c p_c = y].

    Parameters
    ----------
    proba
        (…, m, C). The first of equally probable classes counts.
    codes
        (m,) classes as 0 … C − 1; −1 for a class that models do not know: never right.

    Returns
    -------
    float or ndarray
        (…,) in [0, 1]; NaN where a probability is NaN.

    Examples
    --------
    >>> float(accuracy(np.array([[0.9, 0.1], [0.6, 0.4]]), np.array([0, 1])))
    0.5
    """
    proba = np.asarray(proba, np.float64)
    chosen = proba.argmax(axis=-1)
    right = (chosen == codes).astype(np.float64)
    right[np.isnan(proba).any(axis=-1)] = np.nan
    return _mean(right)


def log_likelihood(proba: NDArray[np.float64], codes: NDArray[np.intp]) -> Any:
    """Mean log-likelihood of the test rows, in nats: mean log p_y.

    Parameters
    ----------
    proba
        (…, m, C). They are not clipped: log 0 is −inf. See `laplace`.
    codes
        (m,) classes as 0 … C − 1, all known to the models.

    Returns
    -------
    float or ndarray
        (…,) at most 0.

    Examples
    --------
    >>> proba = np.array([[0.5, 0.5], [0.2, 0.8]])
    >>> float(log_likelihood(proba, np.array([0, 1])) - np.log(0.5 * 0.8) / 2)
    0.0
    """
    of_class = np.asarray(proba, np.float64)[..., *_places(codes)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return _mean(np.log(np.ascontiguousarray(of_class)))


def brier(proba: NDArray[np.float64], codes: NDArray[np.intp]) -> Any:
    """Negative Brier score: −mean Σ_c (p_c − [c = y])².

    Parameters
    ----------
    proba
        (…, m, C).
    codes
        (m,) classes as 0 … C − 1, all known to the models.

    Returns
    -------
    float or ndarray
        (…,) in [−2, 0].

    References
    ----------
    Brier, Verification of forecasts expressed in terms of probability, 1950, eq. 2.

    Examples
    --------
    >>> float(brier(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 1])))
    -0.25
    """
    missed = np.array(proba, np.float64, order="C")
    missed[..., *_places(codes)] -= 1.0
    missed *= missed
    return -_mean(missed.sum(axis=-1))


def neg_mean_squared_error(predicted: NDArray[np.float64], y: NDArray[np.float64]) -> Any:
    """−mean (f − y)², in squared units of y.

    Parameters
    ----------
    predicted
        f, (…, m).
    y
        (m,) targets.

    Returns
    -------
    float or ndarray
        (…,) at most 0.

    Examples
    --------
    >>> neg_mean_squared_error(np.array([[1.0, 2.0], [3.0, 3.0]]), np.array([1.0, 4.0]))
    array([-2. , -2.5])
    """
    missed = np.asarray(predicted, np.float64) - y
    return -_mean(missed * missed)


def r2(predicted: NDArray[np.float64], y: NDArray[np.float64]) -> Any:
    """Share of the variance that is explained: 1 − Σ (f − y)² / Σ (y − ȳ)², ȳ = mean y.

    Parameters
    ----------
    predicted
        f, (…, m).
    y
        (m,) targets that are not all the same.

    Returns
    -------
    float or ndarray
        (…,) at most 1; NaN if all y are the same.

    Examples
    --------
    >>> r2(np.array([[1.0, 2.0], [3.0, 3.0]]), np.array([2.0, 4.0]))
    array([-1.5,  0. ])
    """
    variance = _mean((y - y.mean()) ** 2)
    return 1 + neg_mean_squared_error(predicted, y) / (variance if variance > 0 else np.nan)


def _scorings(task: Task, *functions: Any, smoothed: tuple[str, ...] = ()) -> dict[str, Scoring]:
    named = ((each.__name__, each) for each in functions)
    return {name: Scoring(name, task, each, name in smoothed) for name, each in named}


classification_scores: dict[str, Scoring] = _scorings(
    "classification", accuracy, log_likelihood, brier, smoothed=("log_likelihood", "brier")
)
"""`accuracy`, `log_likelihood`, `brier`, by name."""
regression_scores: dict[str, Scoring] = _scorings("regression", neg_mean_squared_error, r2)
"""`neg_mean_squared_error`, `r2`, by name."""


def get_scoring(name: str, task: Task) -> Scoring:
    """One of our scores by its name; a ValueError that lists them, if there is none.

    Examples
    --------
    >>> get_scoring("brier", "classification").smoothed
    True
    >>> get_scoring("brier", "regression")
    Traceback (most recent call last):
        ...
    ValueError: expected scoring 'neg_mean_squared_error' or 'r2' for a regression; got 'brier'
    """
    known = classification_scores if task == "classification" else regression_scores
    if isinstance(name, str) and name in known:
        return known[name]
    *most, last = (repr(each) for each in known)
    raise ValueError(
        f"expected scoring {', '.join(most)} or {last} for a {task}; got {name!r}"
    ) from None


def laplace(proba: NDArray[np.float64], rows: ArrayLike) -> NDArray[np.float64]:
    """Probabilities as if there was one more training row of every class.

    ::

        p' = (s p + 1) / (s + C)

    For one class or no rows, where p are the shares of the classes in the set, this is Laplace's
    rule of succession, (s_c + 1) / (s + C). A class that is not in the set has p' = 1 / (s + C); a
    set without rows has p' = 1 / C for all.

    Models fitted on few rows are often certain and wrong. Then log p is −inf, or −34 where p was
    clipped at the precision of floats, and one such test row outweighs all others in any value.
    With p' a log-likelihood is at least −log(s + C), and a row that joins changes it by at most
    log(s + C + 1). For large sets, p' tends to p.

    Parameters
    ----------
    proba
        (…, m, C) that sum to 1 over the classes; for a set without rows they do not matter.
    rows
        s: a number, or (…,) one for each model.

    Returns
    -------
    ndarray
        (…, m, C)

    References
    ----------
    Laplace, Essai philosophique sur les probabilités, 1814, the rule of succession.

    Examples
    --------
    >>> laplace(np.array([[1.0, 0.0]]), 8)
    array([[0.9, 0.1]])
    >>> laplace(np.array([[1.0, 0.0]]), 0)
    array([[0.5, 0.5]])
    """
    proba = np.asarray(proba, np.float64)
    s = np.asarray(rows, np.float64)[..., None, None]
    return (s * proba + 1.0) / (s + proba.shape[-1])


def score_many(
    name: str, outputs: NDArray[np.float64], wanted: NDArray[Any], rows: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Scores of a stack of models.

    Parameters
    ----------
    name
        One of `classification_scores` or `regression_scores`.
    outputs
        proba (…, m, C), or predictions (…, m).
    wanted
        (m,) codes of classes, or targets.
    rows
        s, a number or (…,): how many training rows each model has seen. If given, `laplace` comes
        first where the score is ``log_likelihood`` or ``brier``; ``accuracy`` of a model without
        rows is that of a guess, 1/C. In a regression it has no effect. Default: probabilities are
        scored as they are.

    Returns
    -------
    ndarray
        (…,) float64. Each is bitwise what it is for that model alone.

    Examples
    --------
    >>> proba = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> np.exp(score_many("log_likelihood", proba, np.array([0]), rows=[8, 8]))
    array([0.9, 0.1])
    >>> score_many("accuracy", proba, np.array([0]), rows=[8, 0])
    array([1. , 0.5])
    """
    task: Task = "regression" if name in regression_scores else "classification"
    scoring = get_scoring(name, task)
    outputs = np.asarray(outputs, np.float64)
    if rows is None or task == "regression":
        return np.asarray(scoring.function(outputs, wanted))
    if scoring.smoothed:
        return np.asarray(scoring.function(laplace(outputs, rows), wanted))
    guess = np.count_nonzero(wanted >= 0) / len(wanted) / outputs.shape[-1]
    return np.where(np.asarray(rows) == 0, guess, scoring.function(outputs, wanted))


def _places(codes: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    if codes.min() < 0:
        raise ValueError("expected codes of known classes; got -1: only accuracy is defined for it")
    return np.arange(len(codes)), codes


def _mean(terms: NDArray[np.float64]) -> Any:
    """Mean over the last axis, (…,): contiguous, so that the order of sums is always the same."""
    return np.ascontiguousarray(terms).sum(axis=-1) / terms.shape[-1]
