"""What can be asked of an influence, one question a function.

Letters: n training rows, m test rows, p parameters, G groups of removed rows, λ damping.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from upweight.evaluate import Retrained, noise_ceiling
from upweight.fitting import Fitting
from upweight.influence import mean_influence
from upweight.inverse.spectrum import lowest_eigenvalue, mean_eigenvalue, top_eigenvalue
from upweight.prediction import Order, Prediction, predict_removal
from upweight.risk import EmpiricalRisk

Verdict = Literal["good", "fair", "poor"]
ORDER: dict[Verdict, int] = {"good": 0, "fair": 1, "poor": 2}
# Shares of the training rows that are taken away together, to see how far a step carries.
SHARES = (0.01, 0.1, 0.5)
GROUPS = 4
TINY = 1e-300
# Of the linear datamodeling score: what is less is not told.
CLEARLY = 0.03


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what came out, how good that is, and what it means."""

    what: str
    value: str
    verdict: Verdict
    meaning: str


def worst(*verdicts: Verdict) -> Verdict:
    """The worst of several."""
    return max(verdicts, key=lambda verdict: ORDER[verdict])


def asked(what: str, question: Callable[..., Finding], *about: Any) -> Finding:
    """The answer to a question; where C + λI has no inverse, that."""
    try:
        return question(*about)
    except (ArithmeticError, ValueError) as error:
        return Finding(what, "no answer", "poor", str(error).rstrip("."))


def at_a_minimum(influence: Fitting) -> Finding:
    """Whether the training loss, with a weight decay that the gradient itself shows, is minimal.

    What a step would gain is measured with λ, so a λ above all eigenvalues hides it.
    """
    risk = influence.training
    gradient = risk.gradient()
    theta = risk.model.flatten(risk.model.parameters()).to(gradient)
    # at the minimum of L + w/2 ‖θ‖² the gradient is −wθ
    decay = max(0.0, -float(gradient @ theta) / max(float(theta @ theta), TINY))
    rest = gradient + decay * theta
    inverse = influence.fitted_with(one_damping(influence.damping)).ready(None, 0)
    # a Newton step from θ lowers the quadratic model by ½ gᵀ(C + λI)⁻¹g
    gain = 0.5 * float(rest @ (inverse @ rest).to(rest))
    # of its size: a log-likelihood may be below 0
    share = abs(gain) / max(abs(float(risk.losses().double().mean())), TINY)
    told = f"a step would lower the loss by {100 * share:.2g} %"
    if decay > 0 and float(rest.norm()) < 0.5 * float(gradient.norm()):
        told += f", beside a weight decay of {decay:.2g}"
    verdict = _graded(share, 0.05, 0.25)
    meaning = {
        "good": "the model is near a minimum of its training loss, as influence functions assume",
        "fair": "the training could go on: effects of rows are those of one that ended early",
        "poor": "the model is not at a minimum of this loss on these rows: train longer, or give "
        "the rows, the loss and the parameters that it was trained with",
    }[verdict]
    return Finding("minimum", told, verdict, meaning)


def same_every_time(influence: Fitting) -> Finding:
    """Whether rows, model and loss give the same numbers twice, and what the loss averages."""
    risk = influence.training
    fresh = risk.with_rows(risk.rows)
    same = torch.equal(fresh.losses(), risk.with_rows(risk.rows).losses())
    reduction = risk.row_loss.reduction
    given = "it is" if reduction == "none" else f"its {reduction}"
    return Finding(
        "loss",
        "; ".join([f"one per row, given as {given}", *risk.notes]),
        "good" if same else "poor",
        "the loss of every row is the same each time"
        if same
        else "the loss of a row differs from one time to the next: scores are of one draw only",
    )


def solved(influence: Fitting, test: EmpiricalRisk) -> Finding:
    """How exactly the damped system is solved for some of the test rows."""
    certificate = influence.certify_rows(test, 8)
    residual = certificate.residual_max
    told = f"largest residual {residual:.1e}, coverage {100 * certificate.coverage:.3g} %"
    # an approximation may rank well with any residual: what it does not say is a size
    sound: Verdict = _graded(residual, 1e-2, math.inf) if math.isfinite(residual) else "poor"
    verdict = worst(sound, _graded(1 - certificate.coverage, 1e-9, 0.2))
    meaning = {
        "good": "the scores are those of the curvature that was asked for",
        "fair": "scores are approximate: their order means more than their size; refine() "
        "makes them exact",
        "poor": "parameters are left out or solves have failed: see the certificate",
    }[verdict]
    return Finding("solves", f"{certificate.method}: {told}", verdict, meaning)


def damped(influence: Fitting) -> Finding:
    """Where λ lies in the spectrum of the curvature."""
    curvature = influence.curvature_operator
    damping = one_damping(influence.damping)
    top, mean = top_eigenvalue(curvature), mean_eigenvalue(curvature)
    lowest = 0.0 if curvature.semidefinite else lowest_eigenvalue(curvature)
    told = f"λ = {damping:.3g}; eigenvalues up to {top:.3g}, mean {mean:.2g}"
    if lowest < 0:
        told += f", down to {lowest:.2g}"
    if lowest + damping <= 0:
        return Finding(
            "damping", told, "poor", "C + λI is indefinite: use curvature='ggn' or a larger damping"
        )
    if damping >= top:
        return Finding(
            "damping",
            told,
            "poor",
            "λ is above all eigenvalues: scores are little more than products of gradients",
        )
    choice = influence.damping_choice
    if choice is not None:
        return Finding("damping", told, "good", f"chosen by {choice.how}: {choice.why}")
    meaning = (
        "given by hand; damping='auto' takes it from the record of the training, from held-out "
        "rows, or from the mean eigenvalue"
    )
    return Finding("damping", told, "fair", meaning)


def other_dampings(influence: Fitting, test: EmpiricalRisk) -> Finding:
    """Whether the mean scores keep their order at a third and three times λ."""
    damping = one_damping(influence.damping)
    own = _mean_scores(influence, test, damping)
    found = [_rank(own, _mean_scores(influence, test, f * damping)) for f in (1 / 3, 3.0)]
    lowest = min(found)
    verdict = _graded(1 - lowest, 0.1, 0.4)
    meaning = {
        "good": "the order of the rows hardly depends on λ",
        "fair": "the order of the rows depends on λ: its choice matters",
        "poor": "another λ gives another order of the rows: choose it by held-out rows, or by "
        "retraining",
    }[verdict]
    told = f"rank correlation {found[0]:.2f} with λ/3, {found[1]:.2f} with 3λ"
    return Finding("other dampings", told, verdict, meaning)


def other_seeds(influence: Fitting, test: EmpiricalRisk, others: Sequence[Fitting]) -> Finding:
    """Whether models that were trained with other seeds give the same order."""
    own = _mean_scores(influence, test, one_damping(influence.damping))
    found: list[float] = []
    for other in others:
        risk = other.risk_like(test)
        found.append(_rank(own, _mean_scores(other, risk, one_damping(other.damping))))
    mean = float(np.mean(found))
    verdict = _graded(1 - mean, 0.2, 0.5)
    meaning = {
        "good": "the scores belong to the data more than to one training run",
        "fair": "part of every score belongs to one training run: average several models",
        "poor": "most of the scores is the luck of one training run: average several models",
    }[verdict]
    told = f"rank correlation {mean:.2f} on average over {len(found)} other model(s)"
    return Finding("other seeds", told, verdict, meaning)


def far_enough(influence: Fitting, test: EmpiricalRisk) -> Finding:
    """Up to which share of removed rows one Newton step stays where the model is linear."""
    n = influence.training.n
    generator = torch.Generator().manual_seed(0)
    dropped = torch.zeros(len(SHARES) * GROUPS, n, dtype=torch.bool)
    sizes = [max(1, round(share * n)) for share in SHARES]
    for group, size in zip(dropped, np.repeat(sizes, GROUPS), strict=True):
        group[torch.randperm(n, generator=generator)[:size]] = True
    prediction = predict(influence, test, dropped, one_damping(influence.damping))
    changes = prediction.change.split(GROUPS)
    sums = (prediction.first_order - prediction.before).split(GROUPS)
    bends = prediction.nonlinearity.split(GROUPS)
    told: list[str] = []
    reached, near = 0.0, True
    for share, size, change, first, bend in zip(SHARES, sizes, changes, sums, bends, strict=True):
        # of few rows a single one is a larger share
        share = share if abs(size / n - share) < 0.25 * share else round(size / n, 2)
        middle = float(bend.median())
        r = _pearson(first.flatten().numpy(), change.flatten().numpy())
        told.append(f"{100 * share:g} % removed: {middle:.2f} (sum r {r:.2f})")
        near = near and middle < 0.5
        reached = share if near else reached
    verdict: Verdict = "good" if reached >= 0.1 else "fair" if reached > 0 else "poor"
    meaning = (
        f"predictions for groups of up to {100 * reached:g} % of the rows stay where the model is "
        "nearly linear in its parameters"
        if reached
        else "even small groups move the model out of the region where it is linear: retrain"
    )
    return Finding("nonlinearity", "; ".join(told), verdict, meaning)


def against_retraining(
    prediction: Prediction, actual: np.ndarray, dampings: pd.DataFrame, found: Retrained
) -> Finding:
    """Predicted and actual effects of random halves of the rows."""
    predicted = prediction.after.numpy()
    fine = np.isfinite(predicted).all(0)
    effect, guess = (v[:, fine] - v[:, fine].mean(0) for v in (actual, predicted))
    slope = float(np.nan_to_num(slope_of(guess, effect)))
    low, high = _slope_interval(guess, effect)
    here = dampings.loc[dampings["factor"] == 1.0].iloc[0]
    step = f"{here['newton']:.2f}" if prediction.order == "newton" else "none"
    told = (
        f"LDS {here['sum']:.2f} for sums, {step} for a Newton step; slope {slope:.2f} "
        f"({low:.2f} to {high:.2f})"
    )
    # the scores are what is added up; a Newton step may be right where they are not
    verdict = _graded(1 - float(here["sum"]), 0.3, 0.7)
    how = {"good": "as", "fair": "in part as", "poor": "not as"}[verdict]
    meaning = (
        f"sums of the scores order {len(actual)} random halves of the rows {how} retraining does"
    )
    if not 0.5 <= slope <= 2.0:
        verdict = worst(verdict, "fair")
        meaning += (
            f", but their effects are {slope:.2g} times as large as predicted: believe the order, "
            "not the size"
        )
    if here["newton"] > here["sum"] + CLEARLY:
        meaning += "; for groups of rows predict() is nearer"
    allowed = _allowed_by_noise(found)
    if allowed is not None:
        told += f"; noise allows {allowed:.2f}"
        if allowed < 0.8:
            meaning += "; the seed of a training matters much: take more seeds"
    best = dampings.sort_values("sum", na_position="first").iloc[-1]
    if best["sum"] > here["sum"] + CLEARLY:
        meaning += f"; damping {best['damping']:.3g} agrees better (LDS {best['sum']:.2f} for sums)"
    return Finding("retraining", told, verdict, meaning)


def nothing_to_compare(found: Retrained, worked: int) -> Finding:
    """The finding where retraining gave no effects."""
    if worked < 3:
        value = f"{worked} of {len(found.masks)} subsets worked"
        meaning = "fewer than three subsets cannot be ranked; .retrained.failures has the errors"
        return Finding("retraining", value, "poor", meaning)
    return Finding(
        "retraining",
        "the same outputs from every subset",
        "poor",
        "what the refit gives does not depend on its rows, so nothing can be compared: it should "
        "train a new model on these rows alone",
    )


def _allowed_by_noise(found: Retrained) -> float | None:
    """The noise ceiling, where there are seeds enough to know of one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of test rows that are constant
        try:
            return noise_ceiling(found.outputs).ceiling
        except ValueError:
            return None


def predict(
    influence: Fitting,
    test: EmpiricalRisk,
    dropped: Tensor,
    damping: float,
    order: Order = "newton",
) -> Prediction:
    """What becomes of the test rows without each group (G, n), at this λ."""
    fitted = influence.fitted_with(damping)
    return predict_removal(fitted, test, dropped, pd.RangeIndex(len(dropped)), order=order)


def slope_of(predicted: np.ndarray, actual: np.ndarray) -> float:
    """The slope of actual on predicted effects through 0; NaN where predictions do not vary."""
    there = np.isfinite(predicted) & np.isfinite(actual)
    x, y = predicted[there], actual[there]
    size = float(x @ x)
    return float(x @ y) / size if size > 0 else float("nan")


def _mean_scores(influence: Fitting, test: EmpiricalRisk, damping: float) -> np.ndarray:
    fitted = influence.fitted_with(damping)
    inverse = fitted.ready(test, 0)
    return mean_influence(inverse, fitted.risk, test, "up").double().cpu().numpy()


def one_damping(damping: Any) -> float:
    """λ, or the smallest of those of the blocks."""
    return float(min(damping.values()) if isinstance(damping, Mapping) else damping)


def _graded(value: float, good: float, fair: float) -> Verdict:
    return "good" if value <= good else "fair" if value <= fair else "poor"


def _rank(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr  # a second, and 60 MB, that a fit does not need

    found: Any = spearmanr(a, b)
    return float(np.nan_to_num(found.statistic))


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    fine = np.isfinite(a) & np.isfinite(b)
    a, b = a[fine], b[fine]
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _slope_interval(
    predicted: np.ndarray, actual: np.ndarray, draws: int = 500
) -> tuple[float, float]:
    """95 % of `slope_of`, by a bootstrap over the groups (G, m)."""
    count = len(predicted)
    products, squares = (predicted * actual).sum(1), (predicted**2).sum(1)  # (G,)
    picked = np.random.default_rng(0).integers(count, size=(draws, count))
    slopes = products[picked].sum(1) / np.maximum(squares[picked].sum(1), TINY)
    low, high = np.quantile(slopes, [0.025, 0.975])
    return float(low), float(high)
