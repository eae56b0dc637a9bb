"""Models that are trained again with other rows, and how well they do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upweight.tables import Task

__all__ = ["Model", "maker", "predict", "score_of"]

Model: TypeAlias = Literal["boosting", "linear"] | Callable[[int], Any]


def maker(model: Model, task: Task) -> Callable[[int], Any]:
    """A function of a seed that gives an unfitted estimator."""
    if callable(model):
        return model
    if model not in ("boosting", "linear"):
        raise ValueError(f"expected the model boosting, linear, or a function; got {model!r}")
    return _Maker(model, task)


@dataclass(frozen=True)
class _Maker:
    """Can be sent to other processes, unlike a closure."""

    model: str
    task: Task

    def __call__(self, seed: int) -> Any:
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        labels = self.task == "classification"
        if self.model == "linear":
            simple: Any = LogisticRegression(max_iter=1000) if labels else Ridge()
            return make_pipeline(StandardScaler(), simple)
        kind: Any = HistGradientBoostingClassifier if labels else HistGradientBoostingRegressor
        return kind(max_iter=50, learning_rate=0.2, max_leaf_nodes=15, min_samples_leaf=5,
                    early_stopping=False, random_state=seed)  # fmt: skip


def predict(model: Any, x: NDArray[Any], y: NDArray[Any], x_test: NDArray[Any]) -> NDArray[Any]:
    """What a model that is trained on some rows says of others."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if len(np.unique(y)) == 1:  # classifiers refuse to learn one class
        return np.full(len(x_test), y[0])
    # One thread: where others are at work, the threads of boosting wait for each other for long.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return np.asarray(model.fit(x, y).predict(x_test))


def score_of(task: Task, truth: NDArray[Any], predicted: NDArray[Any]) -> float:
    """Balanced accuracy, or D²; NaN where there is nothing to compare."""
    if task == "classification":
        right = truth == predicted
        shares = [right[truth == label].mean() for label in np.unique(truth)]
        return float(np.mean(shares)) if shares else np.nan
    spread = float(np.abs(truth - np.median(truth)).mean()) if len(truth) else 0.0
    return 1 - float(np.abs(truth - predicted).mean()) / spread if spread else np.nan
