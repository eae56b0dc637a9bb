"""Rows judged by the trees that have not seen them: Data-OOB."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upweight.frames import users_frame
from upweight.valuation.checks import (
    Task,
    check_order,
    codes_in,
    count,
    encode,
    features,
    targets,
    task_of,
)
from upweight.valuation.forests import (
    Growth,
    Tree,
    class_weights,
    fitted_trees,
    grow,
    task_of_forest,
)
from upweight.valuation.parallel import in_order, workers
from upweight.valuation.utility import row_names
from upweight.valuation.values import Values

__all__ = ["OutOfBag", "data_oob", "oob_judge"]

MAX_ROWS = 50_000
LEAF, LEAF_OF_MANY = 2, 5
CHUNK = 2**15  # rows that a thread predicts at a time


@dataclass(frozen=True, eq=False)
class OutOfBag:
    """What the trees of a forest say of the rows that they have not seen, from `oob_judge`.

    Attributes
    ----------
    values
        (n,) low where a row is probably wrong: in [0, 1] in classification, at most 0 in
        regression; NaN for a row that every tree has seen.
    errors
        (n,) their standard errors: what the number of trees leaves open.
    counts
        (n,) how many trees have not seen the row.
    proba
        (n, C) mean over these of the predicted class probabilities; None in regression.
    classes
        (C,) the sorted labels that the columns stand for; None in regression.
    prediction
        (n,) mean over these of the predicted number; None in classification.
    """

    values: NDArray[np.float64]
    errors: NDArray[np.float64]
    counts: NDArray[np.int32]
    proba: NDArray[np.float64] | None = None
    classes: NDArray[Any] | None = None
    prediction: NDArray[np.float64] | None = None


def oob_judge(
    forest: Any,
    x: ArrayLike,
    y: ArrayLike,
    *,
    soft: bool = True,
    trees: int = 300,
    task: Task | None = None,
    max_rows: int = MAX_ROWS,
    min_samples_leaf: int | None = None,
    class_weight: Literal["balanced"] | Mapping[Any, float] | None = None,
    seed: int = 0,
    n_jobs: int = 1,
) -> OutOfBag:
    """What the trees that have not seen a row say of it: values, probabilities, predictions.

    With T_i the trees of a forest whose bootstrap sample does not contain row i, ::

        soft         v_i = mean over t in T_i of p_t(y_i | x_i)
        hard         v_i = mean over t in T_i of [argmax_c p_t(c | x_i) = y_i]
        regression   v_i = −((y_i − ŷ_i) / s)²,   ŷ_i = mean over t in T_i of t(x_i)

    where ``s = 1.4826 median_i |y_i − ŷ_i|`` is the standard deviation of the residuals if they are
    normal, so that v = −9 is three of them.

    Parameters
    ----------
    forest
        A fitted random forest or extra-trees model of scikit-learn with ``bootstrap=True``; then
        x and y are the rows that it was fitted on, in that order, and only `soft` and `n_jobs`
        matter. None: extremely randomised trees are grown here, and dropped as soon as they have
        judged, so that there is never a whole forest in memory.
    x
        (n, d) features.
    y
        (n,) labels of any type that can be sorted, or numbers.
    soft
        False for the hard vote; the same with pure leaves (``min_samples_leaf=1``).
    trees, seed
        How many trees to grow, and from which seed. A row is out of bag for about 37 % of them.
    task
        ``"classification"`` or ``"regression"``. Default: that of the forest; without one,
        regression if y are numbers that are not all whole.
    max_rows
        Rows that are drawn for a tree, with replacement, at most; default 50,000. In a much larger
        table a row is out of bag for nearly all trees.
    min_samples_leaf
        Rows in a leaf, at least. Default: 2, which finds wrong labels as well as pure leaves do
        where classes are apart, and better where they overlap; and 5 in a table of more than
        `max_rows` rows, where it is also faster.
    class_weight
        Weights of the classes as in scikit-learn: ``"balanced"`` makes rare classes count as much
        as common ones, where a rare class would otherwise be outvoted everywhere.
    n_jobs
        Threads, -1 for all cores. It does not change the result.

    Returns
    -------
    OutOfBag

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, a label is missing, there is one class only,
        the forest is not fitted, has no bootstrap samples, or was fitted on other rows or columns,
        or the indexes of x and y have the same names in different orders.

    Warns
    -----
    UserWarning
        If a row was out of bag for no tree, and its value is NaN. All of B trees have seen a row
        with probability 0.63^B.

    Notes
    -----
    The probabilities equal ``oob_decision_function_`` of the same forest, and take 8 n C bytes.
    Beside them and x in float32, memory does not grow with the number of trees.

    References
    ----------
    Kwon & Zou, Data-OOB: out-of-bag estimate as a simple and efficient data value, ICML 2023.
    Geurts, Ernst & Wehenkel, Extremely randomized trees, Machine Learning 2006.

    Examples
    --------
    >>> x = np.arange(40.0)[:, None]
    >>> y = np.where(np.arange(40) < 20, "low", "high")
    >>> y[5] = "high"
    >>> judged = oob_judge(None, x, y, trees=50)
    >>> int(judged.values.argmin()), str(judged.classes[judged.proba[5].argmax()])
    (5, 'low')
    """
    check_order(x, y)
    _check_names(forest, x)
    table = _single(features(x))
    given = targets(y, len(table))
    workers(n_jobs)
    if forest is not None:
        task = task_of_forest(forest, task, len(table), table.shape[1])
        classes = forest.classes_ if task == "classification" else None
        codes = given if classes is None else codes_in(classes, given)
        groups = fitted_trees(forest, len(table))
    else:
        codes, classes = given, None
        if task_of(given, task) == "classification":
            encoded = encode(given)
            codes, classes = encoded.codes, encoded.classes
        n, most = len(table), count(max_rows, "max_rows", 2)
        leaf = LEAF if n <= most else LEAF_OF_MANY
        leaf = leaf if min_samples_leaf is None else count(min_samples_leaf, "min_samples_leaf", 1)
        how = Growth(
            count(trees, "trees", 1),
            min(n, most),
            leaf,
            class_weights(class_weight, codes, classes),
            count(seed, "seed", 0),
        )
        groups = grow(how, table, codes, 0 if classes is None else len(classes), n_jobs=n_jobs)
    if classes is None:
        codes = codes.astype(np.float64)
    sums = _Sums(table, codes, classes, soft)
    for group in groups:
        sums.add(group, n_jobs)
    return sums.judge()


class OutOfBagOptions(TypedDict, total=False):
    """Keyword arguments of `oob_judge` that `data_oob` hands on to it."""

    soft: bool
    trees: int
    task: Task | None
    max_rows: int
    min_samples_leaf: int | None
    class_weight: Literal["balanced"] | Mapping[Any, float] | None
    seed: int
    n_jobs: int


def _check_names(forest: Any, x: Any) -> None:
    """A ValueError where the forest knows the columns of x by other names, or in another order."""
    known, given = getattr(forest, "feature_names_in_", None), getattr(x, "columns", None)
    if known is not None and given is not None and list(known) != list(given):
        raise ValueError(
            f"expected the columns that the forest was fitted on, {list(known)}; got {list(given)}"
        )


def data_oob(
    forest: Any,
    x: ArrayLike,
    y: ArrayLike,
    *,
    names: Any = None,
    **options: Unpack[OutOfBagOptions],
) -> Values:
    """Data-OOB: how far the trees that have not seen a row agree with its label.

    The mean, over the trees whose bootstrap sample lacks the row, of the probability that they give
    to its label; in regression, minus the squared residual in units of its spread. See `oob_judge`
    for the equations, and for probabilities and proposed labels.

    Parameters
    ----------
    forest, x, y
        A fitted forest with the rows it was fitted on; or None, to grow one here.
    names
        Of the rows. Default: the index of x, if it is a frame, or 0, …, n − 1.
    **options
        `soft`, `trees`, `task`, `max_rows`, `min_samples_leaf`, `class_weight`, `seed` and
        `n_jobs`, as in `oob_judge`.

    Returns
    -------
    Values
        With the standard errors that the number of trees leaves.

    Raises
    ------
    ValueError
        As in `oob_judge`.

    References
    ----------
    Kwon & Zou, Data-OOB: out-of-bag estimate as a simple and efficient data value, ICML 2023.

    Examples
    --------
    >>> x = np.arange(40.0)[:, None]
    >>> y = np.where(np.arange(40) < 20, "low", "high")
    >>> y[5] = "high"
    >>> data_oob(None, x, y, trees=50).top(1, harmful=True)["row"].tolist()
    [5]
    """
    called = row_names(names, len(features(x)), like=x)
    judged = oob_judge(forest, x, y, **options)
    told = {"method": "Data-OOB", **options, "forest": "grown here" if forest is None else "given"}
    weight = told.get("class_weight")
    if isinstance(weight, Mapping):
        told["class_weight"] = {str(label): float(w) for label, w in weight.items()}
    number = judged.classes is None
    meaning = (
        "the closer to 0 the better: minus the squared residual, in squares of its spread"
        if number
        else "high = trees that have not seen the row give its label, low = they give another one"
    )
    return Values(
        judged.values,
        judged.errors,
        judged.counts.astype(np.int64),
        called,
        told,
        stopped="closed form",
        meaning=meaning,
    )


class _Sums:
    """Sums over the out-of-bag trees of every row: predictions, hits of the hard vote, trees."""

    def __init__(
        self, x: NDArray[np.float32], y: NDArray[Any], classes: NDArray[Any] | None, soft: bool
    ) -> None:
        self.x, self.y, self.classes = x, y, classes
        self.predicted = np.zeros((len(x), 1 if classes is None else len(classes)))
        self.hits = None if soft or classes is None else np.zeros(len(x))
        self.squares = np.zeros(len(x))  # of what a value is the mean of, or of a prediction
        self.trees = np.zeros(len(x), np.int32)

    def add(self, group: list[Tree], n_jobs: int) -> None:
        """The trees of a group, in order, so that sums do not depend on the number of threads."""
        unseen = np.ones((len(group), len(self.x)), np.bool_)
        for mask, tree in zip(unseen, group, strict=True):
            mask[tree.drawn] = False
        calls = (
            lambda start=start: self._add(group, unseen, slice(start, start + CHUNK))
            for start in range(0, len(self.x), CHUNK)
        )
        for _ in in_order(calls, n_jobs):
            pass

    def _add(self, group: list[Tree], unseen: NDArray[np.bool_], chunk: slice) -> None:
        x, y, sums, trees = self.x[chunk], self.y[chunk], self.predicted[chunk], self.trees[chunk]
        for tree, mask in zip(group, unseen[:, chunk], strict=True):
            rows = np.flatnonzero(mask)
            predicted = tree.predict(x[rows], sums.shape[1])
            sums[rows] += predicted
            trees[rows] += 1
            if self.hits is not None:
                said = (predicted.argmax(axis=1) == y[rows]).astype(np.float64)
                self.hits[chunk][rows] += said
            elif self.classes is None:
                said = predicted[:, 0]
            else:
                said = predicted[np.arange(len(rows)), y[rows]]
            self.squares[chunk][rows] += said**2

    def judge(self) -> OutOfBag:
        """Means, and the values that follow from them."""
        never = int((self.trees == 0).sum())
        if never:
            warnings.warn(
                f"{never} of {len(self.x)} rows were out of bag for no tree, and have no value: "
                "grow more trees",
                stacklevel=users_frame(),
            )
        with np.errstate(invalid="ignore"):
            self.predicted /= self.trees[:, None]
            hard = None if self.hits is None else self.hits / self.trees
            squares = self.squares / self.trees
        if self.classes is None:
            prediction = self.predicted[:, 0]
            residuals = self.y - prediction
            spread = _spread(residuals)
            values = -((residuals / spread) ** 2)
            slope = 2 * np.abs(residuals) / spread**2
            errors = slope * self._error(squares, prediction)
            return OutOfBag(values, errors, self.trees, prediction=prediction)
        values = self.predicted[np.arange(len(self.y)), self.y] if hard is None else hard
        errors = self._error(squares, values)
        return OutOfBag(values, errors, self.trees, self.predicted, self.classes)

    def _error(
        self, squares: NDArray[np.float64], mean: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(n,) standard errors of means over trees; NaN where fewer than two tell of a row."""
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.sqrt(np.maximum(squares - mean**2, 0.0) / (self.trees - 1))
        return np.where(self.trees > 1, error, np.nan)


def _spread(residuals: NDArray[np.float64]) -> float:
    """A robust standard deviation around 0; from the mean size where most residuals are 0."""
    sizes = np.abs(residuals[np.isfinite(residuals)])
    if not len(sizes):
        return 1.0
    return float(1.4826 * np.median(sizes)) or float(1.2533 * sizes.mean()) or 1.0


def _single(x: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(x, dtype=np.float32)
    if not np.isfinite(single).all():
        row = int(np.flatnonzero(~np.isfinite(single).all(axis=1))[0])
        raise ValueError(
            f"expected x within float32, which trees compute in; row {row} is beyond: scale it"
        )
    return single
