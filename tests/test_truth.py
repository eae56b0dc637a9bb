"""Scores and predictions against retraining on digits, with a damping that has not seen it."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import upweight as uw
from retrained import Truth, needed, truth

pytestmark = needed
MARGIN = {"test_loss": "margin"}


@functools.cache
def mlp() -> Truth:
    return truth("mlp")


@functools.cache
def logistic() -> Truth:
    return truth("logistic")


def record(of: Truth) -> uw.TrainingRecord:
    """What the training was; that of the logistic regression had no end to its steps."""
    decay = float(of.data["wd"])
    if of.name == "logistic":
        return uw.TrainingRecord(10**9, 0.1, weight_decay=decay)
    rates, momentum = of.data["lrs"], float(of.data["momentum"])
    return uw.TrainingRecord(len(rates), float(rates.mean()), decay, momentum)


def fitted(of: Truth, method: object = "direct", at: int | None = None) -> uw.Influence:
    model = of.model() if at is None else of.model("full", at)
    influence = uw.Influence(
        model, F.cross_entropy, method, damping="auto", record=record(of), certify=0
    )
    return influence.fit(of.train)


def unseen(of: Truth) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits that are neither in the training nor in the test rows."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.data / 16).astype(np.float32)
    used = {x.astype(np.float32).tobytes() for x in (*of.data["X"], *of.data["Xt"])}
    left = [i for i, image in enumerate(images) if image.tobytes() not in used]
    x = torch.from_numpy(images[left]).to(of.train[0])
    return x, torch.from_numpy(bunch.target[left])


def test_exact_scores_of_a_logistic_regression():
    influence = fitted(logistic())
    assert logistic().lds(influence.scores(logistic().test, **MARGIN)) >= 0.954


def test_one_newton_step_of_a_logistic_regression():
    influence = fitted(logistic())
    dropped = torch.from_numpy(~logistic().masks)
    predicted = influence.predict(logistic().test, dropped, **MARGIN)
    assert logistic().lds_of_losses(predicted.after) >= 0.99


def test_ekfac_of_one_network():
    assert mlp().lds(fitted(mlp(), "ekfac").scores(mlp().test)) >= 0.66


@pytest.mark.slow
def test_ekfac_of_ten_networks():
    members = (fitted(mlp(), "ekfac", k).scores(mlp().test, **MARGIN) for k in range(10))
    assert mlp().lds(uw.ensemble(members)) >= 0.71


def test_low_rank_methods_take_a_damping_that_fits_their_rank():
    influence = fitted(mlp(), uw.Arnoldi(rank=50))
    assert influence.damping_choice.how == "cut"
    assert mlp().lds(influence.scores(mlp().test)) >= 0.68


@pytest.mark.slow
def test_exact_scores_of_one_network():
    influence = fitted(mlp())
    assert mlp().lds(influence.scores(mlp().test, **MARGIN)) >= 0.74
    dropped = torch.from_numpy(~mlp().masks)
    assert mlp().lds_of_losses(influence.predict(mlp().test, dropped, **MARGIN).after) >= 0.80


@pytest.mark.slow
def test_damping_by_rows_that_nobody_trained_on():
    influence = uw.Influence(mlp().model(), F.cross_entropy, damping="auto")
    influence.fit(mlp().train, held_out=unseen(mlp()))
    assert influence.damping_choice.how == "held-out"
    assert mlp().lds(influence.scores(mlp().test)) >= 0.74


@pytest.mark.slow
def test_three_networks_averaged():
    """Ten, which the benchmark averages, take four minutes."""
    dropped = torch.from_numpy(~mlp().masks)
    scores, after = [], torch.zeros(len(dropped), 300, dtype=torch.float64)
    for k in range(3):
        influence = fitted(mlp(), at=k)
        scores.append(influence.scores(mlp().test, **MARGIN))
        after += influence.predict(mlp().test, dropped, **MARGIN).after
    assert mlp().lds(uw.ensemble(scores)) >= 0.80
    assert mlp().lds_of_losses(after) >= 0.87


def test_scores_without_curvature():
    options = mlp().model(), F.cross_entropy, mlp().train, mlp().test
    checkpoints = [
        {n: mlp().data[f"ckpt/{n}"][k] for n in mlp().model().state_dict()} for k in range(10)
    ]
    checkpoints = [{n: torch.from_numpy(v) for n, v in c.items()} for c in checkpoints]
    tracin = uw.tracin(
        *options, checkpoints=checkpoints, learning_rates=mlp().data["ckpt_lr"].tolist()
    )
    assert mlp().lds(uw.grad_dot(*options)) == pytest.approx(0.291, abs=0.01)
    assert mlp().lds(uw.grad_cos(*options)) == pytest.approx(0.228, abs=0.01)
    assert mlp().lds(tracin) == pytest.approx(0.297, abs=0.01)
