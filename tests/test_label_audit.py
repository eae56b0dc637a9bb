"""`LabelAudit`: scikit-learn's own checks, planted flips, and what must not matter."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_diabetes, load_iris, load_wine
from sklearn.ensemble import HistGradientBoostingClassifier, IsolationForest, RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression, Perceptron, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from torch import nn

from upweight import MLP, LabelAudit
from upweight.auditing.crossvalidated import CrossValidated
from upweight.auditing.effects import row_effects
from upweight.auditing.modules import ModuleJudge
from upweight.auditing.networks import fold_of_rows
from upweight.auditing.planting import plant

QUICK = {"trees": 30, "networks": 1, "planted": 1, "folds": 3}
#: Without what is not looked at: planted rows, and most of the trees.
BARE = {**QUICK, "trees": 20, "planted": 0}
ADAM = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.5)
SHORT = {"epochs": 20, "batch_size": 32, "optimizer": ADAM}


def spoiled(load, seed=1, share=0.1):
    """A data set with planted flips: X, y, which."""
    data = load()
    y, planted = plant(data.target, "classification", share, np.random.default_rng(seed))
    return data.data, y, planted


@pytest.fixture(scope="module")
def iris():
    return spoiled(load_iris)


@pytest.fixture(scope="module")
def wine():
    return spoiled(load_wine)


@cache
def fitted_once(given):
    """On iris."""
    x, y, _ = spoiled(load_iris)
    return LabelAudit(given, **QUICK).fit(x, y)


def mixed_frame(x):
    """The first columns of wine as a table of texts, truth values, numbers and missing cells."""
    frame = pd.DataFrame(x[:, 3:], columns=[f"c{at}" for at in range(3, x.shape[1])])
    frame.insert(0, "size", pd.cut(x[:, 0], 4, labels=["s", "m", "l", "xl"]).astype(str))
    frame.insert(1, "sour", x[:, 1] > 2)
    return frame


def encoded(last):
    texts = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["size", "sour"]), remainder=StandardScaler()
    )
    return make_pipeline(texts, last)


def skorch_net(inputs, outputs=3, kind=NeuralNetClassifier, **options):
    layers = [inputs, 32, outputs]
    options.setdefault("criterion", nn.CrossEntropyLoss)
    return kind(
        MLP,
        module__sizes=layers,
        optimizer=torch.optim.Adam,
        lr=0.02,
        max_epochs=12,
        batch_size=32,
        train_split=None,
        verbose=0,
        **options,
    )


@pytest.mark.filterwarnings("ignore:classes with a single row")
@parametrize_with_checks([LabelAudit(trees=20, networks=1, planted=1, folds=2)])
def test_scikit_learn_agrees(estimator, check):
    check(estimator)


SCALED = make_pipeline(StandardScaler(), LogisticRegression())
GIVEN = {
    "none": lambda d: None,
    "logistic": lambda d: SCALED,
    "margins": lambda d: make_pipeline(StandardScaler(), LinearSVC()),
    "forest": lambda d: RandomForestClassifier(50, min_samples_leaf=3),
    "skorch": lambda d: make_pipeline(StandardScaler(), skorch_net(d)),
    "module": lambda d: MLP([d, 32, 3], seed=0),
}


@pytest.mark.parametrize(
    ("given", "data"),
    [*((given, "wine") for given in GIVEN), ("none", "iris"), ("logistic", "iris")],
)
@pytest.mark.slow
def test_planted_flips_are_suspicious(given, data, request):
    x, y, planted = request.getfixturevalue(data)
    training = SHORT if given == "module" else None
    audit = LabelAudit(GIVEN[given](x.shape[1]), **QUICK, training=training).fit(x, y)
    assert roc_auc_score(planted, audit.suspicion_) >= 0.98
    flagged = audit.label_flag_
    assert planted[flagged].mean() >= 0.7
    assert flagged[planted].mean() >= 0.7
    proposed = audit.proposed_[planted & flagged]
    true = {"iris": load_iris, "wine": load_wine}[data]().target[planted & flagged]
    assert (proposed == true).mean() >= 0.9
    if given != "none":
        alone = 1 - audit.judges_["estimator"][np.arange(len(y)), y]
        assert roc_auc_score(planted, alone) >= 0.94
    assert ("influence_" in vars(audit)) == (given == "module")


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame], ids=["pandas", "polars"])
@pytest.mark.slow
def test_a_pipeline_gets_the_frame_as_it_is(wine, make):
    x, y, planted = wine
    frame = mixed_frame(x)
    frame = make({name: frame[name].tolist() for name in frame})
    audit = LabelAudit(encoded(LogisticRegression()), **QUICK).fit(frame, y)
    assert roc_auc_score(planted, audit.suspicion_) >= 0.98
    assert audit.feature_names_in_.tolist() == list(frame.columns)
    assert audit.n_features_in_ == frame.shape[1]


@pytest.mark.slow
def test_a_net_of_skorch_at_the_end_of_a_pipeline_gets_single_precision(wine):
    x, y, planted = wine
    names = np.array(["third", "first", "second"])[y]
    frame = mixed_frame(x)
    width = encoded("passthrough").fit(frame).transform(frame).shape[1]
    audit = LabelAudit(encoded(skorch_net(width)), **QUICK).fit(frame, names)
    assert roc_auc_score(planted, audit.suspicion_) >= 0.98
    assert audit.classes_.tolist() == ["first", "second", "third"]
    named = audit.classes_[audit.judges_["estimator"].argmax(axis=1)]
    assert (named == names)[~planted].mean() > 0.9


@pytest.mark.slow
def test_a_net_of_skorch_in_a_search_gets_single_precision(iris):
    x, y, planted = iris
    search = GridSearchCV(skorch_net(4), {"optimizer__weight_decay": [0.0, 0.1]}, cv=2)
    audit = LabelAudit(search, **BARE).fit(x, np.array(["u", "v", "w"])[y])
    alone = 1 - audit.judges_["estimator"][np.arange(len(y)), y]
    assert roc_auc_score(planted, alone) > 0.9


def test_other_nets_of_skorch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 3))
    number = x @ [1.0, -2.0, 0.5] + 0.1 * rng.normal(size=90)
    net = skorch_net(3, 1, NeuralNetRegressor, criterion=nn.MSELoss)
    audit = LabelAudit(net, **BARE).fit(x, number)
    assert audit.task_ == "regression"
    assert np.corrcoef(audit.judges_["estimator"], number)[0, 1] > 0.95
    net = skorch_net(3, 1, NeuralNetBinaryClassifier, criterion=nn.BCEWithLogitsLoss)
    audit = LabelAudit(net, **BARE).fit(x, np.where(number > 0, "up", "down"))
    assert ((audit.judges_["estimator"][:, 1] > 0.5) == (number > 0)).mean() > 0.9


@pytest.mark.slow
def test_missing_numbers_are_no_problem_where_the_estimator_takes_them(wine):
    x, y, planted = wine
    x = np.where(np.random.default_rng(0).random(x.shape) < 0.05, np.nan, x)
    audit = LabelAudit(HistGradientBoostingClassifier(max_iter=20), **QUICK).fit(x, y)
    assert roc_auc_score(planted, audit.suspicion_) >= 0.97
    with pytest.raises(ValueError, match="impute"):
        LabelAudit(MLP([13, 3]), **QUICK).fit(x, y)


@pytest.mark.slow
def test_suspicion_is_what_the_formula_says(iris):
    _, y, _ = iris
    audit = fitted_once(SCALED)
    assert list(audit.judges_) == list(audit.weights_)
    assert set(audit.judges_) == {"forest", "network", "neighbours", "estimator"}
    assert sum(audit.weights_.values()) == pytest.approx(1)
    mixed = sum(audit.weights_[name] * view for name, view in audit.judges_.items())
    np.testing.assert_allclose(audit.suspicion_, 1 - mixed[np.arange(len(y)), y], atol=1e-6)
    np.testing.assert_array_equal(audit.proposed_, mixed.argmax(axis=1))
    flagged = (audit.suspicion_ > audit.threshold_) & (audit.proposed_ != y)
    np.testing.assert_array_equal(audit.label_flag_, flagged)
    low, high = audit.expected_precision_[1:]
    assert 0 <= low <= audit.expected_precision_[0] <= high <= 1
    assert 0.02 < audit.noise_ < 0.3


@pytest.mark.slow
def test_the_estimator_judges_the_planted_rows_too(iris):
    """Rows that are keys of a book which only the estimator has: it carries the calibration."""
    x, y, planted = iris
    keys = np.random.default_rng(0).normal(size=(len(y), 1))
    right = fitted_once(SCALED)
    blind = LabelAudit(**QUICK).fit(keys, y)
    knows = LabelAudit(_Book(dict(zip(keys[:, 0].tolist(), x, strict=True))), **QUICK).fit(keys, y)
    assert blind.expected_precision_ is None or blind.expected_precision_[0] < 0.6
    assert knows.weights_["estimator"] > 0.9
    assert knows.noise_ == pytest.approx(right.noise_, abs=0.05)
    assert knows.label_flag_[planted].mean() > 0.7
    assert knows.expected_precision_[0] > 0.7


class _Book(ClassifierMixin, BaseEstimator):
    """Logistic regression on what a book says of the rows."""

    def __init__(self, book):
        self.book = book

    def fit(self, x, y):
        self.model_ = clone(SCALED).fit(self.read(x), y)
        self.classes_ = self.model_.classes_
        return self

    def read(self, x):
        return np.stack([self.book[key] for key in x[:, 0].tolist()])

    def predict(self, x):
        return self.model_.predict(self.read(x))

    def predict_proba(self, x):
        return self.model_.predict_proba(self.read(x))


class _Plain(ClassifierMixin, BaseEstimator):
    """Logistic regression without probabilities."""

    def fit(self, x, y):
        self.model_ = clone(SCALED).fit(x, y)
        self.classes_ = self.model_.classes_
        return self

    def predict(self, x):
        return self.model_.predict(x)


# --- the estimator's out-of-fold predictions


def crossvalidated(estimator, x, y, folds=3):
    judge = CrossValidated(estimator, x, "classification", np.arange(y.max() + 1), folds)
    cv = PredefinedSplit(fold_of_rows(y, "classification", folds, 0))
    return judge(np.arange(len(y)), y, 0), cv


def test_probabilities_are_those_of_cross_val_predict(iris):
    x, y, _ = iris
    found, cv = crossvalidated(SCALED, x, y)
    expected = cross_val_predict(SCALED, x, y, cv=cv, method="predict_proba")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("classes", [2, 3])
def test_margins_get_the_temperature_that_explains_the_labels_best(iris, classes):
    x, y, _ = iris
    x, y = x[y < classes], y[y < classes]
    machine = make_pipeline(StandardScaler(), Perceptron(random_state=0))
    found, cv = crossvalidated(machine, x, y)
    margins = cross_val_predict(machine, x, y, cv=cv, method="decision_function")
    if classes == 2:
        margins = np.stack([np.zeros(len(y)), margins], axis=1)
    losses = [
        -np.log(np.clip(softmax(margins / t, axis=1)[np.arange(len(y)), y], 1e-4, 1)).mean()
        for t in np.exp(np.linspace(-6, 6, 400))
    ]
    given = np.clip(found[np.arange(len(y)), y], 1e-4, 1)
    assert -np.log(given).mean() <= min(losses) + 1e-4
    np.testing.assert_array_equal(found.argmax(axis=1), margins.argmax(axis=1))


def test_predictions_alone_get_the_error_rate(iris):
    x, y, _ = iris
    found, cv = crossvalidated(_Plain(), x, y)
    predicted = cross_val_predict(_Plain(), x, y, cv=cv)
    wrong = (predicted != y).mean()
    expected = np.where(np.eye(3)[predicted] == 1, 1 - wrong, wrong / 2)
    np.testing.assert_allclose(found, expected)


def test_a_class_that_a_fold_does_not_know_has_no_probability():
    x = np.arange(12.0)[:, None]
    y = np.array([0] * 6 + [1] * 5 + [2])
    found, _ = crossvalidated(LogisticRegression(), x, y)
    assert found[-1, 2] == 0
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_numbers_are_those_of_cross_val_predict():
    x, y = load_diabetes(return_X_y=True)
    judge = CrossValidated(Ridge(), x, "regression", None, 3)
    cv = PredefinedSplit(fold_of_rows(y, "regression", 3, 0))
    found = judge(np.arange(len(y)), y, 0)
    np.testing.assert_array_equal(found, cross_val_predict(Ridge(), x, y, cv=cv))


def test_an_error_of_the_estimator_says_where(iris):
    x, y, _ = iris
    with pytest.raises(ValueError, match="C") as raised:
        LabelAudit(LogisticRegression(C=-1), **QUICK).fit(x, y)
    assert any("LogisticRegression in fold 1 of 3" in note for note in raised.value.__notes__)


class _Strange(_Plain):
    def predict(self, x):
        return super().predict(x) + 10


def test_predictions_that_are_no_labels_are_refused(iris):
    x, y, _ = iris
    with pytest.raises(ValueError, match=r"_Strange to predict labels of y; got 1[0-2]"):
        LabelAudit(_Strange(), **QUICK).fit(x, y)


class _Nan(_Plain):
    def predict_proba(self, x):
        return np.full((len(x), 3), np.nan)


def test_predictions_that_are_not_finite_are_refused(iris):
    x, y, _ = iris
    with pytest.raises(ValueError, match="finite predictions of _Nan"):
        LabelAudit(_Nan(), **QUICK).fit(x, y)


# --- networks


@pytest.mark.slow
def test_a_network_is_not_touched_and_what_it_has_learnt_does_not_leak(iris):
    x, y, _ = iris
    x, y = x[::3], y[::3]
    learnt = MLP([4, 32, 3], seed=0)
    optimizer = torch.optim.Adam(learnt.parameters(), lr=0.05)
    inputs, targets = torch.tensor(x - x.mean(axis=0)).float(), torch.tensor(y)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(learnt(inputs), targets).backward()
        optimizer.step()
    before = copy.deepcopy(learnt.state_dict())
    options = {**BARE, "training": SHORT}
    found = LabelAudit(learnt, **options).fit(x, y)
    fresh = LabelAudit(MLP([4, 32, 3], seed=5), **options).fit(x, y)
    np.testing.assert_array_equal(found.judges_["estimator"], fresh.judges_["estimator"])
    for name, value in learnt.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.slow
def test_the_weight_decay_is_the_one_that_explains_left_out_rows_best(iris):
    x, y, _ = iris
    inputs = torch.tensor(x - x.mean(axis=0)).float()
    options = {"epochs": 5, "batch_size": 32}
    net = MLP([4, 16, 3], seed=0)
    judge = ModuleJudge(net, inputs, "classification", np.arange(3), 3, options)
    chosen, fit = judge.decided(y, 0, 1)
    losses = {}
    for decay in (0.1, 1.0, 3.0):
        optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=decay)
        other = replace(judge, training={**options, "optimizer": optimizer})
        given = other(np.arange(len(y)), y, 0)[np.arange(len(y)), y]
        losses[decay] = -np.log(given).mean()
    best = min(losses, key=lambda decay: losses[decay])
    assert chosen.training["optimizer"].keywords["weight_decay"] == best
    given = fit.mean[np.arange(len(y)), y]
    assert -np.log(given).mean() == pytest.approx(losses[best], rel=1e-5)


def test_a_sample_without_a_class_has_outputs_for_all():
    judge = ModuleJudge(MLP([2, 3]), torch.randn(9, 2), "classification", np.arange(3), 2, SHORT)
    assert judge.problem(np.arange(9), np.array([0, 1] * 4 + [0])).outputs == 3
    assert judge(np.arange(9), np.array([0, 1] * 4 + [0]), 0).shape == (9, 3)


class _Shifted(nn.Module):
    """A linear layer, and a parameter of its own that prefers one output."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.dead = nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.tensor([0.0, 9.0, 0.0]))

    def forward(self, x):
        return self.body(x) + self.shift + 0 * self.dead(x)


@pytest.mark.slow
def test_outputs_stand_for_the_sorted_classes(iris):
    """Labels whose first rows are not in their order; and a layer that does nothing."""
    x, y, _ = iris
    names = np.array(["c", "a", "b"])[y]
    audit = LabelAudit(_Shifted(), **{**BARE, "training": {**SHORT, "epochs": 1}}).fit(x, names)
    assert (audit.classes_[audit.judges_["estimator"].argmax(axis=1)] == "b").all()
    assert np.abs(audit.influence_).max() > 0


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.slow
def test_networks_for_numbers(flat):
    x, y = load_diabetes(return_X_y=True)
    x, y = x[:150], 1000 + y[:150]
    y, planted = plant(y, "regression", 0.05, np.random.default_rng(0))
    net = nn.Sequential(MLP([10, 1], seed=0), *([nn.Flatten(0)] if flat else []))
    audit = LabelAudit(net, **BARE, training=SHORT).fit(x, y)
    assert audit.task_ == "regression"
    assert np.corrcoef(audit.judges_["estimator"][~planted], y[~planted])[0, 1] > 0.5
    assert audit.proposed_.mean() == pytest.approx(y.mean(), rel=0.05)
    assert np.isfinite(audit.influence_).all()


@pytest.mark.slow
def test_influence_goes_through_the_network(iris):
    x, y, planted = iris
    audit = LabelAudit(MLP([4, 16, 3]), **BARE, training=SHORT).fit(x, y)
    standard = (x - x.mean(axis=0)) / x.std(axis=0)
    inputs = torch.tensor(standard).float()
    judge = ModuleJudge(MLP([4, 16, 3]), inputs, "classification", np.arange(3), 3, SHORT)
    everyone = np.arange(len(y))
    expected = row_effects(judge.problem(everyone, y), judge.fit(everyone, y, 0, 1))
    np.testing.assert_allclose(audit.influence_, expected.influence, rtol=1e-3, atol=1e-6)
    assert roc_auc_score(planted, audit.self_influence_) > 0.9
    assert roc_auc_score(planted, -audit.influence_) > 0.75


@pytest.mark.slow
def test_influence_without_a_network_is_that_of_the_built_in_ones(iris):
    x, y, planted = iris
    audit = LabelAudit(SCALED, influence=True, **BARE).fit(x, y)
    assert roc_auc_score(planted, audit.self_influence_) > 0.9
    assert not hasattr(LabelAudit(**BARE).fit(x, y), "influence_")


def test_layers_without_kronecker_factors_are_no_problem(iris):
    x, y, _ = iris
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1))
    net = nn.Sequential(net, nn.LayerNorm(8), nn.Linear(8, 3))
    audit = LabelAudit(net, **{**BARE, "training": {**SHORT, "epochs": 3}}).fit(x[::2], y[::2])
    assert np.isfinite(audit.influence_).all()


# --- what must not matter


@pytest.mark.parametrize(
    "names",
    [[1, 2, 3], [2, 0, 1], ["b", "c", "a"], [0.0, 7.0, -3.0]],
    ids=["from 1", "cyclic", "texts", "floats"],
)
@pytest.mark.parametrize("given", [None, SCALED], ids=["none", "logistic"])
@pytest.mark.slow
def test_names_of_classes_do_not_matter(iris, names, given):
    x, y, _ = iris
    names = np.array(names)
    plain = fitted_once(given)
    named = LabelAudit(given, **QUICK).fit(x, names[y])
    atol = 0 if given is None else 1e-3
    np.testing.assert_allclose(named.suspicion_, plain.suspicion_, atol=atol)
    np.testing.assert_array_equal(named.label_flag_, plain.label_flag_)
    np.testing.assert_array_equal(named.proposed_, names[plain.proposed_])
    assert named.proposed_.dtype == names.dtype
    np.testing.assert_array_equal(named.classes_, np.unique(names))
    place = np.searchsorted(named.classes_, names)
    for name, view in plain.judges_.items():
        np.testing.assert_allclose(named.judges_[name][:, place], view, atol=1e-3)


@pytest.mark.slow
def test_truth_values_are_classes(iris):
    x, y, planted = iris
    audit = LabelAudit(SCALED, **QUICK).fit(x, y == 0)
    assert audit.classes_.tolist() == [False, True]
    assert audit.proposed_.dtype == bool
    changed = planted & ((y == 0) != (load_iris().target == 0))
    assert roc_auc_score(changed, audit.suspicion_) >= 0.98


@pytest.mark.slow
def test_the_order_of_rows_does_not_matter_but_for_chance(iris):
    x, y, _ = iris
    order = np.random.default_rng(0).permutation(len(y))
    plain = LabelAudit(SCALED, **{**QUICK, "trees": 300}).fit(x, y)
    moved = LabelAudit(SCALED, **{**QUICK, "trees": 300}).fit(x[order], y[order])
    for name in ("suspicion_", "proposed_", "label_flag_"):
        assert len(getattr(moved, name)) == len(y)
    np.testing.assert_allclose(moved.suspicion_, plain.suspicion_[order], atol=0.25)
    assert np.corrcoef(moved.suspicion_, plain.suspicion_[order])[0, 1] > 0.95
    assert (moved.proposed_ == plain.proposed_[order]).mean() > 0.95
    neighbours = plain.judges_["neighbours"][order]
    assert (moved.judges_["neighbours"] == neighbours).all(axis=1).mean() > 0.9  # but for ties


@pytest.mark.slow
def test_the_seed_decides_and_nothing_else(iris):
    x, y, _ = iris
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    given = RandomForestClassifier(10)
    audits = [LabelAudit(given, **QUICK, seed=s).fit(x, y) for s in (0, 0, 1)]
    same, again, other = (audit.suspicion_ for audit in audits)
    np.testing.assert_array_equal(same, again)
    assert np.abs(same - other).max() > 1e-3
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert (torch.get_rng_state() == torch_state).all()


@pytest.mark.slow
def test_frames_lists_and_arrays_of_the_same_numbers_are_the_same(iris):
    x, y, _ = iris
    plain = LabelAudit(**BARE).fit(x, y)
    frame = pd.DataFrame(x, columns=list("abcd"), index=np.arange(len(x))[::-1])
    for other in (frame, x.tolist(), pl.DataFrame(frame)):
        found = LabelAudit(**BARE).fit(other, pd.Series(y, index=frame.index))
        np.testing.assert_array_equal(found.suspicion_, plain.suspicion_)


@pytest.mark.slow
def test_a_pipeline_finds_the_columns_of_a_frame_of_numbers_by_name(iris):
    x, y, planted = iris
    frame = pd.DataFrame(x, columns=list("abcd"), index=np.arange(len(x))[::-1])
    some = make_pipeline(
        make_column_transformer((StandardScaler(), ["c", "d"])), LogisticRegression()
    )
    for rows in (frame, pl.DataFrame(frame)):
        audit = LabelAudit(some, **BARE).fit(rows, y)
        alone = 1 - audit.judges_["estimator"][np.arange(len(y)), y]
        assert roc_auc_score(planted, alone) > 0.94


@pytest.mark.slow
def test_numbers_that_look_like_names_of_rows_are_features():
    rng = np.random.default_rng(0)
    x = np.sort(rng.permutation(1000)[:60])
    y = (x > 500).astype(int)
    y[5] = 1 - y[5]
    assert LabelAudit(**QUICK).fit(x[:, None], y).suspicion_.argmax() == 5
    frame = pd.DataFrame({"id": x, "text": rng.choice(["u", "v"], 60)})
    assert LabelAudit(**QUICK).fit(frame, y).suspicion_.argmax() == 5


# --- targets


@pytest.mark.slow
def test_numbers_are_regression_unless_they_are_classes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    number = x[:, 0] * 3
    wrong = number.copy()
    wrong[7] += 12
    audit = LabelAudit(LinearRegression(), **QUICK).fit(x, wrong)
    assert audit.task_ == "regression"
    assert audit.suspicion_.argmax() == 7
    assert audit.proposed_[7] == pytest.approx(number[7], abs=1.5)
    assert not hasattr(audit, "classes_")
    assert LabelAudit(**BARE).fit(x, (number > 0).astype(float)).task_ == "classification"
    counted = np.round(100 * number).astype(int)
    assert LabelAudit(**BARE).fit(x, counted).task_ == "regression"
    assert LabelAudit(Ridge(), **BARE).fit(x, (number > 0).astype(int)).task_ == "regression"


def test_a_class_with_a_single_row_is_told():
    x = np.arange(20.0)[:, None]
    y = np.array(["low"] * 10 + ["high"] * 9 + ["odd"])
    with pytest.warns(UserWarning, match=r"single row: \['odd'\], in rows \[19\]"):
        audit = LabelAudit(**QUICK).fit(x, y)
    assert audit.suspicion_.argmax() == 19


@pytest.mark.parametrize("seed", range(5))
def test_planting_leaves_every_class_a_row(seed):
    y = np.repeat(np.arange(6), 2)
    found, planted = plant(y, "classification", 0.8, np.random.default_rng(seed))
    assert set(found) == set(y)
    np.testing.assert_array_equal(planted, found != y)
    assert planted.any()


# --- refused

X, Y = load_iris(return_X_y=True)


@pytest.mark.parametrize(
    ("audit", "x", "y", "message"),
    [
        (LabelAudit(folds=1), X, Y, "folds == 1, must be >= 2"),
        (LabelAudit(task="ranking"), X, Y, "expected the task"),
        (LabelAudit(folds=80), X, Y, "folds of two rows or more"),
        (LabelAudit(), X[:9], Y[:9], "minimum of 10"),
        (LabelAudit(), X, Y[:-1], "inconsistent"),
        (LabelAudit(), X[:40], Y[:40], "1 class or number, 0, in all 40 rows"),
        (LabelAudit(), X, np.arange(150).astype(str), "task='regression'"),
        (LabelAudit(task="regression"), X, Y.astype(str).astype(object) + "?", "numbers as y"),
        (LabelAudit(), X, np.where(Y == 1, None, Y), "missing in 50 rows, the first is row 50"),
        (LabelAudit(), np.full_like(X, np.inf), Y, "infinity"),
        (LabelAudit(Ridge(), task="classification"), X, Y, "Ridge is for regression"),
        (LabelAudit(SCALED, training={"epochs": 3}), X, Y, "for a torch.nn.Module"),
        (LabelAudit(MLP([4, 3]), training={"steps": 3}), X, Y, r"got \['steps'\]"),
        (LabelAudit(MLP([4, 1])), X, Y, r"outputs \(2, 3\) of the network"),
        (LabelAudit(MLP([4, 2]), task="regression"), X, Y, r"\(2, 1\) or \(2,\)"),
        (LabelAudit(MLP([4, 3])), pd.DataFrame({"a": ["u", "v"] * 75}), Y, "columns of numbers"),
    ],
)
def test_refused(audit, x, y, message):
    with pytest.raises(ValueError, match=message):
        audit.fit(x, y)


@pytest.mark.parametrize(
    "given", [LogisticRegression, "logistic", StandardScaler(), IsolationForest()]
)
def test_what_is_no_estimator_is_refused(given):
    with pytest.raises(TypeError, match="expected a classifier or regressor"):
        LabelAudit(given).fit(X, Y)


def test_a_training_that_diverges_is_refused(iris):
    x, y, _ = iris
    training = {"epochs": 5, "optimizer": lambda p: torch.optim.SGD(p, lr=1e30)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(FloatingPointError, match="lower learning rate"):
            LabelAudit(MLP([4, 8, 3]), **BARE, training=training).fit(x, y)


@pytest.mark.slow
def test_more_rows_than_are_planted_into():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(21_000, 4))
    y, planted = plant((x[:, 0] > 0).astype(int), "classification", 0.05, rng)
    audit = LabelAudit(SCALED, **{**QUICK, "planted": 3}).fit(x, y)
    assert roc_auc_score(planted, audit.suspicion_) > 0.97
    assert audit.noise_ == pytest.approx(0.05, abs=0.01)
    assert audit.expected_precision_[0] == pytest.approx(planted[audit.label_flag_].mean(), abs=0.1)
