"""Utilities of models on sets of rows, against loops that say the same in the plainest way."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.base import BaseEstimator, clone
from sklearn.datasets import load_iris
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, r2_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from skorch import NeuralNetClassifier

from upweight.valuation.cache import UtilityCache
from upweight.valuation.grouped import GroupedUtility
from upweight.valuation.model_utility import ModelUtility
from upweight.valuation.scoring import (
    classification_scores,
    get_scoring,
    laplace,
    log_likelihood,
    regression_scores,
    score_many,
)
from upweight.valuation.utility import FunctionUtility, UtilityError

X, Y = load_iris(return_X_y=True)
ORDER = np.random.default_rng(0).permutation(len(Y))
X, Y = X[ORDER].astype(np.float32), Y[ORDER].astype(np.int64)
TRAIN, TEST = (X[:20], Y[:20]), (X[60:90], Y[60:90])
Z = X.sum(axis=1)
NUMBERS = (X[:20, :2], Z[:20]), (X[60:90, :2], Z[60:90])
LR = LogisticRegression()
NO_ONE = np.zeros(20, bool)


class Linear(torch.nn.Module):
    """Softmax regression that begins at 0."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 3))

    def forward(self, x):
        return torch.softmax(x @ self.weight, 1)


def net():
    return NeuralNetClassifier(
        Linear, max_epochs=2, lr=0.1, train_split=None, iterator_train__shuffle=False, verbose=0
    )


def nearest(x, y, x_test, y_test):
    """The share of test rows whose nearest training row has their label."""
    if not len(x):
        return 0.0
    return np.mean(
        [y[((x - z) ** 2).sum(1).argmin()] == t for z, t in zip(x_test, y_test, strict=True)]
    )


def masks(n=20, sets=12, seed=1):
    rng = np.random.default_rng(seed)
    return rng.random((sets, n)) < rng.random((sets, 1))


def proba_of(model, x, classes):
    """All classes, column by column."""
    given = model.predict_proba(x)
    every = np.zeros((len(x), len(classes)))
    for column, label in enumerate(model.classes_):
        every[:, list(classes).index(label)] = given[:, column]
    return every


def slow_log_likelihood(estimator, train, test, classes):
    (x, y), (x_test, y_test) = train, test
    s, size = len(y), len(classes)
    if len(set(y)) > 1:
        proba = proba_of(clone(estimator).fit(x, y), x_test, classes)
    total = 0.0
    for i, label in enumerate(y_test):
        if len(set(y)) > 1:
            p = proba[i, list(classes).index(label)]
        else:
            p = sum(y == label) / s if s else 0.0
        total += np.log((s * p + 1) / (s + size))
    return total / len(y_test)


# ---------------------------------------------------------------------------------------- scores


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    proba, codes = rng.dirichlet(np.ones(3), 40), rng.integers(0, 3, 40)
    f, y = rng.normal(size=(2, 40))
    for name, theirs in (
        ("accuracy", accuracy_score(codes, proba.argmax(1))),
        ("log_likelihood", -log_loss(codes, proba)),
        ("brier", -brier_score_loss(codes, proba, scale_by_half=False)),
    ):
        assert score_many(name, proba, codes) == pytest.approx(theirs, abs=1e-14), name
    assert score_many("r2", f, y) == pytest.approx(r2_score(y, f), abs=1e-14)
    assert score_many("neg_mean_squared_error", f, y) == pytest.approx(-np.mean((f - y) ** 2))


@pytest.mark.parametrize("m", [1, 2, 9, 130])
@pytest.mark.parametrize("layout", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (2, 0, 1)], ids=str)
def test_a_model_has_the_same_score_alone_and_in_a_stack(m, layout):
    rng = np.random.default_rng(m)
    proba, rows = rng.dirichlet(np.ones(3), (7, m)), rng.integers(0, 4, 7)
    back = np.argsort(layout)
    stored = np.ascontiguousarray(proba.transpose(layout)).transpose(back)
    codes, y = rng.integers(0, 3, m), rng.normal(size=m)
    for name in classification_scores:
        for s in (None, rows):
            alone = [
                float(score_many(name, p, codes, None if s is None else s[i]))
                for i, p in enumerate(proba)
            ]
            np.testing.assert_array_equal(score_many(name, stored, codes, s), alone)
    for name in regression_scores:
        alone = [float(score_many(name, p, y)) for p in np.ascontiguousarray(proba[..., 0])]
        np.testing.assert_array_equal(score_many(name, stored[..., 0], y), alone)


def test_laplace_bounds_what_a_row_can_take_away():
    sure = np.array([[1.0, 0.0, 0.0]])
    for s in range(50):
        worst = log_likelihood(laplace(sure, s), np.array([2]))
        assert worst == pytest.approx(-np.log(s + 3))
        assert laplace(sure, s).sum() == pytest.approx(1)
    assert score_many("accuracy", sure, np.array([0]), 0) == 1 / 3


def test_scores_refuse_what_they_are_not_defined_for():
    proba = np.array([[0.5, 0.5]])
    for name in ("log_likelihood", "brier"):
        with pytest.raises(ValueError, match="codes of known classes; got -1"):
            score_many(name, proba, np.array([-1]))
    assert score_many("accuracy", proba, np.array([-1])) == 0
    assert np.isnan(score_many("accuracy", proba * np.nan, np.array([0])))
    assert np.isnan(score_many("r2", np.ones(3), np.ones(3)))
    with pytest.raises(ValueError, match="'accuracy', 'log_likelihood' or 'brier' for a class"):
        get_scoring("acuracy", "classification")


# ------------------------------------------------------------------------------------ estimators

ESTIMATORS = {
    "logistic": (LogisticRegression(), "log_likelihood"),
    "pipeline": (make_pipeline(StandardScaler(), LogisticRegression()), "log_likelihood"),
    "pipeline in place": (
        make_pipeline(StandardScaler(copy=False), LogisticRegression()),
        "log_likelihood",
    ),
    "svc": (SVC(), "accuracy"),
    "forest": (RandomForestClassifier(5), "log_likelihood"),
    "search": (
        GridSearchCV(KNeighborsClassifier(), {"n_neighbors": [1, 2]}, cv=2),
        "log_likelihood",
    ),
    "skorch": (net(), "log_likelihood"),
    "function": (nearest, None),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_set_has_one_utility_whatever_it_is_asked_with(name):
    u = ModelUtility(ESTIMATORS[name][0], TRAIN, TEST)
    asked = masks(sets=6)
    together = u.evaluate(asked)
    failed = np.isnan(together.values)
    assert set(np.flatnonzero(failed)) == set(together.errors)
    assert failed.sum() <= (2 if name == "search" else 0)  # classes of one row cannot be split
    other = pickle.loads(pickle.dumps(u))
    np.testing.assert_array_equal(other.evaluate(asked[::-1]).values[::-1], together.values)
    for mask, value in zip(asked[:2], together.values, strict=False):
        np.testing.assert_array_equal(u.evaluate(mask[None]).values, [value])
    assert len(set(together.values)) > 2


@pytest.mark.parametrize("name", ["logistic", "pipeline", "skorch"])
def test_log_likelihood_is_that_of_the_loop(name):
    estimator, scoring = ESTIMATORS[name]
    u = ModelUtility(estimator, TRAIN, TEST, scoring)
    default = ModelUtility(estimator, TRAIN, TEST)
    asked = [np.flatnonzero(mask) for mask in masks(sets=5)]
    if name == "skorch":  # has an output for every class, seen or not
        asked = [rows for rows in asked if len(set(Y[rows])) in (0, 1, 3)]
    assert len(asked) > 2
    for rows in asked:
        wanted = slow_log_likelihood(estimator, (X[:20][rows], Y[:20][rows]), TEST, [0, 1, 2])
        assert u(rows) == default(rows) == pytest.approx(wanted, rel=1e-6)


def test_accuracy_is_that_of_predict():
    u = ModelUtility(SVC(), TRAIN, TEST)
    for rows in (range(20), [0, 1, 2, 3, 4, 5]):
        model = SVC().fit(X[rows], Y[rows])
        assert u(rows) == accuracy_score(TEST[1], model.predict(TEST[0]))


@pytest.mark.parametrize("scoring", ["neg_mean_squared_error", "r2"])
def test_regression(scoring):
    (x, y), (x_test, y_test) = NUMBERS
    u = ModelUtility(Ridge(), *NUMBERS, scoring)
    score = regression_scores[scoring].function
    for rows in ([3], [1, 4, 9], range(20)):
        model = Ridge().fit(x[rows], y[rows])
        assert u(rows) == pytest.approx(score(model.predict(x_test), y_test.astype(float)))
    assert u([]) == pytest.approx(score(np.full(30, y.mean()), y_test))
    few = ModelUtility(Ridge(), *NUMBERS, scoring, min_rows=3)
    assert few([3, 4]) == pytest.approx(score(np.full(30, y[3:5].mean()), y_test))
    assert few([3, 4, 5]) == u([3, 4, 5])


def test_predictions_of_shape_m_1_are_numbers_for_rows():
    class Column(Ridge):
        def predict(self, x):
            return super().predict(x)[:, None]

    u = ModelUtility(Column(), *NUMBERS)
    assert u(range(20)) == ModelUtility(Ridge(), *NUMBERS)(range(20))


def test_too_few_neighbours_are_a_failure_or_a_prior():
    u = ModelUtility(KNeighborsClassifier(5), TRAIN, TEST)
    four, five = np.arange(20) < 4, np.arange(20) < 5
    found = u.evaluate(np.array([five, four, ~four]))
    assert list(found.errors) == [1]
    assert found.errors[1].startswith("ValueError: Expected n_neighbors <= n_samples_fit")
    assert np.isnan(found.values).tolist() == [False, True, False]
    with pytest.raises(UtilityError, match="n_neighbors"):
        u(range(4))
    patient = ModelUtility(KNeighborsClassifier(5), TRAIN, TEST, min_rows=5)
    assert patient(range(5)) == u(range(5))
    shares = (np.bincount(Y[:4], minlength=3) + 1) / 7
    assert patient(range(4)) == pytest.approx(np.log(shares[TEST[1]]).mean())


def test_a_score_that_is_nan_is_a_failure():
    u = ModelUtility(LogisticRegression(), TRAIN, TEST, lambda model, x, y: np.nan)
    found = u.evaluate(masks(sets=2))
    assert found.errors == {0: "gave nan", 1: "gave nan"}


# -------------------------------------------------------------------------------- degenerate sets


def test_sets_that_teach_no_model():
    one = np.flatnonzero(Y[:20] == 1)[:3]
    is_one, share = (TEST[1] == 1), np.mean(TEST[1] == 1)
    u = {
        name: ModelUtility(LogisticRegression(), TRAIN, TEST, name)
        for name in classification_scores
    }
    assert u["accuracy"]([]) == 1 / 3
    assert u["accuracy"](one) == share
    assert u["log_likelihood"]([]) == pytest.approx(-np.log(3))
    assert u["log_likelihood"](one) == pytest.approx(np.log(np.where(is_one, 4, 1) / 6).mean())
    assert u["brier"]([]) == pytest.approx(-2 / 3)
    p = np.array([1, 4, 1]) / 6
    assert u["brier"](one) == pytest.approx(
        -np.mean([sum((p - np.eye(3)[t]) ** 2) for t in TEST[1]])
    )
    log_loss_of = ModelUtility(LogisticRegression(), TRAIN, TEST, "neg_log_loss")
    assert log_loss_of([]) == pytest.approx(-np.log(3))
    assert log_loss_of(one) == pytest.approx(u["log_likelihood"](one))
    assert ModelUtility(LogisticRegression(), TRAIN, TEST, "f1_macro")(one) > 0


def test_classes_that_a_set_does_not_have():
    x, y = pd.DataFrame(X[:20], columns=list("abcd")), np.array(["s", "t", "u"])[Y[:20]]
    test = pd.DataFrame(TEST[0], columns=list("abcd")), np.array(["s", "t", "u"])[TEST[1]]
    rows = np.flatnonzero(y != "t")
    model = LogisticRegression().fit(x.iloc[rows], y[rows])
    given = proba_of(model, test[0], "stu")
    assert (given[:, 1] == 0).all()
    assert given[:, 2].max() > 0.5
    u = ModelUtility(LogisticRegression(), (x, y), test)
    s = len(rows)
    assert u(rows) == pytest.approx(np.log((s * given[range(30), TEST[1]] + 1) / (s + 3)).mean())
    theirs = ModelUtility(LogisticRegression(), (x, y), test, "roc_auc_ovr")
    assert theirs(rows) == pytest.approx(roc_auc_score(TEST[1], given, multi_class="ovr"))

    def seen(model, x, y):
        assert list(model.classes_) == ["s", "t", "u"]
        assert hasattr(model, "predict_proba") == isinstance(model, type(model))
        return model.predict_proba(x).sum() + model.score(x, y)

    own = ModelUtility(LogisticRegression(), (x, y), test, seen)
    score = model.score(test[0], test[1])
    assert own(rows) == pytest.approx(30 + score)
    assert own([]) == pytest.approx(30 + np.mean(test[1] == "s"))


def test_wrapped_models_have_no_probabilities_that_they_lack():
    def seen(model, x, y):
        return float(hasattr(model, "predict_proba"))

    two = np.flatnonzero(Y[:20] != 1)
    assert ModelUtility(SVC(), TRAIN, TEST, seen)(two) == 0
    assert ModelUtility(LogisticRegression(), TRAIN, TEST, seen)(two) == 1


def test_a_network_has_an_output_for_every_class():
    u = ModelUtility(net(), TRAIN, TEST)
    rows = np.flatnonzero(Y[:20] != 1)  # classes_ are 0 and 2, and there are three columns
    proba = net().fit(X[rows], Y[rows]).predict_proba(TEST[0]).astype(float)
    wanted = log_likelihood(laplace(proba, len(rows)), TEST[1])
    assert u(rows) == pytest.approx(wanted, abs=1e-7)


def test_test_labels_that_no_training_row_has():
    y_test = TEST[1].copy()
    u = ModelUtility(LogisticRegression(), TRAIN, (TEST[0], y_test), "accuracy")
    y_test = np.where(np.arange(30) < 10, 7, y_test)
    fewer = ModelUtility(LogisticRegression(), TRAIN, (TEST[0], y_test), "accuracy")
    model = LogisticRegression().fit(*TRAIN)
    assert fewer(range(20)) == np.mean(model.predict(TEST[0]) == y_test) < u(range(20))
    assert fewer([]) == pytest.approx(20 / 30 / 3)
    for scoring in ("log_likelihood", "brier"):
        with pytest.raises(ValueError, match=r"0, 1, 2; row 0 has 7 \(10 of 30 rows\).*accuracy"):
            ModelUtility(LogisticRegression(), TRAIN, (TEST[0], y_test), scoring)
    with pytest.raises(ValueError, match="30 of 30 rows"):
        ModelUtility(SVC(), TRAIN, (TEST[0], TEST[1].astype(str)))


# ----------------------------------------------------------------------------------- forms of data


@pytest.mark.parametrize(
    "names",
    [
        np.array([1, 2, 3]),
        np.array([-0.5, 1.0, 7.0]) * 2,
        np.array(["a", "bb", "c"]),
        np.array(["a", "bb", "c"], dtype=object),
        np.array([1, 2, 3], dtype=object),
    ],
    ids=str,
)
@pytest.mark.parametrize("scoring", ["log_likelihood", "accuracy", "neg_log_loss"])
def test_labels_of_any_type(names, scoring):
    plain = ModelUtility(LogisticRegression(), TRAIN, TEST, scoring)
    asked = np.vstack([masks(sets=3), NO_ONE, TRAIN[1] == 1])
    wanted = plain.evaluate(asked)
    assert not wanted.errors
    for form in (np.asarray, list, pd.Series, lambda y: pd.Series(y).astype("category")):
        y, y_test = form(names[TRAIN[1]]), form(names[TEST[1]])
        u = ModelUtility(LogisticRegression(), (TRAIN[0], y), (TEST[0], y_test), scoring)
        np.testing.assert_array_equal(u.evaluate(asked).values, wanted.values)


def test_two_classes_as_booleans():
    y, y_test = TRAIN[1] == 0, TEST[1] == 0
    asked = np.vstack([masks(sets=3), NO_ONE, y])
    wanted = ModelUtility(LogisticRegression(), (X[:20], y * 1), (TEST[0], y_test * 1), "roc_auc")
    for form in (np.asarray, list, lambda y: y.astype(object)):
        u = ModelUtility(
            LogisticRegression(), (X[:20], form(y)), (TEST[0], form(y_test)), "roc_auc"
        )
        np.testing.assert_array_equal(u.evaluate(asked).values, wanted.evaluate(asked).values)


@pytest.mark.parametrize(
    "form",
    [pd.DataFrame, lambda x: x.tolist(), sparse.coo_matrix, sparse.csc_array, np.asfortranarray],
    ids=["frame", "list", "coo", "csc array", "fortran"],
)
def test_rows_of_any_form(form):
    model = KNeighborsClassifier(1, algorithm="brute")
    plain = ModelUtility(model, TRAIN, TEST)
    u = ModelUtility(model, (form(X[:20]), Y[:20]), (form(TEST[0]), TEST[1]))
    asked = masks(sets=4)
    np.testing.assert_array_equal(u.evaluate(asked).values, plain.evaluate(asked).values)


def test_rows_of_test_are_not_written_to():
    before = TEST[0].copy()
    model, asked = make_pipeline(StandardScaler(copy=False), LogisticRegression()), masks(sets=4)
    u = ModelUtility(model, TRAIN, TEST)
    same = ModelUtility(make_pipeline(StandardScaler(), LogisticRegression()), TRAIN, TEST)
    np.testing.assert_array_equal(TEST[0], before)
    np.testing.assert_allclose(u.evaluate(asked).values, same.evaluate(asked).values, rtol=1e-6)
    np.testing.assert_array_equal(TEST[0], before)
    np.testing.assert_array_equal(TRAIN[0], X[:20])


def test_names():
    frame = pd.DataFrame(X[:20], index=[f"row {i}" for i in range(20)])
    assert ModelUtility(SVC(), (frame, Y[:20]), (frame, Y[:20])).names[3] == "row 3"
    named = ModelUtility(SVC(), (frame, Y[:20]), (frame, Y[:20]), names=range(100, 120))
    assert named.names.tolist() == list(range(100, 120))
    assert ModelUtility(SVC(), TRAIN, TEST).names.tolist() == list(range(20))
    twice = frame.set_axis([0, *range(19)], axis=0)
    with pytest.raises(ValueError, match="occurs more than once"):
        ModelUtility(SVC(), (twice, Y[:20]), (frame, Y[:20]))
    moved = pd.Series(Y[:20], index=frame.index)[::-1]
    with pytest.raises(ValueError, match=r"same order.*y\.loc\[x\.index\]"):
        ModelUtility(SVC(), (frame, moved), (frame, Y[:20]))


# ---------------------------------------------------------------------------------- cross-fitting


def test_cross_fitted_is_the_mean_over_folds_that_were_not_seen():
    n, classes = 40, [0, 1, 2]
    x, y = X[:n], Y[:n]
    seen: list[tuple[set[int], set[int]]] = []

    def record(x_train, y_train, x_test, y_test):
        seen.append((set(x_train[:, 0].tolist()), set(x_test[:, 0].tolist())))
        return 0.0

    ModelUtility(record, (np.arange(n)[:, None], y), folds=4, seed=3)(range(n))
    folds = [sorted(test) for _, test in seen]
    assert sorted(row for fold in folds for row in fold) == list(range(n))
    for train, test in seen:
        assert train == set(range(n)) - test
        for label in classes:  # equal shares
            assert abs(np.sum(y[list(test)] == label) - np.sum(y == label) / 4) < 1
    u = ModelUtility(LogisticRegression(), (x, y), folds=4, seed=3)
    for rows in (range(n), [0, 1, 2, 3, 4, 5, 6], [], [9]):
        scores = []
        for fold in folds:
            kept = [i for i in rows if i not in fold]
            args = (x[kept], y[kept]), (x[fold], y[fold])
            scores.append(slow_log_likelihood(LogisticRegression(), *args, classes))
        assert u(rows) == pytest.approx(np.mean(scores), rel=1e-6)
    other = ModelUtility(LogisticRegression(), (x, y), folds=4, seed=4)
    assert other(range(n)) != u(range(n))


def test_cross_fitted_regression():
    (x, y), _ = NUMBERS
    folds: list[list[int]] = []

    def record(x_train, y_train, x_test, y_test):
        folds.append(x_test[:, 0].tolist())
        return 0.0

    ModelUtility(record, (np.arange(20)[:, None], y), folds=3)(range(20))
    u = ModelUtility(Ridge(), (x, y), folds=3)
    for rows in (range(20), [0, 3, 4], []):
        scores = []
        for fold in folds:
            kept = [i for i in rows if i not in fold]
            f = Ridge().fit(x[kept], y[kept]).predict(x[fold]) if kept else y.mean()
            scores.append(-np.mean((f - y[fold]) ** 2))
        assert u(rows) == pytest.approx(np.mean(scores), rel=1e-5)


# ------------------------------------------------------------------------ chance, caches, warnings


def test_chance_is_drawn_from_the_seed():
    def forest(state=None):
        return make_pipeline(StandardScaler(), RandomForestClassifier(3, random_state=state))

    asked = masks(sets=4)
    first, again, other = (
        ModelUtility(forest(), TRAIN, TEST, seed=seed).evaluate(asked).values for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    fixed = [ModelUtility(forest(5), TRAIN, TEST, seed=s).evaluate(asked).values for s in (0, 1)]
    np.testing.assert_array_equal(*fixed)
    splits = KFold(2, shuffle=True)
    search = GridSearchCV(KNeighborsClassifier(), {"n_neighbors": [1, 2, 3]}, cv=splits)
    u = ModelUtility(search, TRAIN, TEST)
    assert len({u.evaluate(~NO_ONE[None]).values[0] for _ in range(5)}) == 1
    assert splits.random_state is None
    for model in (
        forest(np.random.RandomState(0)),
        GridSearchCV(SVC(), {}, cv=KFold(2, shuffle=True, random_state=np.random.RandomState(0))),
    ):
        with pytest.raises(ValueError, match=r"random_state as a whole number.*RandomState"):
            ModelUtility(model, TRAIN, TEST)


def test_fingerprints_follow_all_that_utilities_depend_on():
    def print_of(model=LR, train=TRAIN, test=TEST, scoring=None, **how):
        return ModelUtility(model, train, test, scoring, **how).fingerprint

    x = X[:20].copy()
    x[3, 2] += 1
    prints = [
        print_of(),
        print_of(LogisticRegression(C=2)),
        print_of(train=(x, Y[:20])),
        print_of(train=(X[:20], (Y[:20] + 1) % 3)),
        print_of(test=(X[61:91], Y[61:91])),
        print_of(scoring="brier"),
        print_of(scoring="neg_log_loss"),
        print_of(min_rows=2),
        print_of(test=None),
        print_of(test=None, folds=4),
        print_of(test=None, seed=1),
    ]
    assert None not in prints
    assert len(set(prints)) == len(prints)
    assert print_of(LogisticRegression(C=1.0), scoring="log_likelihood") == prints[0]
    assert print_of(names=range(1, 21)) == prints[0]


def test_workers_get_all_but_the_cache():
    u = ModelUtility(LogisticRegression(), TRAIN, TEST)
    value = u(range(20))
    other = pickle.loads(pickle.dumps(u))
    key = u.cache.keys(~NO_ONE[None])
    assert u.cache.get(u.problem, key)[0] == value
    assert np.isnan(other.cache.get(other.problem, key)[0])
    assert other.fingerprint == u.fingerprint
    assert other(range(20)) == value
    shared = UtilityCache()
    assert ModelUtility(SVC(), TRAIN, TEST, cache=shared).cache is shared


def test_only_warnings_of_small_sets_are_silenced():
    def told(model):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ModelUtility(model, TRAIN, TEST, "precision_macro").evaluate(~NO_ONE[None])
        return {str(warning.message) for warning in caught}

    class Complaining(DummyClassifier):
        def fit(self, x, y):
            warnings.warn("look here", stacklevel=1)
            return super().fit(x, y)

    assert told(LogisticRegression(max_iter=1)) == set()
    assert told(DummyClassifier()) == set()  # precision without predictions
    assert told(Complaining()) == {"look here"}


# --------------------------------------------------------------------------------------- refused


class NoClone:
    def fit(self, x, y):
        return self


class Untold(BaseEstimator):
    """Does not say what it is for; learns nothing."""

    def fit(self, x, y):
        self.first_ = y[0]
        return self

    def predict(self, x):
        return np.repeat(self.first_, len(x))


def test_an_estimator_that_does_not_tell_its_task_is_asked_by_its_targets():
    assert ModelUtility(Untold(), TRAIN, TEST)(range(20)) == np.mean(TEST[1] == Y[0])
    found = ModelUtility(Untold(), *NUMBERS)(range(20))
    assert found == pytest.approx(-np.mean((NUMBERS[1][1] - Z[0]) ** 2), rel=1e-6)


def test_a_function_sees_labels_as_they_are():
    def function(x, y, x_test, y_test):
        return float(y.sum() + y_test.sum())

    assert ModelUtility(function, (X[:3], [5, 5, 9]), (X[:2], [3, 4]))([0, 2]) == 21
    with pytest.raises(ValueError, match="neither scoring nor min_rows"):
        ModelUtility(function, TRAIN, TEST, "accuracy")


def with_gap(y):
    y = y.astype(object)
    y[4] = None
    return y


REFUSED = {
    "no pair": ((LR, X), {}, "train as a pair"),
    "no rows": ((LR, (X[:0], Y[:0]), TEST), {}, "0 sample|rows in train; it has none"),
    "no test rows": ((LR, TRAIN, (X[:0], Y[:0])), {}, "rows in test; it has none"),
    "no x": ((LR, (None, Y), TEST), {}, "x of train"),
    "lengths": ((LR, (X, Y[:-1]), TEST), {}, r"y of train of shape \(150,\).*got \(149,\)"),
    "test lengths": ((LR, TRAIN, (X, Y[:-1])), {}, "y of test of shape"),
    "column": ((LR, (X, Y[:, None]), TEST), {}, r"got \(150, 1\)"),
    "missing": ((LR, (X, with_gap(Y)), TEST), {}, "no missing y of train; row 4"),
    "missing test": ((LR, TRAIN, (X, with_gap(Y))), {}, "no missing y of test; row 4"),
    "one class": ((LR, (X, Y * 0), TEST), {}, "two classes in y of train"),
    "no labels": ((LR, (X, Z), TEST), {}, "labels for LogisticRegression; got numbers"),
    "text": ((Ridge(), (X, Y.astype(str)), TEST), {}, "numbers for a regression"),
    "test text": ((Ridge(), (X, Z), (X, Y.astype(str))), {}, "numbers for a regression"),
    "widths": ((LR, TRAIN, (X[:, :3], Y)), {}, r"shape per row of train.*\(4,\); got \(3,\)"),
    "columns": (
        (LR, (pd.DataFrame(X, columns=list("abcd")), Y), (pd.DataFrame(X), Y)),
        {},
        r"columns of train in test, \['a', 'b', 'c', 'd'\]; got \[0, 1, 2, 3\]",
    ),
    "class": ((SVC, TRAIN, TEST), {}, "the class SVC: call it"),
    "nothing to fit": (("svc", TRAIN, TEST), {}, "estimator with fit.*got str"),
    "no clone": ((NoClone(), TRAIN, TEST), {}, "scikit-learn can clone; NoClone cannot"),
    "typo": ((LR, TRAIN, TEST, "acuracy"), {}, "log_likelihood, brier.*mean 'accuracy'"),
    "no scoring": ((LR, TRAIN, TEST, 3), {}, "got 3"),
    "other task": ((LR, TRAIN, TEST, "r2"), {}, "for a classification; got 'r2'"),
    "no probabilities": ((SVC(), TRAIN, TEST, "brier"), {}, "predict_proba for brier; SVC has"),
    "constant": ((Ridge(), (X, Z), (X, Z * 0), "r2"), {}, "different y in the test rows for r2"),
    "lone folds": ((Ridge(), (X, Z), None, "r2"), {"folds": 150}, "different y in every fold"),
    "folds": ((LR, TRAIN), {"folds": 21}, "folds from 2 to 20"),
    "one fold": ((LR, TRAIN), {"folds": 1}, "folds from 2 to 20"),
    "min_rows": ((LR, TRAIN, TEST), {"min_rows": 0}, "min_rows at least 1"),
    "seed": ((LR, TRAIN, TEST), {"seed": -1}, "seed at least 0"),
    "names": ((LR, TRAIN, TEST), {"names": range(3)}, "20 names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_fit(case):
    args, how, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ModelUtility(*args, **how)


# ---------------------------------------------------------------------------------------- groups


def test_groups_are_their_rows():
    inner = ModelUtility(LogisticRegression(), TRAIN, TEST)
    labels = np.array(["a", "b", None, "c"], dtype=object)[np.arange(20) % 4]
    labels[6] = np.nan
    u = GroupedUtility(inner, labels)
    assert u.names.tolist() == ["a", "b", "(missing)", "c"]
    assert (u.n, u.names.name, u.prefer) == (4, "group", inner.prefer)
    asked = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]], bool)
    wanted = np.array([[asked[s, i % 4] for i in range(20)] for s in range(4)])
    np.testing.assert_array_equal(u.expand(asked), wanted)
    np.testing.assert_array_equal(u.evaluate(asked).values, inner.evaluate(wanted).values)
    value = u([0, 2])
    assert inner.cache.get(inner.problem, inner.cache.keys(wanted[:1]))[0] == value
    assert (u.cache.keys(asked), u.problem) == (inner.cache.keys(wanted), inner.problem)
    other = pickle.loads(pickle.dumps(u))
    np.testing.assert_array_equal(other.evaluate(asked).values, u.evaluate(asked).values)
    assert other.cache.keys(asked) == u.cache.keys(asked)
    assert len(u.cache) == len(inner.cache) == 1
    assert u.cache.path is None


def test_groups_evaluate_without_a_look_at_the_cache():
    calls = []
    inner = FunctionUtility(lambda rows: float(calls.append(rows.tolist()) or len(rows)), 5)
    u = GroupedUtility(inner, [1, 2, 1, 2, 1])
    for _ in range(2):
        assert u.evaluate(np.array([[False, True]])).values.tolist() == [2.0]
    assert calls == [[1, 3], [1, 3]]
    assert [u([1]), inner([1, 3]), u([1])] == [2.0] * 3
    assert len(calls) == 3
    assert u.names.tolist() == [1, 2]
    assert u.fingerprint is None


def test_fingerprints_of_groups_tell_groups_apart():
    inner = ModelUtility(LogisticRegression(), TRAIN, TEST)
    halves = [GroupedUtility(inner, np.arange(20) // 10), GroupedUtility(inner, np.arange(20) % 2)]
    prints = {inner.fingerprint, *(u.fingerprint for u in halves)}
    assert len(prints) == 3
    assert halves[0]([1]) != halves[1]([1])


def test_labels_by_name_and_by_position():
    names = [f"r{i}" for i in range(4)]
    inner = FunctionUtility(lambda rows: float(sum(10**rows)), 4, names=names)
    by_name = pd.Series(["x", "y", "x", "z", "w"], index=["r3", "r1", "r0", "r2", "other"])
    u = GroupedUtility(inner, by_name)
    assert u.names.tolist() == ["x", "y", "z"]
    assert [u([0]), u([1]), u([2])] == [1001, 10, 100]
    with pytest.raises(ValueError, match=r"none for 'r2'.*to_numpy"):
        GroupedUtility(inner, by_name.drop("r2"))
    with pytest.raises(ValueError, match="'r1' twice"):
        GroupedUtility(inner, pd.concat([by_name, by_name[["r1"]]]))
    with pytest.raises(ValueError, match="label for each of 4 rows; got 3"):
        GroupedUtility(inner, ["x", "y", "z"])
