"""What a model's utility is given, checked before any fit: rows, task, estimator, scoring."""

from __future__ import annotations

from difflib import get_close_matches
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.checks import Task, check_pair, targets, task_of
from upweight.valuation.scoring import classification_scores, get_scoring, regression_scores

__all__ = [
    "check_shapes",
    "index_of",
    "is_function",
    "make_scoring",
    "numbers_of",
    "own",
    "rows_of",
    "seeded",
    "take",
    "task_for",
]


def rows_of(pair: Any, name: str) -> tuple[Any, NDArray[Any]]:
    """x and y of a pair: as many of one as of the other, at least one, no y missing."""
    from scipy import sparse
    from sklearn.utils.validation import _num_samples  # pyright: ignore[reportPrivateUsage]

    check_pair(pair, name)
    x, y = pair
    try:
        rows = _num_samples(x)
    except TypeError as error:
        raise ValueError(f"expected x of {name} with one entry per row: {error}") from None
    if not rows:
        raise ValueError(f"expected rows in {name}; it has none")
    if sparse.issparse(x):
        x = sparse.csr_array(x) if isinstance(x, sparse.sparray) else sparse.csr_matrix(x)
    return x, targets(y, rows, f"y of {name}")


def index_of(train: tuple[Any, Any]) -> Any:
    """Names of rows that x has, or None."""
    import pandas as pd

    return train[0].index if isinstance(train[0], pd.DataFrame | pd.Series) else None


def take(x: Any, rows: NDArray[np.intp]) -> Any:
    """Some rows of x, whatever it is."""
    if isinstance(x, np.ndarray):
        return x[rows]
    from sklearn.utils import _safe_indexing  # pyright: ignore[reportPrivateUsage]

    return _safe_indexing(x, rows)


def own(x: Any) -> Any:
    """A copy, because StandardScaler(copy=False) and its like write to the rows they are given."""
    return x.copy() if hasattr(x, "shape") and hasattr(x, "copy") else x


def check_shapes(x: Any, x_test: Any) -> None:
    """A ValueError where a row of both has another shape."""
    ours, theirs = (
        tuple(some.shape[1:]) if hasattr(some, "shape") else None for some in (x, x_test)
    )
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(f"expected the shape per row of train in test, {ours}; got {theirs}")


def is_function(estimator: Any, scoring: Any, min_rows: int) -> bool:
    """Whether there is no estimator but a function, which takes neither scoring nor min_rows."""
    if isinstance(estimator, type):
        raise ValueError(f"expected an estimator; got the class {estimator.__name__}: call it")
    if hasattr(estimator, "fit"):
        return False
    if not callable(estimator):
        raise ValueError(
            "expected an estimator with fit, or a function (x_train, y_train, x_test, y_test) -> "
            f"float; got {type(estimator).__name__}"
        )
    if scoring is not None or min_rows != 1:
        raise ValueError(
            "expected neither scoring nor min_rows with a function: it gives the score of every "
            "set itself"
        )
    return True


def task_for(estimator: Any, y: NDArray[Any]) -> Task:
    """What the estimator is for; what y looks like, if it does not tell, or is None."""
    from sklearn.base import is_classifier, is_regressor

    task: Task | None = None
    if estimator is not None:
        try:
            classifies, regresses = is_classifier(estimator), is_regressor(estimator)
        except AttributeError:  # without the tags that scikit-learn 1.7 wants
            classifies = regresses = False
        task = "classification" if classifies else "regression" if regresses else None
    if task != "classification":
        return task_of(numbers_of(y), task)
    if task_of(y, None) == "regression":
        raise ValueError(
            f"expected labels for {type(estimator).__name__}; got numbers that are not all whole, "
            f"such as {y[np.flatnonzero(y != np.round(y))[0]]}: take a regressor, or make classes "
            "of them"
        )
    return task


def numbers_of(y: NDArray[Any]) -> NDArray[Any]:
    """Objects that are all numbers as float64; anything else as it is."""
    if y.dtype.kind == "O" and all(isinstance(value, Real) for value in y.tolist()):
        return y.astype(np.float64)
    return y


def seeded(estimator: Any, seed: int) -> Any:
    """A clone in which every random_state=None is a number."""
    from sklearn.base import clone

    try:
        model: Any = clone(estimator)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"expected an estimator that scikit-learn can clone; {type(estimator).__name__} cannot "
            f"be: {error}"
        ) from error
    settings: dict[str, Any] = model.get_params(deep=True)
    numbers = np.random.default_rng(seed)
    for name in sorted(settings):
        value = settings[name]
        if name.rpartition("__")[2] == "random_state":
            if _is_open(value, name):
                model.set_params(**{name: int(numbers.integers(2**31))})
            continue
        # Such as KFold(shuffle=True): no estimator, but the clone has its own copy.
        splits = not hasattr(value, "get_params") and hasattr(value, "random_state")
        if splits and _is_open(value.random_state, f"{name}.random_state"):
            value.random_state = int(numbers.integers(2**31))
    return model


def _is_open(value: Any, name: str) -> bool:
    if isinstance(value, np.random.RandomState | np.random.Generator):
        raise ValueError(
            f"expected {name} as a whole number or None; got a {type(value).__name__}, which is "
            "somewhere else after every fit: give a number"
        )
    return value is None


def make_scoring(scoring: Any, task: Task, estimator: Any) -> Any:
    """One of our scores, or a function of a fitted estimator and rows."""
    from sklearn.metrics import get_scorer, get_scorer_names

    ours = {**classification_scores, **regression_scores}
    probable = hasattr(estimator, "predict_proba")
    if scoring is None and task == "classification":
        scoring = "log_likelihood" if probable else "accuracy"
    elif scoring is None:
        scoring = "neg_mean_squared_error"
    if isinstance(scoring, str) and scoring in ours:
        found = get_scoring(scoring, task)
        if found.smoothed and not probable:
            raise ValueError(
                f"expected an estimator with predict_proba for {scoring}; "
                f"{type(estimator).__name__} has none: take scoring='accuracy'"
            )
        return found
    if isinstance(scoring, str) and scoring in get_scorer_names():
        return get_scorer(scoring)
    if callable(scoring):
        return scoring
    near = get_close_matches(str(scoring), [*ours, *get_scorer_names()], 1)
    raise ValueError(
        f"expected scoring {', '.join(ours)}, a name in sklearn.metrics.get_scorer_names(), or a "
        f"function of estimator, x and y; got {scoring!r}"
        + (f": did you mean {near[0]!r}?" if near else "")
    )
