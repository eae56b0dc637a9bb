"""The mixture of judges and the suspicion that follows from it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from upweight.auditing.blending import LEAST, blend


def views(rng, n, classes, judges):
    return [rng.dirichlet(np.ones(classes), n) for _ in range(judges)]


@pytest.mark.parametrize("seed", range(3))
def test_weights_maximise_the_likelihood(seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, 80)
    told = np.full((80, 3), 0.1) + 0.7 * np.eye(3)[y]
    judges = [told, *views(rng, 80, 3, 2)]
    found = blend(judges, y, "classification")
    given_ = np.clip(np.stack([v[np.arange(80), y] for v in judges], axis=1), LEAST, 1)

    def loss(free):
        w = np.exp(free - free.max())
        return -np.log(given_ @ (w / w.sum())).sum()

    best = minimize(loss, np.zeros(3), method="Nelder-Mead", options={"maxiter": 4000})
    assert -np.log(given_ @ found.weights).sum() == pytest.approx(best.fun, abs=1e-3)
    assert found.weights.sum() == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 5))
def test_renaming_classes_renames_the_answer(seed, classes):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, 30)
    judges = views(rng, 30, classes, 3)
    order = rng.permutation(classes)
    one = blend(judges, y, "classification")
    other = blend([v[:, order] for v in judges], np.argsort(order)[y], "classification")
    np.testing.assert_allclose(one.suspicion, other.suspicion, atol=1e-9)
    np.testing.assert_allclose(one.prediction[:, order], other.prediction, atol=1e-9)
    assert ((one.suspicion >= 0) & (one.suspicion <= 1)).all()


def test_given_weights_are_used():
    rng = np.random.default_rng(0)
    y, judges = rng.integers(0, 2, 20), views(rng, 20, 2, 2)
    found = blend(judges, y, "classification", weights=np.array([0.0, 1.0]))
    np.testing.assert_allclose(found.suspicion, 1 - judges[1][np.arange(20), y])


def test_numbers_prefer_the_judge_that_knows():
    rng = np.random.default_rng(1)
    y = rng.normal(size=400)
    good, bad = y + 0.1 * rng.normal(size=400), rng.normal(size=400)
    y[5] += 10
    found = blend([good, bad], y, "regression")
    assert found.weights[0] > 0.95
    assert found.suspicion.argmax() == 5
    assert np.median(found.suspicion) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_suspicion_of_numbers_has_no_unit(factor):
    rng = np.random.default_rng(2)
    y = rng.normal(size=300)
    judges = [y + rng.normal(size=300), y + rng.normal(size=300)]
    plain = blend(judges, y, "regression")
    scaled = blend([factor * v + 3 * factor for v in judges], factor * y + 3 * factor, "regression")
    np.testing.assert_allclose(plain.suspicion, scaled.suspicion, atol=1e-6)


def test_perfect_numbers_do_not_divide_by_zero():
    y = np.arange(50.0)
    found = blend([y, y], y, "regression")
    assert np.isfinite(found.suspicion).all()
    assert found.suspicion.max() == 0
