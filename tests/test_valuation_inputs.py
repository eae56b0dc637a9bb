"""What does not belong together is refused, alike by all that take x and y."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.tree import ExtraTreeClassifier

from upweight.valuation import (
    FunctionUtility,
    GroupedUtility,
    KnnUtility,
    ModelUtility,
    RefitUtility,
    RidgeUtility,
    data_oob,
    knn_shapley,
    neighbours,
)
from upweight.valuation.forests import Growth, grow
from upweight.valuation.quiet import quiet

RNG = np.random.default_rng(0)
X = pd.DataFrame(
    RNG.standard_normal((30, 3)), columns=list("abc"), index=[f"r{i}" for i in range(30)]
)
Y = pd.Series(np.arange(30) % 2, index=X.index)

ASK = {
    "ModelUtility": lambda train, test: ModelUtility(LogisticRegression(), train, test),
    "RidgeUtility": RidgeUtility,
    "KnnUtility": KnnUtility,
    "knn_shapley": lambda train, test: knn_shapley(*train, *(test or (None, None))),
    "data_oob": lambda train, test: data_oob(None, *train, trees=20),
}


@pytest.mark.parametrize("name", sorted(ASK))
def test_x_and_y_in_different_orders(name: str):
    ask, test = ASK[name], (X[:4].to_numpy(), Y[:4].to_numpy())
    with pytest.raises(ValueError, match=r"x and y.* in the same order.*y\.loc\[x\.index\]"):
        ask((X, Y[::-1]), test)
    # other names say nothing of the order, and arrays have none
    ask((X, Y.reset_index(drop=True)), test)
    ask((X.to_numpy(), Y[::-1]), test)
    ask((X, Y), test)


@pytest.mark.parametrize("name", sorted(set(ASK) - {"data_oob"}))
def test_tests_in_another_form(name: str):
    ask = ASK[name]
    with pytest.raises(ValueError, match="same order"):
        ask((X, Y), (X[:4], Y[:4][::-1]))
    for other in (X[["c", "b", "a"]], X.rename(columns={"a": "z"})):
        with pytest.raises(ValueError, match=r"expected the columns of .*\['a', 'b', 'c'\]; got"):
            ask((X, Y), (other[:4], Y[:4]))
    ask((X, Y), (X[:4].to_numpy(), Y[:4].to_numpy()))


@pytest.mark.parametrize("make", [RidgeUtility, KnnUtility])
def test_what_is_no_pair(make):
    with pytest.raises(ValueError, match="train as a pair"):
        make(X)
    with pytest.raises(ValueError, match="test as a pair"):
        make((X, Y), X)


def test_queries_with_other_columns():
    with pytest.raises(ValueError, match="columns of x in x_query"):
        neighbours(X, 2, X[["c", "b", "a"]])


def test_a_forest_knows_its_columns():
    forest = RandomForestClassifier(10, random_state=0).fit(X, Y)
    with pytest.raises(ValueError, match="columns that the forest was fitted on"):
        data_oob(forest, X[["c", "b", "a"]], Y)


@pytest.mark.parametrize("folds", [{"folds": 30}, {}])
def test_r2_of_one_number_is_refused_at_once(folds):
    y = RNG.standard_normal(30)
    test = None if folds else (X[:4], np.full(4, 0.5))
    with pytest.raises(ValueError, match=r"expected different y in .* for r2"):
        RidgeUtility((X, y), test, "r2", **folds)
    assert np.isfinite(RidgeUtility((X, y), (X[:4], y[:4]), "r2")([1, 2, 3]))


def test_rows_are_positions_or_a_mask():
    u = FunctionUtility(lambda rows: float((rows + 1).sum()), 4)
    mask = np.array([True, False, False, True])
    assert u(mask) == u([0, 3]) == u(np.array([3, 0], np.uint8)) == 5
    assert u([]) == u(np.zeros(4, bool)) == 0
    for wrong, told in (
        ([True, False, True], r"bool of shape \(3,\)"),
        ([0.0, 1.0], "float64"),
        ([-1], r"from 0 to 3, each once; got -1"),
        ([4], "got 4"),
        ([2, 1, 2], "got 2 twice"),
        ([[0, 1]], r"shape \(1, 2\)"),
        (2, r"shape \(\)"),
        (["a"], "<U1.*names.get_indexer"),
    ):
        with pytest.raises(ValueError, match=told):
            u(wrong)


def test_groups_stay_apart():
    u = FunctionUtility(lambda rows: float(len(rows)), 4)
    with pytest.raises(ValueError, match=r"no label '\(missing\)'"):
        GroupedUtility(u, ["(missing)", None, "a", "a"])
    with pytest.raises(ValueError, match="got 1 and True"):
        GroupedUtility(u, [1, True, 2, 2])
    assert GroupedUtility(u, [None, "a", float("nan"), "a"]).names.tolist() == ["(missing)", "a"]
    assert GroupedUtility(u, ["(missing)", "a", "a", "b"]).n == 3
    assert GroupedUtility(u, [True, False, np.True_, False]).n == 2
    assert GroupedUtility(u, [1, 1.0, 0, 2]).n == 3  # one number


def test_groups_by_several_labels():
    u = FunctionUtility(lambda rows: float(len(rows)), 4)
    pairs = [("web", 0), ("web", 1), ("book", 0), ("web", 0)]
    assert GroupedUtility(u, pairs).names.tolist() == pairs[:3]
    assert GroupedUtility(u, pairs)([0]) == 2
    with pytest.raises(ValueError, match=r"got \('a', 1\) and \('a', True\)"):
        GroupedUtility(u, [("a", 1), ("a", True), "b", "b"])
    with pytest.raises(ValueError, match=r"can be hashed.*got list"):
        GroupedUtility(u, [["web"], ["web"], ["book"], ["book"]])


class Turns:
    """Threads that come in one by one, are in at once, and go in the order in which they came."""

    def __init__(self, work) -> None:
        self.came = threading.Semaphore(0)
        self.may_go = [threading.Event() for _ in range(4)]
        self.done = []
        self.threads = [
            threading.Thread(target=lambda: self.done.append(work()), name=str(i)) for i in range(4)
        ]

    def wait(self) -> None:
        self.came.release()
        assert self.may_go[int(threading.current_thread().name)].wait(10)

    def run(self) -> None:
        for thread in self.threads:
            thread.start()
            assert self.came.acquire(timeout=10)
        for thread, event in zip(self.threads, self.may_go, strict=True):
            event.set()
            thread.join(10)
        assert len(self.done) == len(self.threads)


class Waits(ClassifierMixin, BaseEstimator):
    turns: Turns

    def fit(self, x, y):
        self.classes_ = np.unique(y)
        self.turns.wait()
        warnings.warn("no end", ConvergenceWarning, stacklevel=1)
        return self

    def predict(self, x):
        return np.full(len(x), self.classes_[0])


class WaitingRefit:
    n, output, fingerprint = 30, "loss", None

    def __call__(self, rows, seed):
        return [0.0]

    def many(self, masks, seeds):
        Waits.turns.wait()
        warnings.warn("failed", RuntimeWarning, stacklevel=1)
        return np.zeros((len(masks), 2))


def fit_models():
    u = ModelUtility(Waits(), (X, Y), (X[:4], Y[:4]), "accuracy")
    assert not u.evaluate(np.ones((1, 30), np.bool_)).errors


def train():
    assert not RefitUtility(WaitingRefit(), empty=0.0).evaluate(np.ones((1, 30), np.bool_)).errors


def train_on_none():
    RefitUtility(WaitingRefit())


def grow_trees():
    list(grow(Growth(1, 30, 2, None, 0), X.to_numpy(np.float32), Y.to_numpy(), 2, n_jobs=1))


@pytest.mark.parametrize("work", [fit_models, train, train_on_none, grow_trees])
def test_filters_of_warnings_are_as_before_threads(work, monkeypatch):
    """`warnings.catch_warnings` in threads that overlap leaves what another one had set."""
    fit = ExtraTreeClassifier.fit

    def waiting_fit(self, *args, **kwargs):
        Waits.turns.wait()
        warnings.warn("The number of unique classes is large", UserWarning, stacklevel=1)
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(ExtraTreeClassifier, "fit", waiting_fit)
    Waits.turns = Turns(work)
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        Waits.turns.run()
        assert list(warnings.filters) == inside
    assert list(warnings.filters) == before
    assert not caught


def test_filters_of_overlapping_contexts():
    def small():
        warnings.simplefilter("ignore", RuntimeWarning)

    def large():
        warnings.simplefilter("ignore", UserWarning)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        one, two, again = quiet(small), quiet(large), quiet(small)
        one.__enter__()
        two.__enter__()
        again.__enter__()
        warnings.warn("not shown", RuntimeWarning, stacklevel=1)
        one.__exit__(None, None, None)  # the first to come is the first to go
        warnings.warn("not shown", RuntimeWarning, stacklevel=1)
        again.__exit__(None, None, None)
        warnings.warn("shown", RuntimeWarning, stacklevel=1)
        warnings.warn("not shown", UserWarning, stacklevel=1)
        two.__exit__(None, None, None)
        assert list(warnings.filters) == before
        warnings.warn("shown too", UserWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["shown", "shown too"]


def test_filters_stay_when_trainings_raise():
    class Refit:
        n, output, fingerprint = 5, "loss", None

        def __call__(self, rows, seed):
            return [0.0]

        def many(self, masks, seeds):
            raise ArithmeticError("no")

    before = list(warnings.filters)
    found = RefitUtility(Refit(), empty=0.0).evaluate(np.ones((3, 5), np.bool_))
    assert len(found.errors) == 3
    assert list(warnings.filters) == before


def test_warnings_point_to_the_caller():
    with pytest.warns(UserWarning, match="out of bag for no tree") as caught:
        data_oob(None, X, Y, trees=1)
    assert caught[0].filename == __file__


def test_fingerprints_change_with_the_formula(monkeypatch):
    from upweight.valuation import knn_utility, model_utility, refit_utility, ridge_utility

    def refit(rows, seed):
        return [0.0]

    makes = {
        knn_utility: lambda: KnnUtility((X, Y)),
        ridge_utility: lambda: RidgeUtility((X, Y)),
        model_utility: lambda: ModelUtility(LogisticRegression(), (X, Y)),
        refit_utility: lambda: RefitUtility(refit, n=3, output="loss", empty=0.0, fingerprint="f"),
    }
    for module, make in makes.items():
        before = make().fingerprint
        assert before == make().fingerprint
        monkeypatch.setattr(module, "REVISION", module.REVISION + 1)
        assert make().fingerprint not in (before, None)
