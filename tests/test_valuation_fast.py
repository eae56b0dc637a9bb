"""Utilities in closed form, of neighbours and of functions that retrain, against plain loops."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import log_loss
from torch import nn

import upweight as uw
from upweight.valuation import knn_shapley
from upweight.valuation.knn_utility import KnnUtility
from upweight.valuation.refit_utility import RefitUtility
from upweight.valuation.ridge_utility import RidgeUtility, deal


def rows(n=40, d=6, m=15, classes=3, *, seed=0, task="classification"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n + m, d)) * np.arange(1, d + 1) + 3
    if task == "regression":
        y = x @ rng.normal(size=d) + rng.normal(size=n + m)
    else:
        y = rng.permutation(np.arange(n + m) % classes)
        x[:, :classes] += 2 * np.eye(classes)[y]
    return (x[:n], y[:n]), (x[n:], y[n:])


def some_masks(n, count=30, seed=1):
    """Sets of all sizes, none and all of the rows among them."""
    rng = np.random.default_rng(seed)
    masks = rng.random((count, n)) < np.linspace(0, 1, count)[:, None]
    masks[-2:] = masks[2]  # the same set twice
    return np.concatenate([masks, [np.ones(n, bool)]])


def some_orders(n, count=4, seed=2):
    return np.random.default_rng(seed).permuted(np.tile(np.arange(n), (count, 1)), axis=1)


def plain_ridge(train, test, chosen, *, alpha, scoring):
    """One fit by scikit-learn, as RidgeUtility documents it."""
    (x, y), (x_test, y_test) = train, test
    scale = np.where(x.std(axis=0) > 0, x.std(axis=0), np.inf)
    x, x_test = (
        np.column_stack([(a - x.mean(axis=0)) / scale, np.ones(len(a))]) for a in (x, x_test)
    )
    classes = np.unique(y)
    regression = scoring in ("neg_mean_squared_error", "r2")
    goal = y[:, None] if regression else (y[:, None] == classes).astype(float)
    offset = goal.mean() if regression else 1 / len(classes)
    out = np.full((len(x_test), goal.shape[1]), offset)
    if len(chosen):
        fit = Ridge(alpha, fit_intercept=False, solver="cholesky", tol=0)
        fit.fit(x[chosen], goal[chosen] - offset)
        out += fit.predict(x_test).reshape(out.shape)
    if regression:
        error = np.mean((out[:, 0] - y_test) ** 2)
        return -error if scoring != "r2" else 1 - error / np.var(y_test)
    proba = np.clip(out, 0, None)
    proba /= proba.sum(axis=1, keepdims=True)
    s, c = len(chosen), len(classes)
    if scoring == "accuracy":
        return np.mean(classes[proba.argmax(axis=1)] == y_test) if s else 1 / c
    proba = (s * proba + 1) / (s + c)
    if scoring == "log_likelihood":
        return -log_loss(y_test, proba, labels=classes)
    return -np.mean(((proba - (y_test[:, None] == classes)) ** 2).sum(axis=1))


SCORES = ["log_likelihood", "brier", "accuracy", "neg_mean_squared_error", "r2"]


def task_of(scoring):
    return "regression" if scoring in SCORES[3:] else "classification"


@pytest.mark.parametrize("scoring", SCORES)
@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_ridge_is_that_of_single_fits(scoring, alpha):
    train, test = rows(task=task_of(scoring))
    train[0][:, 5] = 7.0  # a constant column
    utility = RidgeUtility(train, test, scoring, alpha=alpha)
    masks = some_masks(40, 14)
    expected = [
        plain_ridge(train, test, np.flatnonzero(mask), alpha=alpha, scoring=scoring)
        for mask in masks
    ]
    found = utility.evaluate(masks)
    assert not found.errors
    np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-10)
    assert len(np.unique(np.round(expected, 6))) > 5


@pytest.mark.parametrize("scoring", ["log_likelihood", "brier", "r2"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(
    ("n", "d", "alpha"),
    [(150, 4, 1.0), (500, 12, 1e-3), (150, 60, 1e-3), (90, 200, 1e-3), (9, 3, 0.1)],
)
def test_ridge_chains_and_all_but_one_are_those_of_single_sets(n, d, alpha, cross, scoring):
    train, test = rows(n, d, 20, task=task_of(scoring))
    utility = RidgeUtility(train, None if cross else test, scoring, alpha=alpha, folds=3)
    (order,) = some_orders(n, 1)
    sizes = np.unique(np.append(np.arange(6), np.linspace(6, n, 40).astype(int)))
    masks = np.argsort(order) < sizes[:, None]
    grown = utility.chains(order[None])[0]
    assert grown.shape == (n + 1,)
    expected = utility.evaluate(masks).values
    np.testing.assert_allclose(grown[sizes], expected, rtol=1e-9, atol=1e-9)

    left_out = np.arange(0, n, max(1, n // 40))
    expected = utility.evaluate(~np.eye(n, dtype=bool)[left_out]).values
    found = utility.all_but_one()[left_out]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert np.ptp(expected) > 1e-6


def test_long_chains_do_not_drift():
    train, test = rows(1000, 40, 10)
    utility = RidgeUtility(train, test, "brier", alpha=1e-3)
    grown = utility.chains(some_orders(1000, 1))
    assert grown[0, -1] == pytest.approx(utility(np.arange(1000)), abs=1e-11)


def ridge(**options):
    train, test = rows(70, **options)
    return RidgeUtility(train, test)


MAKERS = {
    "primal and dual": lambda: ridge(d=5),
    "wide": lambda: ridge(d=180),
    "dual chains": lambda: ridge(d=40),
    "regression": lambda: ridge(d=5, task="regression"),
    "cross-fit": lambda: RidgeUtility(rows(70)[0]),
    "accuracy": lambda: RidgeUtility(*rows(70), "accuracy"),
    "neighbours": lambda: KnnUtility(*rows(70)),
    "neighbours among themselves": lambda: KnnUtility(rows(70)[0], scoring="log_likelihood"),
    "neighbours in a regression": lambda: KnnUtility(*rows(70, task="regression"), k=9),
}


@pytest.mark.parametrize("name", MAKERS)
def test_utilities_are_bitwise_the_same_in_any_company(name, monkeypatch):
    utility = MAKERS[name]()
    masks, orders = some_masks(70, 40), some_orders(70, 7)
    together, grown = utility.evaluate(masks).values, utility.chains(orders)
    alone = [utility.evaluate(mask[None]).values[0] for mask in masks]
    np.testing.assert_array_equal(together, alone)
    mixed = np.random.default_rng(3).permutation(len(masks))
    np.testing.assert_array_equal(utility.evaluate(masks[mixed]).values, together[mixed])
    np.testing.assert_array_equal(grown, np.concatenate([utility.chains(o[None]) for o in orders]))
    for module in ("ridge_fits", "knn_utility"):
        monkeypatch.setattr(f"upweight.valuation.{module}.AT_ONCE", 1)
    np.testing.assert_array_equal(utility.evaluate(masks).values, together)
    np.testing.assert_array_equal(utility.chains(orders), grown)
    again = pickle.loads(pickle.dumps(utility))
    np.testing.assert_array_equal(again.evaluate(masks).values, together)


@pytest.mark.parametrize("scoring", ["log_likelihood", "neg_mean_squared_error"])
def test_ridge_without_test_rows_is_a_mean_over_folds(scoring):
    train, _ = rows(task=task_of(scoring))
    x, y = train
    utility = RidgeUtility(train, None, scoring, folds=4, seed=5)
    fold = deal(40, 4, 5, None if scoring == "neg_mean_squared_error" else y)
    masks = some_masks(40, 8)
    expected = [
        np.mean(
            [
                plain_ridge(
                    train,
                    (x[fold == k], y[fold == k]),
                    np.flatnonzero(mask & (fold != k)),
                    alpha=1.0,
                    scoring=scoring,
                )
                for k in range(4)
            ]
        )
        for mask in masks
    ]
    np.testing.assert_allclose(utility.evaluate(masks).values, expected, rtol=1e-10)


def test_folds_are_even_in_every_class():
    codes = np.repeat([0, 1, 2], [40, 11, 6])
    fold = deal(57, 5, 0, codes)
    counts = np.array([np.bincount(fold[codes == c], minlength=5) for c in range(3)])
    assert np.ptp(counts, axis=1).max() <= 1
    assert np.ptp(counts.sum(axis=0)) <= 1
    assert (deal(57, 5, 1, codes) != fold).any()
    assert (np.diff(fold) != 0).any()


def test_inner_products_that_are_not_kept_change_round_off_only(monkeypatch):
    many = ridge(d=180)
    assert many._rows.gram is not None
    masks, orders = some_masks(70), some_orders(70)
    expected = many.evaluate(masks).values, many.chains(orders)
    monkeypatch.setattr("upweight.valuation.ridge_fits.KEPT", 0)
    few = ridge(d=180)
    np.testing.assert_allclose(few.evaluate(masks).values, expected[0], rtol=1e-10)
    np.testing.assert_allclose(few.chains(orders), expected[1], rtol=1e-10)
    assert few._rows.gram is None
    assert few._judges[0].cross is None


def test_sets_without_rows_and_of_one_class():
    train, test = rows()
    utility = RidgeUtility(train, test)
    assert utility([]) == pytest.approx(-math.log(3))
    one_class = np.flatnonzero(train[1] == 1)
    expected = plain_ridge(train, test, one_class, alpha=1.0, scoring="log_likelihood")
    assert utility(one_class) == pytest.approx(expected)
    train, test = rows(task="regression")
    expected = -np.mean((train[1].mean() - test[1]) ** 2)
    assert RidgeUtility(train, test)([]) == pytest.approx(expected)


@pytest.mark.parametrize("make", [RidgeUtility, KnnUtility])
def test_labels_of_any_type_and_float32(make):
    train, test = rows()
    masks = some_masks(40)
    expected = make(train, test).evaluate(masks).values
    for names in (["b", "c", "é"], [10, 200, 3000], [-1.0, 0.0, 7.0]):
        named = [(x, [names[c] for c in y]) for x, y in (train, test)]
        np.testing.assert_array_equal(make(*named).evaluate(masks).values, expected)
    with pytest.raises(ValueError, match="of one type"):
        make((train[0], [[False, "x"][c % 2] for c in train[1]]), test)
    small = [(x.astype(np.float32), y) for x, y in (train, test)]
    found = make(*small).evaluate(masks).values
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.dtype == np.float64


@pytest.mark.parametrize("make", [RidgeUtility, KnnUtility])
def test_fingerprints(make):
    train, test = rows()
    first = make(train, test).fingerprint
    assert first == make(train, test).fingerprint
    labels = train[1].copy()
    labels[0] = (labels[0] + 1) % 3
    changed = [
        make((train[0] ** 2, train[1]), test),
        make((train[0], labels), test),
        make(train, (test[0][:9], test[1][:9])),
        make(train),
        make(train, test, scoring="accuracy"),
        RidgeUtility(train, test, alpha=2.0) if make is RidgeUtility else make(train, test, 4),
    ]
    assert len({first, *(utility.fingerprint for utility in changed)}) == 7


def shapley(utility):
    """Over all 2^n sets, by the definition."""
    n = utility.n
    masks = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)
    worth, size = utility.evaluate(masks).values, masks.sum(axis=1)
    values = np.zeros(n)
    for i in range(n):
        (without,) = np.nonzero(~masks[:, i])
        weight = np.array([1 / (n * math.comb(n - 1, s)) for s in size[without]])
        values[i] = weight @ (worth[without | 1 << i] - worth[without])
    return values


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_shapley_values_of_neighbours_are_the_exact_ones(task, itself, ties, k):
    train, test = rows(8, 2, 11, 2, task=task)
    if ties:
        train, test = (((x > 3).astype(float), y) for x, y in (train, test))
    utility = KnnUtility(train, None if itself else test, k, task=task, seed=3)
    judges = () if itself else test
    expected = np.asarray(knn_shapley(*train, *judges, k=k, task=task, seed=3))
    np.testing.assert_allclose(shapley(utility), expected, rtol=0, atol=1e-12)
    assert np.ptp(expected) > 1e-3


@pytest.mark.parametrize("scoring", [None, "accuracy", "log_likelihood", "brier"])
@pytest.mark.parametrize("itself", [False, True])
def test_neighbours_against_a_loop(scoring, itself):
    train, test = rows(60, 3, 12)
    x, y = train
    x_test, y_test = train if itself else test
    utility = KnnUtility(train, None if itself else test, 4, scoring)

    def plain(chosen):
        total = 0.0
        for t, point in enumerate(x_test):
            players = np.array([i for i in chosen if not (itself and i == t)], int)
            distance = ((x[players] - point) ** 2).sum(axis=1)
            votes = np.bincount(y[players[np.argsort(distance)[:4]]], minlength=3)
            s, goal = votes.sum(), np.eye(3)[y_test[t]]
            p = (votes + 1) / (s + 3)
            total += {
                None: votes @ goal / 4,
                "accuracy": float(votes.argmax() == y_test[t]) if s else 1 / 3,
                "log_likelihood": np.log(p @ goal),
                "brier": -((p - goal) ** 2).sum(),
            }[scoring]
        return total / len(x_test)

    masks, (order,) = some_masks(60, 15), some_orders(60, 1)
    expected = [plain(np.flatnonzero(mask)) for mask in masks]
    np.testing.assert_allclose(utility.evaluate(masks).values, expected, rtol=1e-12)
    grown = utility.chains(order[None])[0]
    prefixes = np.argsort(order) < np.arange(61)[:, None]
    np.testing.assert_array_equal(grown, utility.evaluate(prefixes).values)
    assert grown[17] == pytest.approx(plain(order[:17]), rel=1e-12)


class Means:
    """The model is the mean of the rows."""

    x = np.random.default_rng(0).normal(size=9)
    n, output, fingerprint = 9, "loss", "means"

    def __init__(self):
        self.calls = []

    def __call__(self, rows, seed):
        self.calls.append(len(rows))
        return (self.x[rows].mean() + seed / 2**32 - np.array([1.0, 3.0])) ** 2


class Many(Means):
    def many(self, masks, seeds):
        self.calls.append(len(masks))
        if any(mask.sum() == 2 for mask in masks):
            raise ArithmeticError("of two rows")
        pairs = zip(masks, seeds, strict=True)
        found = [Means.__call__(Means(), np.flatnonzero(mask), seed) for mask, seed in pairs]
        return np.where(masks.all(axis=1)[:, None], np.nan, found)


def test_refits_are_averaged_over_seeds_and_test_rows():
    refit = Means()
    utility = RefitUtility(refit, seeds=3, seed=7, empty=-4.0)
    masks = some_masks(9, 12)
    seeds = np.random.SeedSequence(7).generate_state(3) / 2**32
    expected = [
        -np.mean([(refit.x[mask].mean() + s - np.array([1.0, 3.0])) ** 2 for s in seeds])
        if mask.any()
        else -4.0
        for mask in masks
    ]
    np.testing.assert_allclose(utility.evaluate(masks).values, expected)
    assert len(refit.calls) == 3 * masks.any(axis=1).sum()
    margins = RefitUtility(refit, seeds=3, seed=7, empty=4.0, output="margin")
    np.testing.assert_allclose(margins.evaluate(masks).values, -np.array(expected))
    assert utility.fingerprint != margins.fingerprint
    assert RefitUtility(lambda rows, seed: [1.0], n=3, output="loss").fingerprint is None


def test_refits_of_many_at_once_fail_alone():
    many, plain = Many(), RefitUtility(Means(), empty=0.0)
    utility = RefitUtility(many, empty=0.0, at_once=5)
    masks = np.tri(10, 9, -1).astype(bool)  # of 0, 1, …, 9 rows
    found = utility.evaluate(masks)
    assert sorted(found.errors) == [2, 9]
    assert "of two rows" in found.errors[2]
    assert "nan" in found.errors[9]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(found.values)), [2, 9])
    fine = np.isfinite(found.values)
    np.testing.assert_allclose(found.values[fine], plain.evaluate(masks[fine]).values)
    assert max(many.calls) == 5


def test_no_rows_are_asked_about_when_a_refit_is_wrapped():
    def constant_for_none(rows, seed):
        return [2.0 if len(rows) else 6.0, 0.0]

    utility = RefitUtility(constant_for_none, n=4, output="loss")
    assert utility([]) == -3.0
    assert utility([1]) == -1.0
    with pytest.raises(ValueError, match="expected empty"):
        RefitUtility(Means())  # the mean of nothing is nan


def test_small_networks_that_are_trained_at_once():
    (x, y), (x_test, y_test) = rows(24, 3, 10)
    torch.manual_seed(0)
    train, test = (
        (torch.tensor(a, dtype=torch.float32), torch.tensor(b))
        for a, b in ((x, y), (x_test, y_test))
    )
    refit = uw.Retraining(
        nn.Linear(3, 3), nn.functional.cross_entropy, train, test, epochs=2, output="loss"
    )
    with pytest.raises(ValueError, match="expected empty"):
        RefitUtility(refit)
    utility = RefitUtility(refit, empty=-math.log(3), at_once=2)
    masks = np.tri(4, 24, -1).astype(bool)[:, ::-1]
    found = utility.evaluate(masks)
    assert not found.errors
    seed = int(np.random.SeedSequence(0).generate_state(1)[0])
    expected = [
        -refit(np.flatnonzero(mask), seed).mean() if mask.any() else -math.log(3) for mask in masks
    ]
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)
    assert utility.fingerprint is not None
    assert utility.n == 24


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a, b: RidgeUtility(a, b, alpha=0.0), "expected alpha above 0"),
        (lambda a, b: RidgeUtility(a, b, alpha=math.nan), "expected alpha above 0"),
        (lambda a, b: RidgeUtility(a, b, "r2"), "expected scoring"),
        (lambda a, b: RidgeUtility(a, folds=1), "expected folds from 2 to 40"),
        (lambda a, b: RidgeUtility(a, (b[0][:, 1:], b[1])), "features of test of shape"),
        (lambda a, b: RidgeUtility(a, (b[0], b[1] + 7)), "among the classes"),
        (lambda a, b: RidgeUtility((a[0] * 1e200, a[1]), b), "squares are finite"),
        (lambda a, b: RidgeUtility(a, b, names=[0] * 40), "name of its own"),
        (lambda a, b: KnnUtility(a, b, 41), "expected k from 1 to 40"),
        (lambda a, b: KnnUtility(a, b, scoring="r2"), "expected scoring"),
        (lambda a, b: KnnUtility(a, b, scoring="accuracy", task="regression"), "no scoring"),
        (lambda a, b: RefitUtility(Means(), n=0, empty=0), "expected n at least 1"),
        (lambda a, b: RefitUtility(lambda r, s: [0.0], output="loss"), "expected n, how many"),
        (lambda a, b: RefitUtility(lambda r, s: [0.0], n=3), "expected output 'loss'"),
        (lambda a, b: RefitUtility(Means(), empty=math.inf), "expected empty"),
        (lambda a, b: RefitUtility(Means(), empty=0, seeds=0), "expected seeds"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(*rows())


def test_too_many_pairs_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("upweight.valuation.knn_utility.LARGEST", 4 * 599)
    with pytest.raises(ValueError, match="expected at most 599 pairs"):
        KnnUtility(*rows())
