"""Columns that alone tell the target."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, r2_score
from sklearn.model_selection import cross_val_predict
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from upweight.tables import Features, Task

__all__ = ["Leak", "find_leaks"]

ENOUGH = 0.99
ROWS = 5_000


@dataclass(frozen=True)
class Leak:
    """A column from which a small tree tells the target of rows that it has not seen.

    Attributes
    ----------
    column
        Name.
    score
        Balanced accuracy, or R².
    """

    column: str
    score: float


def find_leaks(features: Features, y: NDArray[Any], task: Task, *, seed: int = 0) -> list[Leak]:
    """Columns that alone predict the target with a held-out score of at least 0.99.

    A real cause may do so as well; a column that was filled in after the target was known, or from
    it, always does.

    Parameters
    ----------
    features, y
        Of the judged rows; of at most 5,000 of them.
    task
        Classification (balanced accuracy) or regression (R²).
    seed
        Of the rows and folds.
    """
    n = len(y)
    rng = np.random.default_rng(seed)
    rows = np.arange(n) if n <= ROWS else np.sort(rng.choice(n, ROWS, replace=False))
    rows = rng.permutation(rows)
    target = y[rows]
    leaks: list[Leak] = []
    for number, name in enumerate(features.columns):
        x = features.x[rows][:, features.column == number]
        if x.shape[1] == 0:
            continue
        score = _score(x, target, task, seed)
        if score >= ENOUGH:
            leaks.append(Leak(name, score))
    return sorted(leaks, key=lambda leak: -leak.score)


def _score(x: NDArray[Any], y: NDArray[Any], task: Task, seed: int) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes with fewer rows than folds
        if task == "regression":
            tree: Any = DecisionTreeRegressor(random_state=seed)
            return float(r2_score(y, cross_val_predict(tree, x, y, cv=3)))
        leaves = max(8, 2 * len(np.unique(y)))
        tree = DecisionTreeClassifier(
            max_leaf_nodes=leaves, min_samples_leaf=2, class_weight="balanced", random_state=seed
        )
        return float(balanced_accuracy_score(y, cross_val_predict(tree, x, y, cv=3)))
