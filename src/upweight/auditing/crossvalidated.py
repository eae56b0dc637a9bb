"""A scikit-learn estimator as a judge of rows that it has not learnt.

Letters: n rows, C classes, K folds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.base import clone, is_classifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from upweight.auditing.networks import fold_of_rows
from upweight.tables import Task

__all__ = ["CrossValidated", "skorch_net"]

Floats = NDArray[np.float64]
Reading = Literal["predict_proba", "decision_function", "predict"]

LEAST = 1e-4  # of a probability in a likelihood
TEMPERATURES = (-6.0, 6.0)  # logarithms


@dataclass(frozen=True, eq=False)
class CrossValidated:
    """Out-of-fold predictions of an estimator, for any targets of the rows.

    Clones are fitted without one fold each and say what they think of it. What they say becomes
    probabilities:

    - ``predict_proba`` as it is;
    - ``decision_function`` f: softmax(f / T), of (0, f) for two classes;
    - ``predict`` alone: 1 − e for the predicted class, e / (C − 1) for every other;

    with the temperature T and the error rate e that explain the given labels best, which no clone
    has seen. A class that is missing in the rows of a clone has probability 0.

    Parameters of the name ``random_state`` that are None get a seed, and torch's random numbers,
    too; the global random state is not touched.

    Attributes
    ----------
    estimator
        Any classifier or regressor, such as a `Pipeline`.
    x
        n rows as it takes them.
    task
        Classification or regression.
    labels
        (C,) what the estimator gets for a class; None in regression.
    folds
        K.
    """

    estimator: Any
    x: Any
    task: Task
    labels: NDArray[Any] | None
    folds: int

    def __call__(self, rows: NDArray[np.intp], y: NDArray[Any], seed: int) -> Floats:
        """Predictions (r, C) or (r,) for some rows with these targets.

        Raises
        ------
        ValueError
            If predictions are not finite, or not of the expected shape.
        """
        fold = fold_of_rows(y, self.task, self.folds, seed)
        reading = self.reading
        found = np.empty((len(rows), *self._width))
        for k in range(self.folds):
            train, held = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            if self.labels is not None and len(np.unique(y[train])) == 1:
                found[held] = _only(int(y[train[0]]), len(self.labels), reading)
                continue
            fitted = self._fitted(rows[train], y[train], seed, k)
            said = np.asarray(getattr(fitted, reading)(self._rows(rows[held])))
            self._check_finite(said, rows[held])
            found[held] = self._spread(said, fitted)
        return found if self.labels is None else _probabilities(found, reading, y)

    @property
    def reading(self) -> Reading:
        """The method that is asked."""
        if self.labels is not None and hasattr(self.estimator, "predict_proba"):
            return "predict_proba"
        if self.labels is not None and hasattr(self.estimator, "decision_function"):
            return "decision_function"
        return "predict"

    @property
    def _width(self) -> tuple[int, ...]:
        return () if self.labels is None else (len(self.labels),)

    @property
    def _name(self) -> str:
        return type(self.estimator).__name__

    def _rows(self, rows: NDArray[np.intp]) -> Any:
        return getattr(self.x, "iloc", self.x)[rows]

    def _fitted(self, rows: NDArray[np.intp], y: NDArray[Any], seed: int, k: int) -> Any:
        model: Any = clone(self.estimator)
        unset = {
            name: seed
            for name, value in model.get_params().items()
            if name.split("__")[-1] == "random_state" and value is None
        }
        model.set_params(**unset)
        targets = y if self.labels is None else self.labels[y]
        net = skorch_net(model)
        if net is not None:
            model, targets = _with_single_precision(model), _targets_of(net, targets)
        with torch.random.fork_rng():
            torch.manual_seed(seed + k)
            try:
                model.fit(self._rows(rows), targets)
            except Exception as error:
                error.add_note(
                    f"raised by {self._name} in fold {k + 1} of {self.folds} of its "
                    f"cross-validation, on {len(rows)} rows"
                )
                raise
        return model

    def _check_finite(self, said: NDArray[Any], rows: NDArray[np.intp]) -> None:
        if said.dtype.kind == "f" and not np.isfinite(said).all():
            bad = ~np.isfinite(said).reshape(len(said), -1).all(axis=1)
            raise ValueError(
                f"expected finite predictions of {self._name}; those for row {rows[bad][0]} are not"
            )

    def _spread(self, said: NDArray[Any], fitted: Any) -> Floats:
        """Of the classes that the fitted estimator knows → of all, (b, C); numbers (b,)."""
        if self.labels is None:
            if said.size != len(said):
                raise ValueError(
                    f"expected one number for a row from {self._name}; got the shape {said.shape}"
                )
            return said.reshape(-1)
        classes = len(self.labels)
        if self.reading == "predict":
            return np.eye(classes)[self._codes(said.reshape(-1).tolist())]
        if said.ndim == 1:
            said = np.stack([np.zeros(len(said)), said], axis=1)
        known: list[Any] = np.asarray(getattr(fitted, "classes_", ())).tolist()
        if len(known) != said.shape[1]:  # a net has outputs for classes that it was not shown
            known = sorted(self.labels.tolist())
        if said.ndim != 2 or said.shape[1] != len(known):
            raise ValueError(
                f"expected {self.reading} of {self._name} to have a column for each of "
                f"{len(known)} classes; got the shape {said.shape}"
            )
        out = np.full((len(said), classes), _never(self.reading))
        out[:, self._codes(known)] = said
        return out

    def _codes(self, labels: list[Any]) -> list[int]:
        assert self.labels is not None
        code = {label: at for at, label in enumerate(self.labels.tolist())}
        strange = [label for label in labels if label not in code]
        if strange:
            raise ValueError(
                f"expected {self._name} to predict labels of y; got {strange[0]!r}, which is none"
            )
        return [code[label] for label in labels]


def skorch_net(estimator: Any) -> Any:
    """The net of skorch that an estimator is, or wraps at its end; None if there is none."""
    while estimator is not None:
        if any(kind.__module__.startswith("skorch.") for kind in type(estimator).__mro__):
            return estimator
        last = isinstance(estimator, Pipeline)
        estimator = estimator.steps[-1][1] if last else getattr(estimator, "estimator", None)
    return None


def _with_single_precision(estimator: Any) -> Pipeline:
    """The same with float32 at the door of the net: torch does not mix it with float64."""
    steps = estimator.steps if isinstance(estimator, Pipeline) else [("net", estimator)]
    return Pipeline([*steps[:-1], ("single precision", FunctionTransformer(_single)), steps[-1]])


def _single(x: Any) -> NDArray[np.float32]:
    return np.asarray(x.toarray() if hasattr(x, "toarray") else x, dtype=np.float32)


def _targets_of(net: Any, targets: NDArray[Any]) -> NDArray[Any]:
    """As the loss of the net takes them."""
    if not is_classifier(net):
        return targets.astype(np.float32)[:, None]
    one = any(kind.__name__ == "NeuralNetBinaryClassifier" for kind in type(net).__mro__)
    return targets.astype(np.float32 if one else np.int64)


def _never(reading: Reading) -> float:
    """What is said of a class that cannot be."""
    return -np.inf if reading == "decision_function" else 0.0


def _only(code: int, classes: int, reading: Reading) -> Floats:
    """What is said where only one class is known."""
    certain = 0.0 if reading == "decision_function" else 1.0
    return np.where(np.arange(classes) == code, certain, _never(reading))


def _probabilities(found: Floats, reading: Reading, y: NDArray[Any]) -> Floats:
    if reading == "predict_proba":
        return found
    classes = found.shape[1]
    if reading == "predict":
        wrong = float(np.clip((found.argmax(axis=1) != y).mean(), LEAST, 1 - 1 / classes))
        return np.where(found == 1, 1 - wrong, wrong / (classes - 1))

    def loss(temperature: float) -> float:
        given = softmax(found / np.exp(temperature), axis=1)[np.arange(len(y)), y]
        return float(-np.log(np.clip(given, LEAST, 1)).mean())

    best: Any = minimize_scalar(loss, bounds=TEMPERATURES, method="bounded")
    return softmax(found / np.exp(best.x), axis=1)
