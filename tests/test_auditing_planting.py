"""Planted faults, and what they say of the rows."""

from itertools import pairwise

import numpy as np
import pytest

from upweight.auditing.planting import calibrate, plant


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_planted_labels_are_other_classes_of_as_many_rows(classes):
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(classes), 40)
    spoiled, planted = plant(y, "classification", 0.1, rng)
    assert planted.sum() == round(0.1 * len(y))
    assert (spoiled[planted] != y[planted]).all()
    assert (spoiled[~planted] == y[~planted]).all()
    assert set(spoiled) <= set(range(classes))


def test_planted_numbers_come_from_other_rows():
    y = np.random.default_rng(1).normal(size=100)
    spoiled, planted = plant(y, "regression", 0.2, np.random.default_rng(2))
    assert 0 < planted.sum() <= 20
    assert set(spoiled) <= set(y)
    assert (spoiled[~planted] == y[~planted]).all()


def test_only_allowed_rows_are_planted():
    among = np.zeros(60, dtype=bool)
    among[:10] = True
    _, planted = plant(np.tile([0, 1], 30), "classification", 0.5, np.random.default_rng(3), among)
    assert planted[:10].all()
    assert not planted[10:].any()


def scores(rng, n, noise, apart):
    """Suspicions of clean rows and of faults, and which is which."""
    wrong = rng.random(n) < noise
    logit = np.where(wrong, apart, -apart) + 1.5 * rng.normal(size=n)
    return 1 / (1 + np.exp(-logit)), wrong


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("apart", [2.0, 4.0])
def test_noise_and_precision_of_a_known_mixture(noise, apart):
    rng = np.random.default_rng(4)
    rows, wrong = scores(rng, 4000, noise, apart)
    faults, all_wrong = scores(rng, 400, 1.0, apart)
    assert all_wrong.all()
    found = calibrate(rows, faults, first=[50, 100])
    flagged = rows > found.threshold
    assert found.noise == pytest.approx(noise, rel=0.35)
    assert found.precision is not None
    estimate, low, high = found.precision
    true = wrong[flagged].mean()
    assert estimate == pytest.approx(true, abs=0.1)
    assert low <= true <= high
    order = np.argsort(-rows)
    for told in found.expected:
        assert told.wrong == pytest.approx(wrong[order[: told.k]].sum(), abs=0.1 * told.k)
        assert told.low <= told.wrong <= told.high <= told.k


def test_threshold_is_about_the_best_one():
    rng = np.random.default_rng(5)
    rows, wrong = scores(rng, 4000, 0.1, 2.5)
    faults, _ = scores(rng, 400, 1.0, 2.5)

    def f1(t):
        flagged = rows > t
        return 2 * (flagged & wrong).sum() / (flagged.sum() + wrong.sum())

    best = max(f1(t) for t in np.linspace(0.05, 0.95, 91))
    assert f1(calibrate(rows, faults).threshold) > best - 0.03


def test_clean_rows_are_hardly_flagged():
    rng = np.random.default_rng(6)
    rows, _ = scores(rng, 1000, 0.0, 3.0)
    faults, _ = scores(rng, 100, 1.0, 3.0)
    found = calibrate(rows, faults)
    assert (rows > found.threshold).mean() < 0.01
    assert found.noise < 0.01


def test_equal_suspicions_are_flagged_together_or_not_at_all():
    found = calibrate(np.zeros(50), np.ones(10))
    assert found.precision is None
    assert found.noise <= 0.02


def test_the_same_seed_gives_the_same_intervals():
    rng = np.random.default_rng(7)
    rows, faults = rng.random(200), 0.5 + rng.random(40) / 2
    assert calibrate(rows, faults, first=[10]) == calibrate(rows, faults, first=[10])


def test_more_suspicious_rows_are_wrong_more_often():
    rng = np.random.default_rng(8)
    for _ in range(20):
        rows, faults = rng.beta(0.3, 2, 120), rng.beta(2, 1, 15)
        told = calibrate(rows, faults, first=[10, 20, 50, 100]).expected
        shares = [e.wrong / e.k for e in told]
        assert all(a >= b - 1e-12 for a, b in pairwise(shares))
        assert all(e.low <= e.wrong <= e.high <= e.k for e in told)


def test_so_few_flags_that_they_may_all_be_right():
    rows = np.append(np.linspace(0, 0.3, 99), 0.99)
    found = calibrate(rows, np.linspace(0.5, 1, 20))
    assert (rows > found.threshold).sum() == 1
    assert found.precision is None
