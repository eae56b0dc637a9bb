"""Finding wrong rows, against scikit-learn and random orders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from upweight.evaluate import detection


def rows(n=60, wrong=12, ties=False, seed=0):
    rng = np.random.default_rng(seed)
    flags = rng.permutation(n) < wrong
    scores = rng.normal(size=n) - flags
    return np.round(scores) if ties else scores, flags


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_equals_scikit_learn(seed, ties, low):
    scores, wrong = rows(ties=ties, seed=seed)
    scores = scores if low else -scores
    found = detection(scores, wrong, low_is_suspicious=low)
    suspicion = -scores if low else scores
    assert found.auc == pytest.approx(roc_auc_score(wrong, suspicion))
    assert found.average_precision == pytest.approx(average_precision_score(wrong, suspicion))
    assert 0 <= found.interval[0] <= found.auc <= found.interval[1] <= 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_invariances(seed):
    scores, wrong = rows(ties=seed % 2 == 0, seed=seed)
    found = detection(scores, wrong)
    order = np.random.default_rng(seed).permutation(len(scores))
    for other in (detection(np.exp(scores), wrong), detection(scores[order], wrong[order])):
        assert other.auc == pytest.approx(found.auc)
        np.testing.assert_allclose(other.at_k, found.at_k)
        np.testing.assert_allclose(other.curve, found.curve)


def test_precision_and_recall_by_hand():
    found = detection([-3, -2, -1, 0, 1], np.array([1, 0, 1, 0, 0], dtype=bool), ks=[1, 2, 3, 5])
    np.testing.assert_allclose(found.at_k["precision"], [1, 1 / 2, 2 / 3, 2 / 5])
    np.testing.assert_allclose(found.at_k["recall"], [1 / 2, 1 / 2, 1, 1])
    np.testing.assert_allclose(found.curve["share_inspected"], np.arange(6) / 5)
    np.testing.assert_allclose(found.curve["share_found"], [0, 0.5, 0.5, 1, 1, 1])
    assert "2 wrong among 5 rows" in str(found)


def test_ties_count_as_inspected_in_random_order():
    scores, wrong = rows(ties=True)
    found = detection(scores, wrong, ks=[5, 20])
    rng, recall = np.random.default_rng(0), []
    for _ in range(4000):
        shuffled = np.lexsort((rng.random(len(scores)), scores))
        recall.append([wrong[shuffled[:k]].sum() / wrong.sum() for k in (5, 20)])
    np.testing.assert_allclose(found.at_k["recall"], np.mean(recall, axis=0), atol=0.01)


def test_scores_that_say_nothing():
    found = detection(np.zeros(20), np.arange(20) < 5)
    assert found.auc == 0.5
    assert found.average_precision == pytest.approx(0.25)
    np.testing.assert_allclose(found.at_k["precision"], 0.25)


def test_default_ks_are_shares_of_the_rows_and_the_number_of_wrong_ones():
    scores, wrong = rows(n=200, wrong=30)
    at = detection(scores, wrong).at_k
    assert at["k"].tolist() == [2, 10, 20, 30, 40]
    line = at[at["k"] == 30]
    assert (line["precision"] == line["recall"]).all()


def test_interval_covers_the_true_area():
    rng = np.random.default_rng(0)
    true = 0.8556  # Φ(1.5 / √2) of two normal distributions 1.5 apart
    covered = []
    for _ in range(300):
        scores = np.concatenate([rng.normal(size=15), rng.normal(1.5, size=60)])
        low, high = detection(scores, np.arange(75) < 15).interval
        covered.append(low <= true <= high)
    assert 0.9 <= np.mean(covered) <= 0.99


def test_interval_of_a_perfect_order_is_open_to_doubt():
    for scores, end in ((np.arange(20.0), 0), (-np.arange(20.0), 1)):
        low, high = detection(scores, np.arange(20) < 5).interval
        edge = 0.025 ** (1 / 5)
        assert (low, high) == pytest.approx((edge, 1) if end == 0 else (0, 1 - edge))
    assert detection([1.0, 0.0, 2.0], np.array([True, False, False])).interval == (0.0, 1.0)


@pytest.mark.parametrize(
    ("scores", "wrong", "options", "says"),
    [
        ([0.0, np.nan, 1.0], [True, False, False], {}, "finite scores; got nan at position 1"),
        ([[0.0, 1.0]], [True, False], {}, r"shape \(n,\)"),
        ([0.0, 1.0], [True], {}, r"booleans of shape \(2,\)"),
        ([0.0, 1.0], [1, 0], {}, "got int64"),
        ([0.0, 1.0], [True, True], {}, "some rows to be wrong and some not; got 2 of 2"),
        ([0.0, 1.0], [False, False], {}, "got 0 of 2"),
        ([0.0, 1.0], [True, False], {"ks": [3]}, "between 1 and the 2 rows"),
        ([0.0, 1.0], [True, False], {"ks": []}, "list of whole numbers"),
        ([0.0, 1.0], [True, False], {"confidence": 95}, "confidence between 0 and 1"),
    ],
)
def test_bad_input_is_refused(scores, wrong, options, says):
    with pytest.raises(ValueError, match=says):
        detection(scores, wrong, **options)
