"""Suspicion from the forest and the neighbours alone: in seconds, and from the given rows only."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.auditing.blending import blend
from upweight.tables import Task
from upweight.valuation import knn_proba, neighbours, oob_judge

__all__ = ["quick_suspicion"]

TREES = 100
VOTES = 10


def quick_suspicion(x: NDArray[Any], y: NDArray[Any], task: Task, seed: int) -> NDArray[np.float64]:
    """The suspicion of an audit, by those judges that need no training of a network.

    Parameters
    ----------
    x, y
        (n, d) features; (n,) codes of classes, or numbers.
    task
        Classification or regression.
    seed
        Of the forest.

    Returns
    -------
    ndarray
        (n,) in [0, 2]: `Blend.suspicion` of the trees that have not seen a row and of its 10
        nearest rows; more by 1 where they prefer another class than the given one, as only such
        rows are flagged.

    Examples
    --------
    >>> x = np.repeat([[0.0], [5.0]], 20, axis=0) + np.arange(40)[:, None] / 100
    >>> y = np.repeat([0, 1], 20)
    >>> y[3] = 1
    >>> int(quick_suspicion(x, y, "classification", seed=0).argmax())
    3
    """
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        return np.zeros(len(y))
    near, _ = neighbours(x, min(VOTES, len(y) - 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*out of bag for no tree")
        judged = oob_judge(None, x, y, trees=TREES, task=task, seed=seed)
    seen_by_all = judged.counts == 0
    if task == "regression":
        assert judged.prediction is not None
        forest = np.where(seen_by_all, np.median(y), judged.prediction)
        return blend([forest, y[near].mean(axis=1)], y, task).suspicion
    assert judged.proba is not None
    shares = np.bincount(codes) / len(codes)
    forest = np.where(seen_by_all[:, None], shares, judged.proba)
    mixed = blend([forest, knn_proba(near, codes)[0]], codes, task)
    return mixed.suspicion + (mixed.prediction.argmax(axis=1) != codes)
