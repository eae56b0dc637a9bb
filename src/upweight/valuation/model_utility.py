"""The score of a model that is fitted on a set of rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.cache import UtilityCache
from upweight.valuation.checks import check_columns, check_r2, count, encode, task_of
from upweight.valuation.model_inputs import (
    check_shapes,
    index_of,
    is_function,
    make_scoring,
    numbers_of,
    own,
    rows_of,
    seeded,
    take,
    task_for,
)
from upweight.valuation.quiet import quiet
from upweight.valuation.scoring import Scoring, laplace, regression_scores, score_many
from upweight.valuation.utility import Evaluated, Utility, each, row_names

__all__ = ["ModelUtility", "without_warnings_of_small_sets"]

REVISION = 1  # raised when the same data get other utilities, so that no cache gives old ones


@dataclass(frozen=True, eq=False)
class _Judges:
    """Test rows, and which training rows may be fitted to be judged by them."""

    allowed: NDArray[np.bool_] | None
    x: Any
    y: NDArray[Any]
    codes: NDArray[np.intp]


class ModelUtility(Utility):
    """Score on test rows of an estimator that is fitted on a set of training rows.

    ::

        with test rows     u(S) = score(estimator fitted on S, test rows)
        without            u(S) = mean over folds F of score(estimator fitted on S − F, rows of F)

    The second form needs no clean test rows: every row is judged by models that have not seen it.
    It takes one fit for each fold.

    Parameters
    ----------
    estimator
        A classifier or regressor with scikit-learn's interface, also a pipeline, a search over
        settings or a network of skorch; it is cloned for every set. Or a function
        ``(x_train, y_train, x_test, y_test) -> float``, which is asked for every set, also for the
        one without rows.
    train
        (x, y): n rows as an array, a DataFrame, a sparse matrix or a list, and their labels of any
        type that can be sorted, or numbers.
    test
        (x, y) of m test rows. Default: none, the training rows judge each other in folds.
    scoring
        ``"log_likelihood"``, ``"brier"``, ``"accuracy"``, ``"neg_mean_squared_error"``, ``"r2"``
        (see `upweight.valuation.scoring`), any other scoring of scikit-learn by its name, or
        ``scorer(estimator, x, y) -> float``. Higher is better. Default: log_likelihood for
        classifiers that give probabilities, accuracy for others; neg_mean_squared_error for
        regressors. Accuracy moves in steps of 1/m, and most rows do not change it at all; a smooth
        score tells rows apart with far fewer fits.
    names
        Of the n rows. Default: the index of x if it has one, else 0, …, n − 1.
    folds
        How many, without test rows. They are drawn by seed, with equal shares of the classes.
    min_rows
        Smaller sets are not fitted, see below. ``min_rows=5`` for five nearest neighbours.
    seed
        Of the folds and of the estimator: every ``random_state=None`` in it is replaced by a
        number, so that a set has one utility.
    cache
        Default: one in memory.

    Attributes
    ----------
    classes
        (C,) the sorted labels; empty in a regression.
    codes
        (n,) positions of the labels of the training rows in them.

    Raises
    ------
    ValueError
        Before any fit: if there are no rows, lengths do not fit, labels are missing or of one class
        only, a name occurs twice, the scoring is not known or does not fit, the estimator cannot be
        fitted, cloned or repeated, or a test row has a class that no training row has (accuracy
        counts it as never right; scikit-learn's scores see it).

    Notes
    -----
    Sets that teach no model are scored nonetheless, without a fit. These are sets without rows,
    with fewer than min_rows, or with rows of one class. A classifier is replaced by the shares of
    the classes in the set, with one imagined row of every class: (s_c + 1) / (s + C) for s_c of s
    rows. For accuracy that is the most frequent class; without rows, the accuracy of a guess, 1/C.
    A regressor is replaced by the mean of the set; without rows, by the mean of all training rows.

    For log_likelihood and brier all probabilities are smoothed in this way, see
    `upweight.valuation.scoring.laplace`; this bounds what one row can add. Probabilities are filled
    up to all C classes, with 0 for those that the set does not have. Scores of scikit-learn, and
    functions, see a model that knows all classes, and its probabilities as they are.

    Whatever is raised for one set, and a score that is not finite, is a failure of that set.
    Warnings of scikit-learn that small sets bring about (no convergence, scores that are not
    defined, a rare class in an inner fold) are not shown.

    A network that draws its first weights from torch's global generator has no fixed utility. Give
    it weights that are set, or a function that seeds the generator first.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
    >>> y = ["low", "low", "high", "high"]
    >>> test = [[0.5], [2.5]], ["low", "high"]
    >>> u = ModelUtility(LogisticRegression(), (x, y), test, "accuracy")
    >>> u([0, 3]), u([0]), u([])
    (1.0, 0.5, 0.5)
    """

    def __init__(
        self,
        estimator: Any,
        train: tuple[Any, Any],
        test: tuple[Any, Any] | None = None,
        scoring: str | Callable[[Any, Any, Any], float] | None = None,
        *,
        names: Any = None,
        folds: int = 5,
        min_rows: int = 1,
        seed: int = 0,
        cache: UtilityCache | None = None,
    ) -> None:
        self._x, y = rows_of(train, "train")
        self.n = len(y)
        self._min_rows = count(min_rows, "min_rows", 1)
        self._seed = count(seed, "seed", 0)
        self.names = row_names(index_of(train) if names is None else names, self.n)
        self.cache = UtilityCache() if cache is None else cache
        self._is_function = is_function(estimator, scoring, min_rows)
        self._task = task_for(None if self._is_function else estimator, y)
        self._y = numbers_of(y)
        self.classes = np.empty(0)
        self.codes = np.zeros(self.n, np.intp)
        if self._task == "classification":
            encoded = encode(y, "y of train")
            self.classes, self.codes = encoded.classes, encoded.codes.astype(np.intp)
            self._y = self.classes[self.codes]
        self._scoring: Any = None
        self._scored_by: Any = None
        self._model: Any = estimator
        if not self._is_function:
            self._model = seeded(estimator, self._seed)
            self._scoring = make_scoring(scoring, self._task, estimator)
            ours = isinstance(self._scoring, Scoring)
            self._scored_by = self._scoring.name if ours else scoring
        self._folds = None if test is not None else self._draw_folds(folds)
        self._judges = self._fold_judges() if test is None else [self._test_judges(test)]
        self._check_r2()

    def _draw_folds(self, folds: int) -> NDArray[np.intp]:
        """(n,) the fold of each row: the rows of a class, in random order, are dealt in turn."""
        folds = count(folds, "folds", 2, self.n, "every fold has a row")
        chance = np.random.default_rng(self._seed).permutation(self.n)
        found = np.empty(self.n, np.intp)
        found[np.lexsort((chance, self.codes))] = np.arange(self.n) % folds
        return found

    def _fold_judges(self) -> list[_Judges]:
        assert self._folds is not None
        judges: list[_Judges] = []
        for fold in range(self._folds.max() + 1):
            rows = np.flatnonzero(self._folds == fold)
            x, y = take(self._x, rows), self._y[rows]
            judges.append(_Judges(self._folds != fold, x, y, self.codes[rows]))
        return judges

    def _test_judges(self, test: tuple[Any, Any]) -> _Judges:
        x, y = rows_of(test, "test")
        check_columns(self._x, x)
        check_shapes(self._x, x)
        if self._task == "regression" or self._is_function:
            y = numbers_of(y)
            if not self._is_function:
                task_of(y, "regression")
            return _Judges(None, x, y, np.zeros(len(y), np.intp))
        place = {label: code for code, label in enumerate(self.classes.tolist())}
        codes = np.array([place.get(label, -1) for label in y.tolist()], np.intp)
        new = np.flatnonzero(codes < 0)
        if not len(new):
            return _Judges(None, x, self.classes[codes], codes)
        smoothed = isinstance(self._scoring, Scoring) and self._scoring.smoothed
        if smoothed or len(new) == len(y):
            raise ValueError(
                f"expected labels of test among the classes of train, "
                f"{', '.join(map(str, list(place)[:5]))}{', …' if len(place) > 5 else ''}; row "
                f"{new[0]} has {y[new[0]]!s} ({len(new)} of {len(y)} rows): leave them out"
                + (", or take scoring='accuracy', where they are never right" if smoothed else "")
            )
        return _Judges(None, x, np.asarray(y.tolist()) if y.dtype.kind == "O" else y, codes)

    def _check_r2(self) -> None:
        if self._scoring is regression_scores["r2"]:
            for judges in self._judges:
                check_r2(judges.y, "the test rows" if judges.allowed is None else "every fold")

    @cached_property
    def _digest(self) -> str | None:
        from upweight.valuation.fingerprints import digest

        tests = [(judges.x, judges.y) for judges in self._judges if judges.allowed is None]
        settings = (self._task, self._folds, self._min_rows, self._seed)
        rows = self._x, self._y, tests
        return digest("ModelUtility", REVISION, self._model, self._scored_by, *rows, *settings)

    @property
    def fingerprint(self) -> str | None:
        """Of estimator, scoring, rows, folds and seed; None if one of them has no digest."""
        return self._digest

    def evaluate(self, masks: NDArray[np.bool_]) -> Evaluated:
        """Set by set, one fit for each, or for each and fold."""
        with without_warnings_of_small_sets():
            return each(masks, self._utility)

    @property
    def task(self) -> str:
        """``"classification"``, ``"regression"``, or ``"function"`` where one is asked."""
        return "function" if self._is_function else self._task

    @property
    def test_codes(self) -> NDArray[np.intp]:
        """(m,) positions of the labels of the test rows in `classes`, −1 where it is not there.

        Without test rows, those of the training rows, fold by fold.
        """
        return np.concatenate([judges.codes for judges in self._judges])

    def right(self, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
        """(m,) which test rows, in the order of `test_codes`, a model of these rows gets right.

        Where there is no model (see Notes), the most frequent class of the set is predicted.
        """
        found: list[NDArray[np.bool_]] = []
        for judges in self._judges:
            some = rows if judges.allowed is None else rows[judges.allowed[rows]]
            counts = np.bincount(self.codes[some], minlength=len(self.classes))
            if np.count_nonzero(counts) > 1 and len(some) >= self._min_rows:
                found.append(self._right(self._fitted(some), own(judges.x), judges))
            else:
                found.append((judges.codes == counts.argmax()) & (judges.codes >= 0))
        return np.concatenate(found)

    def _right(self, model: Any, x: Any, judges: _Judges) -> NDArray[np.bool_]:
        labels = np.asarray(model.predict(x)).reshape(len(judges.codes))
        known = judges.codes >= 0
        right = np.zeros(len(known), np.bool_)
        right[known] = labels[known] == self.classes[judges.codes[known]]
        return right

    def _utility(self, rows: NDArray[np.intp]) -> float:
        scores = [self._judged(rows, judges) for judges in self._judges]
        return scores[0] if len(scores) == 1 else sum(scores) / len(scores)

    def _judged(self, rows: NDArray[np.intp], judges: _Judges) -> float:
        if judges.allowed is not None:
            rows = rows[judges.allowed[rows]]
        x = own(judges.x)
        if self._is_function:
            found = self._model(take(self._x, rows), self._y[rows], x, judges.y.copy())
        elif self._task == "classification":
            found = self._judged_classifier(rows, x, judges)
        else:
            found = self._judged_regressor(rows, x, judges)
        return float(found)

    def _fitted(self, rows: NDArray[np.intp]) -> Any:
        from sklearn.base import clone

        model: Any = clone(self._model)
        return model.fit(take(self._x, rows), self._y[rows])

    def _judged_classifier(self, rows: NDArray[np.intp], x: Any, judges: _Judges) -> Any:
        from upweight.valuation.stand_ins import AllClasses, ConstantClassifier, filled

        counts = np.bincount(self.codes[rows], minlength=len(self.classes))
        present, s = np.count_nonzero(counts), len(rows)
        model = self._fitted(rows) if present > 1 and s >= self._min_rows else None
        scoring = self._scoring
        if not isinstance(scoring, Scoring):
            if model is None:
                model = ConstantClassifier(self.classes, counts)
            elif present < len(self.classes):
                model = AllClasses(model, self.classes)
            return scoring(model, x, judges.y)
        if model is None:
            shares = np.tile(counts / max(s, 1), (len(judges.y), 1))
            return score_many(scoring.name, shares, judges.codes, s)
        if scoring.smoothed:
            proba = filled(model.predict_proba(x), model, self.classes)
            return scoring.function(laplace(proba, s), judges.codes)
        right = self._right(model, x, judges)
        return np.count_nonzero(right) / len(right)

    def _judged_regressor(self, rows: NDArray[np.intp], x: Any, judges: _Judges) -> Any:
        from upweight.valuation.stand_ins import ConstantRegressor

        if len(rows) >= self._min_rows:
            model = self._fitted(rows)
        else:
            model = ConstantRegressor(float((self._y[rows] if len(rows) else self._y).mean()))
        if not isinstance(self._scoring, Scoring):
            return self._scoring(model, x, judges.y)
        # Networks give (m, 1), which would be compared with (m,) as (m, m).
        predicted = np.asarray(model.predict(x), np.float64).reshape(len(judges.y))
        return self._scoring.function(predicted, judges.y.astype(np.float64))


def without_warnings_of_small_sets() -> AbstractContextManager[None]:
    """Context without the warnings that scikit-learn has for sets of few rows."""
    return quiet(_of_small_sets)


def _of_small_sets() -> None:
    from sklearn.exceptions import ConvergenceWarning, FitFailedWarning, UndefinedMetricWarning

    for category in (ConvergenceWarning, FitFailedWarning, UndefinedMetricWarning):
        warnings.simplefilter("ignore", category)
    small = r"sklearn\.(metrics|model_selection)\."
    warnings.filterwarnings("ignore", category=UserWarning, module=small)
