"""Trees with the rows that they have seen: grown here, or those of a fitted forest."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.valuation.checks import Task
from upweight.valuation.parallel import in_order
from upweight.valuation.quiet import quiet

__all__ = ["Growth", "Tree", "class_weights", "fitted_trees", "grow", "task_of_forest"]

GROUP_BYTES = 2**28  # of trees and their masks that are held at a time, roughly


@dataclass(frozen=True, eq=False)
class Tree:
    """A tree, the rows that it has seen, and the codes its columns stand for (None: 0, 1, …)."""

    tree: Any
    drawn: NDArray[Any]
    columns: NDArray[np.intp] | None = None

    def predict(self, x: NDArray[np.float32], width: int) -> NDArray[np.float64]:
        """(b, width) class probabilities, or numbers (b, 1)."""
        if not len(x):
            return np.empty((0, width))
        if not hasattr(self.tree, "classes_"):
            return self.tree.predict(x, check_input=False)[:, None]
        proba = self.tree.predict_proba(x, check_input=False)
        if self.columns is None:
            return proba
        full = np.zeros((len(x), width))
        full[:, self.columns] = proba
        return full


@dataclass(frozen=True, eq=False)
class Growth:
    """How `grow` grows: rows drawn for a tree, rows in a leaf, weights of the classes, a seed."""

    trees: int
    rows: int
    leaf: int
    weights: NDArray[np.float64] | None
    seed: int


def grow(
    how: Growth, x: NDArray[np.float32], y: NDArray[Any], width: int, *, n_jobs: int
) -> Iterator[list[Tree]]:
    """Extremely randomised trees on bootstrap samples, a group of them at a time.

    Parameters
    ----------
    how
        See `Growth`.
    x, y
        (n, d) features and (n,) codes of classes, or numbers.
    width
        How many classes there are; 0 in regression.
    n_jobs
        Threads. Tree number t depends on the seed and t alone.
    """
    from sklearn.tree import ExtraTreeClassifier, ExtraTreeRegressor

    def one(number: int) -> Tree:
        rng = np.random.default_rng([how.seed, number])
        drawn, times = np.unique(rng.integers(0, len(x), how.rows), return_counts=True)
        weight = times.astype(np.float64)
        if how.weights is not None:
            weight *= how.weights[y[drawn]]
        options: Any = {"min_samples_leaf": how.leaf, "random_state": int(rng.integers(2**31))}
        tree: Any = (
            ExtraTreeClassifier(max_features="sqrt", **options)
            if width
            else ExtraTreeRegressor(max_features=1.0, **options)
        )
        tree.fit(x[drawn], y[drawn].astype(np.float64), weight, check_input=False)
        if not width or len(tree.classes_) == width:
            return Tree(tree, drawn)
        return Tree(tree, drawn, np.asarray(tree.classes_).astype(np.intp))

    node = 64 + 8 * max(1, width)
    size = max(1, min(64, GROUP_BYTES // (len(x) + 2 * node * max(1, how.rows // how.leaf))))
    for start in range(0, how.trees, size):
        stop = min(start + size, how.trees)
        calls: Iterator[Callable[[], Tree]] = (
            lambda number=number: one(number) for number in range(start, stop)
        )
        with quiet(_of_many_classes):
            group = list(in_order(calls, n_jobs))
        yield group


def _of_many_classes() -> None:
    # A bootstrap sample of a small table may well have nearly as many classes as rows.
    warnings.filterwarnings("ignore", message="The number of unique classes")


def fitted_trees(forest: Any, n: int) -> Iterator[list[Tree]]:
    """The trees of a forest fitted on n rows, with these, a group at a time."""
    size = max(1, min(64, GROUP_BYTES // (8 * n)))
    for start in range(0, len(forest.estimators_), size):
        # `estimators_samples_` draws the samples of all trees again: ask for few of them.
        few = copy.copy(forest)
        few.estimators_ = forest.estimators_[start : start + size]
        pairs = zip(few.estimators_, few.estimators_samples_, strict=True)
        yield [Tree(tree, drawn) for tree, drawn in pairs]


def task_of_forest(forest: Any, task: Task | None, rows: int, columns: int) -> Task:
    """What a forest was fitted for; a ValueError if it has not left out some of these rows."""
    from sklearn.ensemble import (
        ExtraTreesClassifier,
        ExtraTreesRegressor,
        RandomForestClassifier,
        RandomForestRegressor,
    )

    what = type(forest).__name__
    classifier = isinstance(forest, (ExtraTreesClassifier, RandomForestClassifier))
    if not classifier and not isinstance(forest, (ExtraTreesRegressor, RandomForestRegressor)):
        raise ValueError(
            f"expected a random forest or extra-trees model of scikit-learn, or None; got {what}"
        )
    kind: Task = "classification" if classifier else "regression"
    if task not in (None, kind):
        raise ValueError(f"expected a forest for {task}; got {what}")
    known: Any = vars(forest)
    if "estimators_" not in known:
        raise ValueError(f"expected a fitted forest; this {what} is not: call its fit first")
    if not known["bootstrap"]:
        raise ValueError(
            f"expected a forest with bootstrap samples; this {what} has none, so that every tree "
            "has seen every row: fit it with bootstrap=True"
        )
    fitted = known.get("_n_samples", rows), known["n_features_in_"]
    if fitted != (rows, columns) or known["n_outputs_"] != 1:
        raise ValueError(
            f"expected the rows and the single target that the forest was fitted on; got x of "
            f"{(rows, columns)}, and it was fitted on {fitted} and {known['n_outputs_']} target(s)"
        )
    return kind


def class_weights(
    given: Any, codes: NDArray[Any], classes: NDArray[Any] | None
) -> NDArray[np.float64] | None:
    """A weight for each class, with the meaning of scikit-learn's ``class_weight``."""
    if given is None:
        return None
    if classes is None:
        raise ValueError("expected no class_weight in a regression")
    if isinstance(given, str) and given == "balanced":
        return len(codes) / (len(classes) * np.bincount(codes))
    if not isinstance(given, Mapping):
        raise ValueError(
            f"expected class_weight None, 'balanced' or a weight by label; got {given!r}"
        )
    by_label: Any = given
    unknown = set(by_label) - set(classes.tolist())
    weights = np.array([float(by_label.get(label, 1)) for label in classes.tolist()])
    if unknown or not (np.isfinite(weights) & (weights > 0)).all():
        raise ValueError(
            f"expected positive weights of labels in y; got {dict(by_label)!r} for the classes "
            f"{classes.tolist()}"
        )
    return weights
