"""Networks trained many at once, against one at a time; and what rows do to them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_wine
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from upweight import EKFAC, Influence
from upweight.auditing.effects import RELATIVE, row_effects, what_is_behind
from upweight.auditing.networks import CrossFit, Problem, cross_fit, fold_of_rows
from upweight.auditing.stackednets import Training, forward, train_stack


def wine(task="classification"):
    x, y = load_wine(return_X_y=True)
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    return Problem.of(x, y if task == "classification" else x[:, 0] + 0.1 * y, task)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_stack_is_trained_as_each_network_alone(task):
    problem = wine(task)
    n = len(problem.x)
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(3, n, generator=generator) < 0.8
    decays = torch.tensor([0.0, 0.5, 2.0])
    training = Training(problem.outputs, 8, 3, 50, 0.02, seed=7)
    stacked = train_stack(problem.x, problem.y, training, weights=weights, decays=decays)
    for s in range(3):
        alone = _train_alone(problem, training, weights[s], float(decays[s]), s)
        for one, other in zip(stacked, alone, strict=True):
            torch.testing.assert_close(one[s], other, rtol=1e-4, atol=1e-5)


def _train_alone(problem, training, kept, decay, s):
    """The same start and order, by torch's own optimiser."""
    nothing = Training(training.outputs, 8, 0, 50, 0.02, training.seed)
    start = train_stack(
        problem.x,
        problem.y,
        nothing,
        weights=torch.ones(3, len(problem.x), dtype=torch.bool),
        decays=torch.zeros(3),
    )
    parameters = [p[s].clone().requires_grad_() for p in start]
    generator = torch.Generator().manual_seed(training.seed)
    for p in start:
        torch.rand(p.shape, generator=generator)
    optimizer = AdamW(parameters, lr=training.learning_rate, weight_decay=decay)
    n, size = len(problem.x), training.batch_size
    total = training.epochs * -(-n // size)
    schedule = LambdaLR(optimizer, lambda t: 0.5 * (1 + np.cos(np.pi * t / total)))
    for _ in range(training.epochs):
        for rows in torch.randperm(n, generator=generator).split(size):
            rows = rows[kept[rows]]
            w1, b1, w2, b2 = parameters
            output = torch.relu(problem.x[rows] @ w1 + b1) @ w2 + b2
            optimizer.zero_grad()
            problem.loss(output, problem.y[rows]).backward()
            optimizer.step()
            schedule.step()
    return [p.detach() for p in parameters]


def test_no_row_is_judged_by_a_network_that_has_seen_it():
    problem = wine()
    fit = cross_fit(problem, folds=4, networks=1, seed=3, decay=0.1)
    changed = Problem(problem.x, problem.y.clone(), problem.task, problem.outputs)
    changed.y[11] = (changed.y[11] + 1) % 3
    # the folds are those of the original classes, so that only the target of the row differs
    other = cross_fit(problem, folds=4, networks=1, seed=3, decay=0.1)
    np.testing.assert_array_equal(fit.prediction, other.prediction)
    for k in range(4):
        network = fit.network(problem, k)
        rows = torch.from_numpy(np.flatnonzero(fit.fold == k))
        with torch.no_grad():
            told = torch.softmax(network(problem.x[rows]), dim=1).numpy()
        np.testing.assert_allclose(fit.prediction[0, rows], told, atol=1e-5)


def test_folds_share_the_classes_and_take_rare_ones():
    y = np.repeat([0, 1, 2], [60, 40, 2])
    fold = fold_of_rows(y, "classification", 5, seed=0)
    for k in range(5):
        counts = np.bincount(y[fold == k], minlength=3)
        assert abs(counts[0] - 12) <= 1
        assert abs(counts[1] - 8) <= 1
        assert counts[2] <= 1


def test_the_decay_that_left_out_rows_prefer():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 30)).astype(np.float32)
    noisy = ((x[:, 0] > 0) ^ (rng.random(120) < 0.3)).astype(int)
    clear = (x[:, 0] * x[:, 1] > 0).astype(int)
    assert cross_fit(Problem.of(x, noisy, "classification"), networks=1).decay == 3.0
    bent = Problem.of(np.repeat(x[:, :2], 10, axis=0), np.repeat(clear, 10), "classification")
    assert cross_fit(bent, networks=1).decay < 3.0


def test_numbers_come_back_in_their_unit():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 3)).astype(np.float32)
    y = 5000 + 300 * x[:, 0] + rng.normal(size=200)
    fit = cross_fit(Problem.of(x, y, "regression"), networks=1)
    assert np.corrcoef(fit.mean, y)[0, 1] > 0.98
    assert abs(np.median(fit.mean - y)) < 30


def test_effects_are_the_influences_of_each_fold():
    problem = wine()
    fit = cross_fit(problem, folds=3, networks=1, decay=1.0)
    found = row_effects(problem, fit)
    expected, own, seen = np.zeros(178), np.zeros(178), np.zeros(178)
    for k in range(3):
        inside = torch.from_numpy(np.flatnonzero(fit.fold == k))
        outside = torch.from_numpy(np.flatnonzero(fit.fold != k))
        train = problem.x[outside], problem.y[outside]
        influence = Influence(
            fit.network(problem, k),
            F.cross_entropy,
            method=EKFAC(relative="layer"),
            damping=RELATIVE,
            certify=0,
        ).fit(train)
        scores = influence.scores((problem.x[inside], problem.y[inside])).values
        expected[outside] += scores.mean(0).numpy()
        own[outside] += influence.self_influence().values.numpy()
        seen[outside] += 1
    np.testing.assert_allclose(found.influence, expected / seen, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.self_influence, own / seen, rtol=1e-3)


def test_rows_behind_raise_the_loss_of_the_given_label():
    problem = wine()
    problem.y[5] = (problem.y[5] + 1) % 3
    fit = cross_fit(problem, networks=1, decay=1.0)
    behind = what_is_behind(problem, fit, np.array([5, 90]))
    assert behind.rows.shape == (2, 5)
    assert (behind.scores <= 0).all()
    assert (np.diff(behind.scores[0]) >= 0).all()
    told = behind.rows[0][behind.rows[0] >= 0]
    assert (fit.fold[told] != fit.fold[5]).all()
    # the rows that speak most against the wrong label do not have it
    assert (problem.y[torch.from_numpy(told)] != problem.y[5]).float().mean() >= 0.8


def test_cells_are_derivatives_of_the_left_out_loss():
    problem = wine()
    fit = cross_fit(problem, folds=2, networks=1, decay=1.0)
    row = 20
    behind = what_is_behind(problem, fit, np.array([row]))
    k = 1 - int(fit.fold[row])
    outside = torch.from_numpy(np.flatnonzero(fit.fold != k))
    inside = torch.from_numpy(np.flatnonzero(fit.fold == k))
    influence = Influence(
        fit.network(problem, k), F.cross_entropy, method=EKFAC(relative="layer"),
        damping=RELATIVE, certify=0,
    ).fit((problem.x[outside], problem.y[outside]))  # fmt: skip
    test = problem.x[inside], problem.y[inside]
    step = 1e-2

    def help_of(x):
        return float(influence.mean_scores(test, (x, problem.y[[row]])).values[0])

    for j in (0, 6):
        up, down = problem.x[[row]].clone(), problem.x[[row]].clone()
        up[0, j] += step
        down[0, j] -= step
        slope = -(help_of(up) - help_of(down)) / (2 * step)
        assert behind.cells[0, j] == pytest.approx(slope, rel=0.1, abs=0.02)


def test_arrays_make_the_same_cross_fit():
    fit = cross_fit(wine(), folds=2, networks=2, decay=1.0)
    arrays = {name: getattr(fit, name) for name in ("fold", "prediction", "weights")}
    again = CrossFit.of({**arrays, "decay": np.array(fit.decay)})
    np.testing.assert_array_equal(again.mean, fit.mean)
    assert again.decay == fit.decay
    assert fit.prediction.shape == (2, 178, 3)


def test_outputs_of_a_stack():
    w1, b1 = torch.ones(2, 3, 4), torch.zeros(2, 1, 4)
    w2, b2 = torch.ones(2, 4, 1), torch.tensor([[[0.0]], [[1.0]]])
    out = forward([w1, b1, w2, b2], torch.ones(5, 3))
    assert out.shape == (2, 5, 1)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([12.0, 13.0]))
