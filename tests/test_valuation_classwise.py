"""Class-wise Shapley values, against all subsets in the plainest loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.datasets import load_iris
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from upweight.valuation import (
    Evaluations,
    FunctionUtility,
    RankStability,
    UtilityCache,
    UtilityError,
    ValueWarning,
)
from upweight.valuation.classwise import class_wise_shapley
from upweight.valuation.model_utility import ModelUtility

X, Y = load_iris(return_X_y=True)
ORDER = np.random.default_rng(1).permutation(np.flatnonzero(Y > 0))
X, Y = X[ORDER, 1:3], Y[ORDER]  # two classes that overlap in these columns
ROWS = np.concatenate([np.flatnonzero(Y[:20] == c)[:3] for c in (1, 2)])
TRAIN, TEST = (X[ROWS], Y[ROWS]), (X[20:50], Y[20:50])
NEAREST = KNeighborsClassifier(1)


def tiny(**options):
    return ModelUtility(NEAREST, TRAIN, TEST, **options)


def predicted(rows):
    x, y = TRAIN
    if len(set(y[rows])) == 1:
        return np.repeat(y[rows[0]], len(TEST[1]))
    return clone(NEAREST).fit(x[rows], y[rows]).predict(TEST[0])


def worth(label, rows):
    right = predicted(rows) == TEST[1]
    within = np.mean(right & (TEST[1] == label))
    return within * math.exp(np.mean(right & (TEST[1] != label)))


def subsets(rows):
    return [list(s) for k in range(len(rows) + 1) for s in itertools.combinations(rows, k)]


def by_all_subsets(p=0.5):
    """v_i, one set O and one set S at a time."""
    y = TRAIN[1]
    values = np.zeros(len(y))
    for i, label in enumerate(y):
        others = [j for j in range(len(y)) if y[j] != label]
        mates = [j for j in range(len(y)) if y[j] == label and j != i]
        chances = 0.0
        for o in subsets(others)[1:]:
            chance = p ** len(o) * (1 - p) ** (len(others) - len(o))
            chances += chance
            for s in subsets(mates):
                weight = 1 / (len(mates) + 1) / math.comb(len(mates), len(s))
                more = worth(label, sorted([*o, *s, i])) - worth(label, sorted([*o, *s]))
                values[i] += chance * weight * more
        values[i] /= chances
    return values


def scaled(values):
    right = predicted(np.arange(6)) == TEST[1]
    for label in (1, 2):
        of_class = TRAIN[1] == label
        values[of_class] *= np.mean(right & (TEST[1] == label)) / values[of_class].sum()
    return values


# ------------------------------------------------------------------------------- against all sets


@pytest.mark.parametrize("p", [0.5, 0.3, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.slow
def test_values_are_those_of_all_subsets_within_their_errors(p, normalize):
    exact = by_all_subsets(p)
    if normalize:
        exact = scaled(exact)
    values = class_wise_shapley(tiny(), out_of_class=p, normalize=normalize, until=8_000)
    assert (np.abs(values.values - exact) <= 5 * values.errors + 1e-12).all()
    assert values.errors.max() < 0.1 * np.abs(exact).max()
    assert np.ptp(exact) > 5 * values.errors.max()
    assert (values.counts == 8_000 // (6 + 2)).all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.slow
def test_errors_are_the_spread_over_seeds(normalize):
    utility = tiny()  # all 64 sets are in its cache soon
    runs = [class_wise_shapley(utility, seed=s, normalize=normalize, until=800) for s in range(60)]
    spread = np.std([run.values for run in runs], axis=0, ddof=1)
    told = np.sqrt(np.mean([run.errors**2 for run in runs], axis=0))
    np.testing.assert_allclose(spread, told, rtol=0.35, atol=1e-12)


def test_values_of_a_class_sum_to_its_accuracy():
    values = class_wise_shapley(tiny(), until=400)
    right = predicted(np.arange(6)) == TEST[1]
    for label in (1, 2):
        expected = np.mean(right & (TEST[1] == label))
        assert values.values[TRAIN[1] == label].sum() == pytest.approx(expected, abs=1e-12)
    plain = class_wise_shapley(tiny(), until=400, normalize=False)
    for label in (1, 2):
        of_class = TRAIN[1] == label
        ratio = values.values[of_class] / plain.values[of_class]
        np.testing.assert_allclose(ratio, ratio[0])


@pytest.mark.slow
def test_flipped_labels_have_low_values():
    x, y = load_iris(return_X_y=True)
    order = np.random.default_rng(5).permutation(len(y))
    x, y = ((x - x.mean(axis=0)) / x.std(axis=0))[order], y[order]
    wrong = np.arange(5)
    noisy = y[:45].copy()
    noisy[wrong] = (noisy[wrong] + 1) % 3
    utility = ModelUtility(LogisticRegression(), (x[:45], noisy), (x[45:105], y[45:105]))
    values = class_wise_shapley(utility, until=480)
    is_wrong = np.isin(np.arange(45), wrong)
    assert roc_auc_score(is_wrong, -values.values) > 0.8


# ------------------------------------------------------------------------------ runs and labels


@pytest.mark.slow
def test_workers_rounds_and_names():
    one = class_wise_shapley(tiny(), until=300, seed=3)
    two = class_wise_shapley(tiny(names=list("abcdef")), until=300, seed=3, n_jobs=2)
    np.testing.assert_array_equal(one.values, two.values)
    np.testing.assert_array_equal(one.errors, two.errors)
    assert two.names.tolist() == list("abcdef")
    other = class_wise_shapley(tiny(), until=300, seed=4)
    assert np.abs(one.values - other.values).max() > 1e-4


@pytest.mark.slow
def test_a_longer_run_takes_up_from_the_cache(tmp_path):
    class_wise_shapley(tiny(cache=UtilityCache(tmp_path / "u")), until=200)
    again = class_wise_shapley(tiny(cache=UtilityCache(tmp_path / "u")), until=200)
    assert again.provenance["computed"] == 0
    assert again.provenance["evaluations"] == 200
    new = class_wise_shapley(tiny(), until=200)
    assert new.provenance["computed"] > 0
    np.testing.assert_array_equal(new.values, again.values)


@pytest.mark.slow
def test_caches_that_are_shared_keep_utilities_apart():
    cache = UtilityCache()
    first, other = tiny(cache=cache), ModelUtility(NEAREST, TRAIN, (X[50:], Y[50:]), cache=cache)
    before = first(range(6))
    one = class_wise_shapley(first, until=200)
    two = class_wise_shapley(other, until=200)
    np.testing.assert_array_equal(one.values, class_wise_shapley(tiny(), until=200).values)
    assert np.abs(one.values - two.values).max() > 1e-3
    assert first(range(6)) == before


@pytest.mark.parametrize(
    "labels", [["b", "c"], [False, True], [-1.0, 5.0], np.array(["b", "c"], object)], ids=str
)
def test_labels_of_any_type(labels):
    labels = np.asarray(labels)
    expected = class_wise_shapley(tiny(), until=160).values
    train, test = ((x, labels[y - 1]) for x, y in (TRAIN, TEST))
    values = class_wise_shapley(ModelUtility(NEAREST, train, test), until=160).values
    np.testing.assert_array_equal(values, expected)


def test_the_scoring_does_not_matter():
    values = [
        class_wise_shapley(tiny(scoring=s), until=160).values for s in ("accuracy", "f1", None)
    ]
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_array_equal(values[0], values[2])


@pytest.mark.slow
def test_rows_judge_each_other_in_folds_without_test_rows():
    x, y = X[:24], Y[:24]
    values = class_wise_shapley(ModelUtility(NEAREST, (x, y), folds=4), until=104)
    utility = ModelUtility(NEAREST, (x, y), folds=4)
    right = np.zeros(24, bool)
    for fold in range(4):
        out = utility._folds == fold
        right[out] = clone(NEAREST).fit(x[~out], y[~out]).predict(x[out]) == y[out]
    for label in (1, 2):
        expected = np.mean(right & (y == label))
        assert values.values[y == label].sum() == pytest.approx(expected)


@pytest.mark.slow
def test_rules_about_quality_end_a_run():
    utility = ModelUtility(NEAREST, (X[50:74], Y[50:74]), TEST)
    good = class_wise_shapley(utility, until=RankStability(0.2) | Evaluations(4_000))
    assert good.converged is True
    assert good.stopped.startswith("rank stability")
    with pytest.warns(ValueWarning, match="did not converge: .* 100 evaluations"):
        short = class_wise_shapley(utility, until=RankStability(0.99) | Evaluations(100))
    assert short.converged is False
    assert short.provenance["evaluations"] <= 100


# --------------------------------------------------------------------------------- what goes wrong


class Picky(ClassifierMixin, BaseEstimator):
    """The nearest row, where there are other than four rows."""

    def fit(self, x, y):
        if len(y) == 4:
            raise ArithmeticError("four rows")
        self.model_ = KNeighborsClassifier(1).fit(x, y)
        self.classes_ = self.model_.classes_
        return self

    def predict(self, x):
        return self.model_.predict(x)


class Broken(Picky):
    """Nothing, from fitting or from prediction on."""

    def __init__(self, part="fit"):
        self.part = part

    def fit(self, x, y):
        if self.part == "fit":
            raise ArithmeticError("no fit")
        return super().fit(x, y)

    def predict(self, x):
        raise ArithmeticError("no predict")


def test_failed_sets_count_nowhere():
    with pytest.warns(
        ValueWarning, match=r"could not be computed.*of 4 rows: ArithmeticError: four"
    ):
        values = class_wise_shapley(ModelUtility(Picky(), TRAIN, TEST), until=400)
    assert values.provenance["failed"] > 5
    assert (values.failures["size"] == 4).all()
    assert np.isfinite(values.values).all()
    assert (values.counts < 50).all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("part", ["fit", "predict"])
def test_a_model_of_all_rows_that_fails_is_an_error(part, normalize):
    utility = ModelUtility(Broken(part), TRAIN, TEST)
    told = rf"expected a model of all 6 rows; it ended with ArithmeticError: no {part}"
    with pytest.raises(UtilityError, match=told) as caught:
        class_wise_shapley(utility, until=400, normalize=normalize)
    assert isinstance(caught.value.__cause__, ArithmeticError)


def test_a_class_without_test_rows_is_told():
    x, y = TEST
    one = ModelUtility(NEAREST, TRAIN, (x[y == 1], y[y == 1]))
    with pytest.warns(
        ValueWarning, match="no test row is of the classes 2: their rows have values of 0"
    ):
        values = class_wise_shapley(one, until=160)
    assert (values.values[TRAIN[1] == 2] == 0).all()
    assert values.values[TRAIN[1] == 1].sum() > 0


def test_a_class_that_is_never_right_is_not_scaled():
    train = np.array([[0.0], [0.1], [5.0], [5.1]]), ["a", "a", "b", "b"]
    test = np.array([[0.02], [0.05], [0.03]]), ["a", "a", "b"]
    with pytest.warns(ValueWarning, match="of the classes b are not scaled"):
        values = class_wise_shapley(ModelUtility(NEAREST, train, test), until=160)
    assert values.values[:2].sum() == pytest.approx(2 / 3)


def test_what_cannot_be_valued_is_refused():
    with pytest.raises(ValueError, match="at least two classes"):
        class_wise_shapley(ModelUtility(NEAREST, (X[:4], [1] * 4), TEST))
    with pytest.raises(ValueError, match="utility of a classifier; got one of a regression"):
        class_wise_shapley(ModelUtility(LinearRegression(), (X, X[:, 0]), (X, X[:, 0])))
    with pytest.raises(ValueError, match="utility of a classifier; got one of a function"):
        class_wise_shapley(ModelUtility(lambda *given: 0.0, TRAIN, TEST))
    with pytest.raises(TypeError, match=r"expected a ModelUtility.*got FunctionUtility"):
        class_wise_shapley(FunctionUtility(len, 4))
    for p in (0, 1.5):
        with pytest.raises(ValueError, match="out_of_class above 0 and at most 1"):
            class_wise_shapley(tiny(), out_of_class=p)
    with pytest.raises(ValueError, match="expected seed at least 0"):
        class_wise_shapley(tiny(), seed=-1)
