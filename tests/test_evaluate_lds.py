"""The linear datamodeling score and its ceilings, against loops over scipy."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from upweight.evaluate import (
    additive_ceiling,
    lds,
    linear_datamodeling_score,
    noise_ceiling,
    prediction_score,
    random_subsets,
)
from upweight.evaluate.ranks import bootstrap_spearman

TRUTH = Path(__file__).parents[1] / "benchmarks" / "data" / "digits_logistic_truth.npz"


def problem(m=6, n=20, subsets=30, *, ties=False, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(m, n))
    masks = random_subsets(n, subsets, seed=seed)
    outputs = masks @ scores.T + rng.normal(size=(subsets, m))
    return scores, masks, np.round(outputs) if ties else outputs


def by_loop(scores, masks, outputs):
    correlations = []
    for j in range(len(scores)):
        sums = [scores[j][mask].sum() for mask in masks]
        correlations.append(spearmanr(sums, outputs[:, j]).statistic)
    return correlations


@pytest.mark.parametrize("ties", [False, True])
def test_equals_a_loop_over_scipy(ties):
    scores, masks, outputs = problem(ties=ties)
    found = linear_datamodeling_score(scores, masks, outputs)
    wanted = by_loop(scores, masks, outputs)
    np.testing.assert_allclose(found.per_test["correlation"], wanted)
    assert found.value == pytest.approx(np.mean(wanted))
    assert found.subsets == 30
    low, high = found.interval
    assert low < found.value < high
    assert lds is linear_datamodeling_score


def test_losses_have_the_other_sign():
    scores, masks, outputs = problem()
    one = lds(scores, masks, outputs)
    other = lds(scores, masks, -outputs, higher_is_better=False)
    assert other.value == one.value
    assert other.interval == one.interval
    assert lds(-scores, masks, outputs, bootstrap=0).value == pytest.approx(-one.value)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_invariances(seed):
    scores, masks, outputs = problem(m=4, n=9, subsets=12, ties=seed % 2 == 0, seed=seed)
    value = lds(scores, masks, outputs, bootstrap=0).value
    rng = np.random.default_rng(seed)
    rows, subsets, tests = rng.permutation(9), rng.permutation(12), rng.permutation(4)

    same = (
        (scores, masks, np.exp(outputs / 5) - 2),
        (3 * scores + 1, masks, outputs),  # all subsets have as many rows
        (scores[:, rows], masks[:, rows], outputs),
        (scores, masks[subsets], outputs[subsets]),
        (scores[tests], masks, outputs[:, tests]),
    )
    for arguments in same:
        assert lds(*arguments, bootstrap=0).value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_bootstrap_ranks_anew_what_it_drew(ties):
    scores, masks, outputs = problem(m=4, subsets=11, ties=ties)
    x, count = masks @ scores.T, 40
    got = bootstrap_spearman(x, outputs, count, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    drawn = rng.multinomial(11, np.full(11, 1 / 11), size=count)
    tests = rng.multinomial(4, np.full(4, 1 / 4), size=count)
    for b in range(count):
        rows = np.repeat(np.arange(11), drawn[b])
        columns = np.repeat(np.arange(4), tests[b])
        wanted = np.mean([spearmanr(x[rows, j], outputs[rows, j]).statistic for j in columns])
        assert got[b] == pytest.approx(wanted, abs=1e-12)


def test_interval_covers_the_expected_score():
    rng = np.random.default_rng(0)

    def draw(subsets=40, tests=25):
        x = rng.normal(size=(subsets, 4)) @ rng.normal(size=(4, tests))
        shared = rng.normal(size=(subsets, 4)) @ rng.normal(size=(4, tests))
        return x, x + shared * rng.gamma(2, 0.5, size=tests)

    expected = np.mean([prediction_score(*draw(), bootstrap=0).value for _ in range(300)])
    covered = []
    for _ in range(60):
        low, high = prediction_score(*draw(), bootstrap=200).interval
        covered.append(low <= expected <= high)
    assert 0.85 <= np.mean(covered) <= 1.0


@pytest.mark.slow
def test_interval_is_quick_and_repeatable():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 300))
    y = x + rng.normal(size=x.shape)
    start = time.perf_counter()
    found = prediction_score(x, y, bootstrap=1000)
    assert time.perf_counter() - start < 10
    assert found.interval == prediction_score(x, y, bootstrap=1000).interval
    wide = prediction_score(x, y, confidence=0.99).interval
    assert wide[0] < found.interval[0] < found.interval[1] < wide[1]


def test_constant_test_rows_are_left_out_and_counted():
    scores, masks, outputs = problem()
    outputs[:, 1] = 0.3
    scores[4] = 0.1  # sums that differ by round-off only
    with pytest.warns(UserWarning, match=r"2 of 6 test rows are left out.*first is row 1"):
        found = lds(scores, masks, outputs)
    assert found.constant.tolist() == [1, 4]
    kept = [0, 2, 3, 5]
    assert found.value == pytest.approx(np.mean(by_loop(scores[kept], masks, outputs[:, kept])))
    assert np.isnan(found.per_test["correlation"]).sum() == 2
    assert "4 test rows, 30 subsets" in str(found)
    assert np.isfinite(found.interval).all()
    with pytest.raises(ValueError, match="all 6 test rows are constant"):
        lds(np.zeros_like(scores), masks, outputs)


def test_few_subsets_give_resamples_without_variation():
    found = prediction_score([[1.0], [2.0], [3.0]], [[1.0], [2.0], [3.0]], bootstrap=300)
    assert found.interval == (1.0, 1.0)


def test_subsets_without_outputs_are_left_out():
    scores, masks, outputs = problem()
    outputs[[3, 7]] = np.nan
    found = lds(scores, masks, outputs, bootstrap=0)
    assert found.subsets == 28
    rest = np.delete(np.arange(30), [3, 7])
    assert found.value == pytest.approx(np.mean(by_loop(scores, masks[rest], outputs[rest])))
    outputs[5, 2] = np.nan
    with pytest.raises(ValueError, match="finite outputs"):
        lds(scores, masks, outputs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s, m, o: (s.T, m, o), r"scores .* of shape \(m, 20\); got \(20, 6\)"),
        (lambda s, m, o: (s, m, o.T), r"outputs of shape \(30, 6\)"),
        (lambda s, m, o: (s, m[:10], o), r"outputs of shape \(10, 6\)"),
        (lambda s, m, o: (s * np.nan, m, o), r"finite scores.* at position \(0, 0\)"),
        (lambda s, m, o: (s, m[:2], o[:2]), "at least three subsets"),
        (lambda s, m, o: (s, m + 1, o), "masks of booleans"),
    ],
)
def test_bad_input_is_refused(change, says):
    scores, masks, outputs = problem()
    with pytest.raises(ValueError, match=says):
        lds(*change(scores, masks.astype(int), outputs))


@pytest.mark.parametrize("options", [{"confidence": 1.0}, {"bootstrap": -1}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="expected a"):
        lds(*problem(), **options)


# --- ceilings -------------------------------------------------------------------------------------


def noisy(seeds, subsets=400, m=20, noise=1.0):
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(subsets, m))
    return truth, truth[:, None] + noise * rng.normal(size=(subsets, seeds, m))


@pytest.mark.parametrize("seeds", [2, 3, 4, 9])
def test_noise_ceiling_is_the_correlation_with_the_truth_and_with_new_seeds(seeds):
    truth, outputs = noisy(2 * seeds)
    first, second = outputs[:, :seeds], outputs[:, seeds:]
    found = noise_ceiling(first)
    with_truth = prediction_score(truth, first.mean(axis=1), bootstrap=0).value
    with_others = prediction_score(second.mean(axis=1), first.mean(axis=1), bootstrap=0).value
    assert found.ceiling == pytest.approx(with_truth, abs=0.015)
    assert found.reliability == pytest.approx(with_others, abs=0.015)
    # of values: var(truth) / (var(truth) + var(noise) / R)
    assert found.reliability == pytest.approx(1 / (1 + 1 / seeds), abs=0.03)
    assert found.seeds == seeds


def test_noise_ceiling_by_hand():
    _, outputs = noisy(2, subsets=30, m=3)
    r = np.array([spearmanr(outputs[:, 0, j], outputs[:, 1, j]).statistic for j in range(3)])
    found = noise_ceiling(outputs)
    np.testing.assert_allclose(found.per_test["reliability"], 2 * r / (1 + r))
    assert found.ceiling == pytest.approx(np.sqrt(2 * r / (1 + r)).mean())


def test_pure_noise_has_a_low_ceiling_and_none_a_high_one():
    rng = np.random.default_rng(0)
    assert noise_ceiling(rng.normal(size=(500, 4, 30))).reliability < 0.1
    truth = np.repeat(rng.normal(size=(20, 1, 5)), 4, axis=1)
    assert noise_ceiling(truth).ceiling == 1.0


def test_noise_ceiling_leaves_out_failures_and_constants():
    _, outputs = noisy(4, subsets=50, m=4)
    wanted = noise_ceiling(outputs[5:, :, 1:])
    outputs[:5, 2] = np.nan
    outputs[:, :, 0] = 7.0
    with pytest.warns(UserWarning, match="1 of 4 test rows"):
        found = noise_ceiling(outputs)
    assert found.ceiling == wanted.ceiling
    assert np.isnan(found.per_test["ceiling"][0])


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (np.zeros((5, 1, 3)), "at least two seeds.*seeds=2"),
        (np.zeros((5, 3)), r"shape \(S, R, m\)"),
        (np.zeros((2, 2, 3)), "at least three subsets"),
        (np.zeros((5, 2, 3)), "all 3 test rows are constant"),
    ],
)
def test_noise_ceiling_refuses(outputs, says):
    with pytest.raises(ValueError, match=says):
        noise_ceiling(outputs)


def test_additive_ceiling_is_the_score_of_exact_effects():
    scores, masks, outputs = problem()
    base = np.arange(6.0)
    found = additive_ceiling(base - scores.T, base, masks, outputs)
    assert found.value == pytest.approx(lds(scores, masks, outputs, bootstrap=0).value)
    without = additive_ceiling(base - scores.T, None, masks, outputs)
    assert without.value == pytest.approx(found.value)
    loss = additive_ceiling(scores.T - base, -base, masks, -outputs, higher_is_better=False)
    assert loss.value == pytest.approx(found.value)
    masks[0] = True
    with pytest.raises(ValueError, match="10 to 20 rows"):
        additive_ceiling(base - scores.T, None, masks, outputs)


@pytest.mark.skipif(not TRUTH.exists(), reason="the retrained truth is not part of the repository")
def test_additive_ceiling_of_logistic_regression_on_digits():
    data = np.load(TRUTH)
    loss = data["loo_loss"].astype(np.float64)
    margin = -loss - np.log1p(-np.exp(-loss))  # log p / (1 - p)
    of_margins = additive_ceiling(margin, None, data["masks"], data["margin"], bootstrap=200)
    assert of_margins.value == pytest.approx(0.950, abs=5e-4)
    low, high = of_margins.interval
    assert 0.94 < low < of_margins.value < high < 0.96
    of_losses = additive_ceiling(
        loss, None, data["masks"], data["loss"], higher_is_better=False, bootstrap=0
    )
    assert of_losses.value == pytest.approx(0.949, abs=5e-4)
