"""Several out-of-sample predictions as one, and the suspicion that follows from it.

Letters: n rows, C classes, j judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import nnls

from upweight.tables import Task

__all__ = ["Blend", "blend"]

Floats = NDArray[np.float64]

LEAST = 1e-4  # of a probability in a likelihood: one judge cannot veto the others
STEPS = 300
DEGREES = 4  # of freedom of Student's t: residuals have heavier tails than a normal
NEAR = 50  # rows of similar prediction that tell the scale of residuals


@dataclass(frozen=True, eq=False)
class Blend:
    """One prediction out of several, all made for rows that were not learnt from.

    Attributes
    ----------
    prediction
        (n, C) probabilities of the classes; (n,) numbers in regression.
    weights
        (j,) of the judges; they sum to 1.
    suspicion
        (n,) in [0, 1]: 1 − the probability of the given label; in regression
        ``P(|t| < |y − prediction| / scale)`` for Student's t with 4 degrees of freedom.
    """

    prediction: Floats
    weights: Floats
    suspicion: Floats


def blend(
    views: Sequence[NDArray[np.floating]],
    y: NDArray[Any],
    task: Task,
    *,
    weights: Floats | None = None,
) -> Blend:
    """Mix predictions with the weights that explain the given labels best.

        p(c | x_i) = Σ_j w_j p_j(c | x_i),   w maximises Σ_i log p(y_i | x_i),   w ≥ 0, Σ w = 1.

    Every p_j(· | x_i) comes from models that have not seen row i, so the likelihood does not favour
    the judge that fits best. The weights are found by expectation maximisation. In regression they
    are those of non-negative least squares on the rows whose residuals are not extreme, scaled to
    sum to 1.

    Parameters
    ----------
    views
        j arrays (n, C) of probabilities, or (n,) of numbers.
    y
        (n,) positions of the classes, or numbers.
    task
        Classification or regression.
    weights
        (j,) to use instead of the best ones.

    Examples
    --------
    >>> sure, unsure = np.array([[0.9, 0.1], [0.2, 0.8]]), np.full((2, 2), 0.5)
    >>> found = blend([sure, unsure], np.array([0, 1]), "classification")
    >>> found.weights.round(2), found.suspicion.round(2)
    (array([1., 0.]), array([0.1, 0.2]))
    """
    if task == "regression":
        return _numbers(np.stack(views, axis=1).astype(np.float64), y.astype(np.float64), weights)
    rows = np.arange(len(y))
    if weights is None:
        given = np.stack([view[rows, y] for view in views], axis=1).astype(np.float64)
        weights = _mixture_weights(np.clip(given, LEAST, 1.0))
    mixed = np.zeros(views[0].shape)
    for weight, view in zip(weights, views, strict=True):
        mixed += weight * view
    mixed /= np.maximum(mixed.sum(axis=1, keepdims=True), LEAST)
    return Blend(mixed, weights, 1.0 - mixed[rows, y])


def _mixture_weights(given: Floats) -> Floats:
    weights = np.full(given.shape[1], 1.0 / given.shape[1])
    for _ in range(STEPS):
        shares = given * weights
        shares /= shares.sum(axis=1, keepdims=True)
        moved = shares.mean(axis=0)
        if np.abs(moved - weights).max() < 1e-6:
            return moved
        weights = moved
    return weights


def _numbers(views: Floats, y: Floats, weights: Floats | None) -> Blend:
    if weights is None:
        off = np.abs(y - np.median(views, axis=1))
        usual = off <= 4 * 1.4826 * np.median(off) + np.finfo(float).tiny
        shift = np.median(y)
        found = nnls(views[usual] - shift, y[usual] - shift)[0]
        weights = found / found.sum() if found.sum() > 0 else np.full(len(found), 1 / len(found))
    prediction = views @ weights
    residual = np.abs(y - prediction)
    scaled = residual / _scales(prediction, residual)
    return Blend(prediction, weights, 2 * stats.t.cdf(scaled, DEGREES) - 1)


def _scales(prediction: Floats, residual: Floats) -> Floats:
    """Robust standard deviation of residuals: half of all rows, half of those predicted alike."""
    usual = 1.4826 * np.median(residual)
    if usual == 0:
        usual = 1.25 * residual.mean() or 1.0
    if len(residual) < 4 * NEAR:
        return np.full(len(residual), usual)
    order = np.argsort(prediction, kind="stable")
    bins = np.array_split(order, max(4, min(40, len(order) // NEAR)))
    centres = [np.median(prediction[rows]) for rows in bins]
    local = np.array([1.4826 * np.median(residual[rows]) for rows in bins])
    smooth = np.convolve(np.pad(local, 1, "edge"), [0.25, 0.5, 0.25], "valid")
    near = np.interp(prediction, centres, smooth)
    return np.sqrt(usual * np.maximum(near, 0.1 * usual))
