"""What is scored where a set of rows does not teach a model all classes, or nothing at all.

Classes of scikit-learn, and so imported only by those who need them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.metaestimators import available_if

__all__ = ["AllClasses", "ConstantClassifier", "ConstantRegressor", "filled"]


class ConstantClassifier(ClassifierMixin, BaseEstimator):
    """The most frequent class of a set, the first of equally frequent ones, for every row.

    Probabilities are (s_c + 1) / (s + C), for counts s_c (C,) of the classes that sum to s.
    """

    def __init__(self, classes: NDArray[Any], counts: NDArray[np.intp]) -> None:
        self.classes = self.classes_ = classes
        self.counts = counts

    def fit(self, x: Any, y: Any) -> ConstantClassifier:
        """Nothing to fit."""
        return self

    def predict(self, x: Any) -> NDArray[Any]:
        """(m,) the class, for each row."""
        return np.repeat(self.classes[[self.counts.argmax()]], _rows(x))

    def predict_proba(self, x: Any) -> NDArray[np.float64]:
        """(m, C) shares of the classes, by Laplace's rule, for each row."""
        shares = (self.counts + 1.0) / (self.counts.sum() + len(self.counts))
        return np.tile(shares, (_rows(x), 1))


class ConstantRegressor(RegressorMixin, BaseEstimator):
    """One number for every row."""

    def __init__(self, value: float) -> None:
        self.value = value

    def fit(self, x: Any, y: Any) -> ConstantRegressor:
        """Nothing to fit."""
        return self

    def predict(self, x: Any) -> NDArray[np.float64]:
        """(m,) the number, for each row."""
        return np.full(_rows(x), self.value)


def _gives_probabilities(wrapped: Any) -> bool:
    return hasattr(wrapped.model, "predict_proba")


class AllClasses(ClassifierMixin, BaseEstimator):
    """A fitted classifier that has not seen all classes; those have probability 0."""

    def __init__(self, model: Any, classes: NDArray[Any]) -> None:
        self.model = model
        self.classes = self.classes_ = classes

    def fit(self, x: Any, y: Any) -> AllClasses:
        """Is fitted."""
        return self

    def predict(self, x: Any) -> NDArray[Any]:
        """(m,) as the model does."""
        return self.model.predict(x)

    @available_if(_gives_probabilities)
    def predict_proba(self, x: Any) -> NDArray[np.float64]:
        """(m, C) probabilities of all classes, if the model has some."""
        return filled(self.model.predict_proba(x), self.model, self.classes)


def filled(proba: Any, model: Any, classes: NDArray[Any]) -> NDArray[np.float64]:
    """(m, C) probabilities of all classes, by the classes_ of the model."""
    proba = np.asarray(proba, np.float64)
    known = getattr(model, "classes_", None)
    if known is None or len(known) != proba.shape[1]:
        # A network has an output for every class, whichever it has seen.
        if proba.shape[1] != len(classes):
            raise ValueError(
                f"expected probabilities of {len(classes)} classes, or of the classes_ of the "
                f"model; got {proba.shape[1]} columns"
            )
        return proba
    if np.array_equal(known, classes):
        return proba
    every = np.zeros((len(proba), len(classes)))
    every[:, np.searchsorted(classes, known)] = proba
    return every


def _rows(x: Any) -> int:
    return x.shape[0] if hasattr(x, "shape") else len(x)
