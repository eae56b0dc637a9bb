"""Data-OOB against scikit-learn's own out-of-bag predictions, and against trees one by one."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_digits, load_iris, load_wine
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.metrics import roc_auc_score

from upweight.valuation import oob_judge

NAMES = {
    "from 0": np.array([0, 1, 2]),
    "from 1": np.array([1, 2, 3]),
    "floats": np.array([-1.0, 2.0, 7.0]),
    "text": np.array(["setosa", "versicolor", "virginica"]),
    "objects": np.array(["setosa", "versicolor", "virginica"], dtype=object),
    "booleans": np.array([False, True, True]),
}


def fitted(kind, x, y, trees=60, **options):
    forest = kind(trees, bootstrap=True, oob_score=True, random_state=0, **options)
    return forest.fit(x, y)


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("kind", [RandomForestClassifier, ExtraTreesClassifier])
@pytest.mark.parametrize("max_samples", [None, 0.5, 40])
def test_equals_scikit_learn(names, kind, max_samples):
    x, y = load_iris(return_X_y=True)
    labels = names[y]
    forest = fitted(kind, x, labels, max_samples=max_samples, min_samples_leaf=3)
    judged = oob_judge(forest, x, labels)
    np.testing.assert_allclose(judged.proba, forest.oob_decision_function_, rtol=1e-12)
    np.testing.assert_array_equal(judged.classes, forest.classes_)
    codes = np.searchsorted(forest.classes_, labels)
    given = forest.oob_decision_function_[np.arange(150), codes]
    np.testing.assert_allclose(judged.values, given, rtol=1e-12)
    assert judged.prediction is None
    unseen = [~np.isin(np.arange(150), drawn) for drawn in forest.estimators_samples_]
    np.testing.assert_array_equal(judged.counts, np.sum(unseen, axis=0))


@pytest.mark.parametrize("kind", [RandomForestRegressor, ExtraTreesRegressor])
def test_equals_scikit_learn_in_regression(kind):
    x, y = load_diabetes(return_X_y=True)
    forest = fitted(kind, x, y)
    judged = oob_judge(forest, x, y)
    np.testing.assert_allclose(judged.prediction, forest.oob_prediction_, rtol=1e-12)
    assert judged.proba is None
    assert judged.classes is None
    residuals = y - forest.oob_prediction_
    scale = np.median(np.abs(residuals)) / 0.67448975
    np.testing.assert_allclose(judged.values, -((residuals / scale) ** 2), rtol=1e-5)


def test_weights_of_a_forest_are_no_hindrance():
    x, y = load_iris(return_X_y=True)
    forest = fitted(RandomForestClassifier, x, y, class_weight="balanced_subsample")
    np.testing.assert_allclose(oob_judge(forest, x, y).proba, forest.oob_decision_function_)


@pytest.mark.parametrize("names", [NAMES["from 1"], NAMES["text"]], ids=["from 1", "text"])
def test_hard_vote_tree_by_tree(names):
    x, y = load_wine(return_X_y=True)
    labels = names[y]
    forest = fitted(RandomForestClassifier, x, labels, trees=30, max_depth=2)
    hits, counts = np.zeros(178), np.zeros(178)
    for tree, drawn in zip(forest.estimators_, forest.estimators_samples_, strict=True):
        for row in set(range(178)) - set(drawn.tolist()):
            hits[row] += names[int(tree.predict(x[[row]])[0])] == labels[row]
            counts[row] += 1
    judged = oob_judge(forest, x, labels, soft=False)
    np.testing.assert_allclose(judged.values, hits / counts)
    soft = oob_judge(forest, x, labels)
    np.testing.assert_array_equal(soft.proba, judged.proba)
    assert (soft.values != judged.values).any()


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("max_rows", [20, 500])
@pytest.mark.slow
def test_threads_groups_and_chunks_change_nothing(task, max_rows, monkeypatch):
    x, y = load_wine(return_X_y=True)
    y = y if task == "classification" else x.sum(axis=1)
    options = {"trees": 40, "max_rows": max_rows, "seed": 4, "task": task}
    first = oob_judge(None, x, y, **options)
    np.testing.assert_array_equal(oob_judge(None, x, y, n_jobs=3, **options).values, first.values)
    monkeypatch.setattr("upweight.valuation.forests.GROUP_BYTES", 1)
    monkeypatch.setattr("upweight.valuation.oob.CHUNK", 50)
    np.testing.assert_array_equal(oob_judge(None, x, y, n_jobs=2, **options).values, first.values)
    other = oob_judge(None, x, y, **{**options, "seed": 5})
    assert (other.values != first.values).any()


def test_no_tree_judges_what_it_has_seen():
    rng = np.random.default_rng(0)  # nothing to learn, but pure leaves know every row they saw
    x, y = rng.normal(size=(600, 5)), rng.integers(0, 2, 600)
    for options in ({}, {"max_rows": 300, "min_samples_leaf": 1}):
        judged = oob_judge(None, x, y, trees=100, **options)
        assert abs(judged.values.mean() - 0.5) < 0.05
    forest = fitted(ExtraTreesClassifier, x, y, trees=100)
    assert forest.score(x, y) == 1
    assert abs(oob_judge(forest, x, y).values.mean() - 0.5) < 0.05


def test_share_of_trees_that_have_not_seen_a_row():
    x, y = load_digits(return_X_y=True)
    judged = oob_judge(None, x, y, trees=100)
    assert judged.counts.mean() == pytest.approx(100 * np.exp(-1), rel=0.02)
    judged = oob_judge(None, x, y, trees=100, max_rows=180)
    assert judged.counts.mean() == pytest.approx(100 * np.exp(-180 / 1797), rel=0.02)


def flipped(y, seed):
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(len(y)) < round(0.1 * len(y))
    classes = y.max() + 1
    return np.where(wrong, (y + rng.integers(1, classes, len(y))) % classes, y), wrong


# Measured, mean of ten seeds, soft: 0.999 digits, 0.998 wine, 0.994 iris.
@pytest.mark.parametrize(
    ("load", "area"), [(load_digits, 0.997), (load_wine, 0.995), (load_iris, 0.99)]
)
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.slow
def test_finds_flipped_labels(load, area, soft):
    x, y = load(return_X_y=True)
    areas, proposed = [], []
    for seed in range(3):
        labels, wrong = flipped(y, seed)
        judged = oob_judge(None, x, labels, trees=100, soft=soft, seed=seed)
        areas.append(roc_auc_score(wrong, -judged.values))
        proposed.append((judged.proba.argmax(axis=1) == y)[wrong].mean())
    assert np.mean(areas) >= area
    assert np.mean(proposed) >= 0.9


def test_finds_a_wrong_number():
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (300, 2))
    y = 100 + x[:, 0] ** 2 + 0.1 * rng.normal(size=300)
    wrong = rng.permutation(300) < 20
    y[wrong] += rng.choice([-3, 3], 20)
    judged = oob_judge(None, x, y, trees=100)
    assert roc_auc_score(wrong, -judged.values) > 0.99
    assert (judged.values[wrong] < -9).mean() > 0.9
    changed = oob_judge(None, x, 5 * y - 7, trees=100)
    np.testing.assert_allclose(changed.prediction, 5 * judged.prediction - 7, rtol=0.01)


def test_residuals_that_are_mostly_zero():
    y = np.zeros(60)
    y[:3] = 5.5
    judged = oob_judge(None, np.arange(60.0)[:, None] // 10, y, trees=50)
    assert np.isfinite(judged.values).all()
    assert judged.values[:3].max() < judged.values[20:].min() == 0


def test_a_class_that_many_trees_have_not_seen():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    y = np.where(x[:, 0] > 0, "b", "c")
    y[7], x[7] = "a", 9
    judged = oob_judge(None, x, y, trees=80)
    np.testing.assert_allclose(judged.proba.sum(axis=1), 1)
    assert judged.proba[7, 0] == judged.values[7] == 0  # who knows class a has seen row 7
    assert (np.delete(judged.values, 7) > 0.5).mean() > 0.9


def test_balanced_classes_are_not_outvoted():
    rng = np.random.default_rng(0)
    y = (np.arange(1000) < 50).astype(int)
    x = rng.normal(size=(1000, 4)) + y[:, None]
    options = {"trees": 60, "min_samples_leaf": 20}
    plain = oob_judge(None, x, y, **options)
    balanced = oob_judge(None, x, y, class_weight="balanced", **options)
    assert balanced.values[y == 1].mean() > plain.values[y == 1].mean() + 0.2
    by_label = oob_judge(None, x, y, class_weight={0: 1000 / 1900, 1: 10}, **options)
    np.testing.assert_allclose(by_label.values, balanced.values)


def test_a_row_that_every_tree_has_seen_has_no_value():
    x, y = load_iris(return_X_y=True)
    with pytest.warns(UserWarning, match="of 150 rows were out of bag for no tree"):
        judged = oob_judge(None, x, y, trees=1)
    np.testing.assert_array_equal(np.isnan(judged.values), judged.counts == 0)
    np.testing.assert_array_equal(np.isnan(judged.proba).any(axis=1), judged.counts == 0)
    with pytest.warns(UserWarning, match="grow more trees"):
        judged = oob_judge(None, x, x.sum(axis=1), trees=1)
    np.testing.assert_array_equal(np.isnan(judged.values), judged.counts == 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oob_judge(None, x, y, trees=60)


X, Y = load_iris(return_X_y=True)
FOREST = RandomForestClassifier(5, random_state=0).fit(X, Y)


@pytest.mark.parametrize(
    ("forest", "x", "y", "options", "says"),
    [
        (None, np.where(X > 7, np.nan, X), Y, {}, "finite x; got nan"),
        (None, X * 1e38, Y, {}, "within float32"),
        (None, X, Y[1:], {}, r"y of shape \(150,\)"),
        (None, X, np.zeros(150), {}, "at least two classes"),
        (None, X, np.append(Y[1:], np.nan), {}, "no missing y; row 149"),
        (None, X, Y, {"trees": 0}, "trees at least 1"),
        (None, X, Y, {"max_rows": 1}, "max_rows at least 2"),
        (None, X, Y, {"min_samples_leaf": 0}, "min_samples_leaf at least 1"),
        (None, X, Y, {"n_jobs": 0}, "n_jobs"),
        (None, X, Y, {"class_weight": "balance"}, "'balanced' or a weight by label"),
        (None, X, Y, {"class_weight": {7: 1.0}}, "labels in y"),
        (None, X, Y, {"class_weight": {1: 0.0}}, "positive weights"),
        (None, X, X[:, 0], {"class_weight": "balanced"}, "no class_weight in a regression"),
        (None, X, Y.astype(str), {"task": "regression"}, "numbers for a regression"),
        (GradientBoostingClassifier(), X, Y, {}, "got GradientBoostingClassifier"),
        (RandomForestClassifier(), X, Y, {}, "call its fit first"),
        (ExtraTreesClassifier(2).fit(X, Y), X, Y, {}, "bootstrap=True"),
        (FOREST, X[1:], Y[1:], {}, r"fitted on; got x of \(149, 4\)"),
        (FOREST, X[:, 1:], Y, {}, r"fitted on; got x of \(150, 3\)"),
        (FOREST, X, Y, {"task": "regression"}, "a forest for regression"),
        (FOREST, X, Y + 1, {}, "among the classes 0, 1, 2; row 100 has 3"),
        (RandomForestClassifier(2).fit(X, np.c_[Y, Y]), X, Y, {}, "2 target"),
    ],
)
def test_bad_input_is_refused(forest, x, y, options, says):
    with pytest.raises(ValueError, match=says):
        oob_judge(forest, x, y, **options)
