"""KNN-Shapley against the definition, summed over all subsets."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import scale

from upweight.valuation import knn_judge, knn_proba, knn_shapley


def worth(*args, **how):
    return knn_shapley(*args, **how).values


def rows(n=60, d=3, classes=3, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 3, (n, d)).astype(float) if ties else rng.normal(size=(n, d))
    y = rng.permutation(np.arange(n) % classes)
    return x, y


def ranked(x, x_test, itself):
    """All players of each test row by distance; ties as they were broken, seen to be ties."""
    order = knn_judge(x, x_test=None if itself else x_test, k=1, keep=len(x) - itself).indices
    for i, point in enumerate(x_test):
        distances = ((x[order[i]] - point) ** 2).sum(axis=1)
        assert (np.diff(distances) > -1e-12).all()
        assert set(order[i]) == set(range(len(x))) - ({i} if itself else set())
    return order.tolist()


def utility(members, order, y, y_test, *, k, task):
    """Of a set of training rows: one test row and one neighbour at a time."""
    mean, total = (np.mean(y) if task == "regression" else 0), 0.0
    for others, target in zip(order, y_test, strict=True):
        near = [j for j in others if j in members][:k]
        if task == "classification":
            total += sum(y[j] == target for j in near) / k
        else:
            total -= (sum(y[j] - mean for j in near) / k - (target - mean)) ** 2
    return total / len(y_test)


def shapley(n, u):
    """Over all subsets, by the definition."""
    sets = [[j for j in range(n) if mask >> j & 1] for mask in range(2**n)]
    worth = [u(members) for members in sets]
    values = np.zeros(n)
    for mask, members in enumerate(sets):
        weight = 1 / (n * math.comb(n - 1, len(members))) if len(members) < n else 0
        for j in set(range(n)) - set(members):
            values[j] += weight * (worth[mask | 1 << j] - worth[mask])
    return values


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("itself", [False, True])
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.data())
def test_equals_the_sum_over_all_subsets(task, itself, seed, n, data):
    rng = np.random.default_rng(seed)
    how = {"k": data.draw(st.integers(1, n - itself)), "task": task}
    x, y = rows(n, 2, 2, seed, ties=data.draw(st.booleans()))
    x_test, y_test = rng.normal(size=(3, 2)), rng.integers(0, 3, 3)
    if task == "regression":
        y, y_test = rng.normal(10, 3, n), rng.normal(10, 3, 3)
    if itself:
        x_test, y_test = x, y
    args = (x, y) if itself else (x, y, x_test, y_test)
    values = worth(*args, **how)
    order = ranked(x, x_test, itself)
    exact = shapley(n, lambda members: utility(members, order, y, y_test, **how))
    np.testing.assert_allclose(values, exact, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(["classification", "regression"]))
def test_values_sum_to_the_gain_over_no_rows_also_when_truncated(seed, itself, task):
    rng = np.random.default_rng(seed)
    x, y = rows(40, 3, 3, seed, ties=seed % 2 == 0)
    x_test, y_test = (x, y) if itself else (rng.normal(size=(7, 3)), rng.integers(0, 3, 7))
    args = (x, y) if itself else (x, y, x_test, y_test)
    k = int(rng.integers(1, 12))
    order = ranked(x, x_test, itself)
    u = [utility(s, order, y, y_test, k=k, task=task) for s in (range(40), [])]
    for truncate in (None, k, 15, 39):
        values = worth(*args, k=k, task=task, truncate=truncate)
        assert values.sum() == pytest.approx(u[0] - u[1], abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_invariances(seed, k):
    x, y = rows(50, 4, 3, seed)
    values = worth(x, y, k=k)
    rng = np.random.default_rng(seed)
    order = rng.permutation(50)
    moved = 4 * x[order][:, rng.permutation(4)] + 0.5
    np.testing.assert_allclose(worth(moved, y[order], k=k), values[order], atol=1e-15)
    renamed = np.array(["c", "a", "b"])[y]
    np.testing.assert_array_equal(worth(x, renamed, k=k).round(14), values.round(14))
    z = x.sum(axis=1)
    numbers = worth(x, z, k=k, task="regression")
    np.testing.assert_allclose(
        worth(x, 10 - 3 * z, k=k, task="regression"), 9 * numbers, atol=1e-12
    )


@pytest.mark.parametrize(
    "names",
    [
        np.array([1, 2]),
        np.array([-5.0, 7.0]),
        np.array([False, True]),
        np.array(["no", "yes"]),
        np.array(["no", "yes"], dtype=object),
        np.array([False, True], dtype=object),
        np.array(["2020-01-01", "2021-01-01"], dtype="datetime64[D]"),
    ],
    ids=str,
)
def test_labels_of_any_type(names):
    x, y = rows(30, 2, 2)
    plain = worth(x, y, x[:5] + 0.1, y[:5])
    np.testing.assert_array_equal(worth(x, names[y], x[:5] + 0.1, names[y[:5]]), plain)
    np.testing.assert_array_equal(worth(x, list(names[y])), worth(x, y))


def test_test_labels_that_no_training_row_has_match_nothing():
    x, y = rows(20, 2, 2)
    values = worth(x, y, x[:1], np.array([7]))
    np.testing.assert_array_equal(values, np.zeros(20))
    assert (worth(x, y, x[:1], np.array([7]), truncate=10) == 0).all()


def test_two_rows_that_are_equal_are_worth_the_same_to_others():
    x, y = rows(30, 2, 2)
    x[1], y[1] = x[0], y[0]
    values = worth(x, y, x[5:] + 0.01, y[5:], k=5)
    assert values[0] == pytest.approx(values[1], abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("truncate", [None, 20])
def test_batch_size_and_threads_change_nothing(ties, truncate):
    x, y = rows(331, 3, 3, ties=ties)
    x = x.astype(np.float32) / 7
    first = knn_judge(x, y, keep=20, truncate=truncate)
    for options in ({"batch_size": 1}, {"batch_size": 7, "n_jobs": 2}, {"batch_size": 330}):
        other = knn_judge(x, y, keep=20, truncate=truncate, **options)
        np.testing.assert_array_equal(other.indices, first.indices)
        np.testing.assert_array_equal(other.distances, first.distances)
        np.testing.assert_allclose(other.values, first.values, rtol=0, atol=1e-15)
    again = knn_judge(x, y, keep=20, truncate=truncate, n_jobs=2)
    np.testing.assert_array_equal(again.values, first.values)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10), st.integers(10, 150))
def test_truncation_changes_little_and_does_so_within_the_bound(seed, k, truncate):
    rng = np.random.default_rng(seed)
    x, y = rows(200, 2, 3, seed)
    one = rng.normal(size=(1, 2))  # a single test row: values are what it contributes
    full = worth(x, y, one, [0], k=k)
    short = worth(x, y, one, [0], k=k, truncate=truncate)
    assert 0 < np.abs(short - full).max() < 1 / truncate
    y = rng.normal(size=200)
    full = worth(x, y, one, [0.3], k=k)
    short = worth(x, y, one, [0.3], k=k, truncate=truncate)
    assert 0 < np.abs(short - full).max() < 40 * np.abs(y - y.mean()).max() ** 2 / truncate


def test_truncation_at_all_players_is_none():
    x, y = rows(30)
    np.testing.assert_array_equal(worth(x, y, truncate=29), worth(x, y))
    np.testing.assert_array_equal(worth(x, y, truncate=500), worth(x, y))


def test_more_neighbours_can_be_kept_than_are_valued():
    x, y = rows(40, ties=True)
    judged = knn_judge(x, y, truncate=7, keep=20)
    np.testing.assert_array_equal(judged.values, worth(x, y, truncate=7))
    np.testing.assert_array_equal(judged.indices, knn_judge(x, y, keep=20).indices)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("block", [None, 45])
@pytest.mark.parametrize("keep", [5, 39])  # 39: all players of the smaller of the blocks
def test_other_labels_are_valued_from_what_was_kept(task, block, keep, monkeypatch):
    monkeypatch.setattr("upweight.valuation.judgement.REVALUED", 300)  # several batches
    x, y = rows(121, 2, 3, ties=True)
    other = np.roll(y, 5) if task == "classification" else np.sin(np.arange(121.0))
    options = {"k": 4, "task": task, "truncate": keep, "block": block, "seed": 3}
    judged = knn_judge(x, y, keep=keep, **options)
    np.testing.assert_allclose(judged.revalue(y), judged.values, atol=1e-15)
    fresh = worth(x, other, **options)
    np.testing.assert_allclose(judged.revalue(other), fresh, atol=1e-15)
    np.testing.assert_array_equal(judged.revalue(other, n_jobs=2), judged.revalue(other))
    unlabelled = knn_judge(x, k=4, keep=keep, block=block, seed=3)
    assert unlabelled.values is None
    np.testing.assert_allclose(unlabelled.revalue(other, task=task), fresh, atol=1e-15)


def test_other_labels_are_valued_exactly_where_everything_was_kept():
    x, y = rows(40)
    judged = knn_judge(x, y, keep=39)
    np.testing.assert_allclose(judged.revalue(y[::-1]), worth(x, y[::-1]), atol=1e-15)
    x_test, y_test = rows(9, seed=1)
    judged = knn_judge(x, y, x_test, y_test, keep=40)
    fresh = worth(x, y[::-1], x_test, y_test)
    np.testing.assert_allclose(judged.revalue(y[::-1], y_test), fresh, atol=1e-15)


def test_blocks_are_judged_apart():
    x, y = rows(100, 2, 3)
    judged = knn_judge(x, y, block=30, seed=5)
    assert sorted(np.bincount(judged.parts)) == [25, 25, 25, 25]
    for part in range(4):
        inside = np.flatnonzero(judged.parts == part)
        assert set(judged.indices[inside].ravel()) <= set(inside)
        alone = worth(x[inside], y[inside]) * 25 / 100
        np.testing.assert_allclose(judged.values[inside], alone, atol=1e-15)
    again, other = (knn_judge(x, y, block=30, seed=seed).parts for seed in (5, 6))
    np.testing.assert_array_equal(again, judged.parts)
    assert (other != judged.parts).any()
    np.testing.assert_array_equal(worth(x, y, block=100), worth(x, y))


def test_truncated_blocks_still_sum_to_the_gain():
    x, y = rows(100, 2, 3)
    judged = knn_judge(x, y, block=30, truncate=8)
    agree = y[judged.indices] == y[:, None]
    assert judged.values.sum() == pytest.approx(agree.mean(), abs=1e-12)


def test_votes_of_the_neighbours():
    x, y = rows(50, 2, 3)
    names = np.array(["r", "s", "t"])[y]
    judged = knn_judge(x, names, k=5, keep=12)
    proba, classes = knn_proba(judged.indices, names, k=5)
    assert classes.tolist() == ["r", "s", "t"]
    expected = [[(names[near[:5]] == c).mean() for c in "rst"] for near in judged.indices]
    np.testing.assert_allclose(proba, expected)
    np.testing.assert_allclose(proba[np.arange(50), y].mean(), judged.values.sum())


def flipped(y, share, seed):
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(len(y)) < round(share * len(y))
    classes = y.max() + 1
    return np.where(wrong, (y + rng.integers(1, classes, len(y))) % classes, y), wrong


# Measured, mean of ten seeds: 1.000 digits, 0.994 wine, 0.986 iris, whose classes overlap.
@pytest.mark.parametrize(
    ("load", "area"), [(load_digits, 0.999), (load_wine, 0.99), (load_iris, 0.975)]
)
@pytest.mark.parametrize("truncate", [None, 50])
def test_finds_flipped_labels(load, area, truncate):
    x, y = load(return_X_y=True)
    x = x if load is load_digits else scale(x)
    areas = []
    for seed in range(3):
        labels, wrong = flipped(y, 0.1, seed)
        values = worth(x, labels, truncate=truncate)
        areas.append(roc_auc_score(wrong, -values))
    assert np.mean(areas) >= area


def test_finds_a_wrong_number():
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (300, 2))
    y = 100 + x[:, 0] ** 2 + 0.1 * rng.normal(size=300)
    wrong = rng.permutation(300) < 20
    y[wrong] += rng.choice([-3, 3], 20)
    values = worth(x, y)
    assert roc_auc_score(wrong, -values) > 0.9  # measured: 0.942
    assert values[wrong].mean() < 0 < values[~wrong].mean()


def test_memory_does_not_grow_with_the_square_of_the_rows():
    x, y = rows(4000, 4, 3)
    tracemalloc.start()
    worth(x, y)  # 128 MB for all distances
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


X, Y = rows(12, 2, 2)


@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        (([[1.0, np.nan]], [0]), {}, "finite x; got nan in row 0, column 1"),
        (([[1.0], [np.inf]], [0, 1]), {}, "got inf in row 1"),
        (([[np.inf], [-np.inf]], [0, 1]), {}, "finite x"),
        (([[1e200], [-1e200]], [0, 1]), {"k": 1}, "squares are finite; row"),
        ((X[:, 0], Y), {}, r"shape \(rows, features\); got \(12,\)"),
        ((X[:0], Y[:0]), {}, r"got \(0, 2\)"),
        ((X + 1j, Y), {}, "real numbers; got complex"),
        ((X, Y[:-1]), {}, r"shape \(12,\), one per row; got \(11,\)"),
        ((X, Y, X[:, :1], Y), {}, r"x_test of shape \(rows, 2\)"),
        ((X, Y, X), {}, "x_test and y_test together"),
        ((X, Y, None, Y), {}, "x_test and y_test together"),
        ((X, Y, X, Y[:3]), {}, "y_test of shape"),
        ((X, Y, X, np.array(list("ab" * 6))), {}, "same type as y"),
        ((X, Y), {"k": 0}, "k from 1 to 11 .*no neighbour of itself.*got 0"),
        ((X, Y), {"k": 12}, "got 12"),
        ((X, Y), {"k": 2.5}, "k as a whole number"),
        ((X, Y, X, Y), {"k": 13}, "k from 1 to 12"),
        ((X, Y), {"k": 4, "block": 4}, "blocks of 4 rows"),
        ((X, Y), {"truncate": 4}, "truncate at least 5"),
        ((X, np.zeros(12)), {}, "at least two classes in y; all 12 rows are 0"),
        ((X, np.append(Y[1:], np.nan)), {}, "no missing y; row 11"),
        ((X, [*"aaaaaabbbbb", None]), {}, "no missing y; row 11"),
        ((X, [*"aaaaaabbbbb", float("nan")]), {}, "no missing y; row 11"),
        ((X, np.array([*"aaaaaabbbbb", 3], dtype=object)), {}, "one type"),
        ((X, np.array(list("ab" * 6))), {"task": "regression"}, "numbers for a regression"),
        ((X, Y), {"task": "ranking"}, "'classification' or 'regression'"),
        ((X, Y), {"n_jobs": 0}, "n_jobs"),
        ((X, Y), {"batch_size": 0}, "batch_size at least 1"),
        ((X, Y), {"seed": -1}, "seed at least 0"),
    ],
)
def test_bad_input_is_refused(args, options, says):
    with pytest.raises(ValueError, match=says):
        worth(*args, **options)


def test_bad_input_to_a_judgement_is_refused():
    with pytest.raises(ValueError, match="keep from 1 to 11"):
        knn_judge(X, Y, keep=12)
    judged = knn_judge(X, Y, k=5, keep=3)
    with pytest.raises(ValueError, match="expected at least k = 5 neighbours"):
        judged.revalue(Y)
    judged = knn_judge(X, Y)
    with pytest.raises(ValueError, match="leave y_test out"):
        judged.revalue(Y, Y)
    with pytest.raises(ValueError, match=r"shape \(12,\)"):
        judged.revalue(Y[1:])
    with pytest.raises(ValueError, match="give y_test"):
        knn_judge(X, Y, X, Y).revalue(Y)
    for indices, says in (([[12]], "0 to 11"), ([0, 1], "shape"), ([[0.5]], "whole numbers")):
        with pytest.raises(ValueError, match=says):
            knn_proba(indices, Y)
    with pytest.raises(ValueError, match="k from 1 to 1"):
        knn_proba([[0]], Y, k=2)
