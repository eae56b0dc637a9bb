"""What rows do to the networks of other rows: influence, and what lies behind a judgement.

Letters: n rows, K folds, T rows looked at, d features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from upweight.auditing.networks import Problem
from upweight.inverse import ResidualWarning
from upweight.methods import Influence
from upweight.recipes import EKFAC

__all__ = ["Behind", "Effects", "Networks", "row_effects", "what_is_behind"]

FITTED = 50_000  # rows that the curvature is estimated from
SCORED = 20_000  # rows that behind is searched in
RELATIVE = 0.1  # damping in mean eigenvalues of a layer
DEPTH = 5


class Networks(Protocol):
    """Networks trained without a fold each, such as a `CrossFit`."""

    @property
    def fold(self) -> NDArray[np.int16]:
        """(n,) of each row."""
        ...

    @property
    def folds(self) -> int:
        """K."""
        ...

    def network(self, problem: Problem, fold: int, number: int = 0) -> nn.Module:
        """One of those without a fold."""
        ...


@dataclass(frozen=True, eq=False)
class Effects:
    """Of every row as training row.

    Attributes
    ----------
    influence
        (n,) on the mean loss of left-out rows: negative = it raises that loss, the row harms.
    self_influence
        (n,) on its own loss: large = the network learnt it by heart.
    """

    influence: NDArray[np.float64]
    self_influence: NDArray[np.float64]


def row_effects(
    problem: Problem,
    fit: Networks,
    *,
    tell: Callable[[float], None] = lambda share: None,
) -> Effects:
    """Influence of every row on left-out rows, by the networks that were trained on it.

    For the network θ_k without fold k, with F_k the rows of that fold and H_k the EK-FAC curvature
    of its training loss,

        I_i = 1/(K − 1) Σ_{k: i ∉ F_k} 1/|F_k| Σ_{j ∈ F_k} g_jᵀ (H_k + λ)⁻¹ g_i,

    and the self-influence is g_iᵀ (H_k + λ)⁻¹ g_i, averaged likewise. λ is a tenth of the mean
    eigenvalue of a layer. Of more than 50,000 rows, only the first two networks are asked, of which
    one at least has learnt from each row.
    """
    n = len(problem.x)
    folds = fit.folds if n <= FITTED else min(fit.folds, 2)
    influence, own, seen = np.zeros(n), np.zeros(n), np.zeros(n)
    for k in range(folds):
        inside, outside = np.flatnonzero(fit.fold == k), np.flatnonzero(fit.fold != k)
        fitted = _fitted(problem, fit, k)
        with _quiet():
            train = _rows(problem, outside)
            mean = fitted.mean_scores(_rows(problem, inside), train)
            influence[outside] += mean.values.double().numpy()
            own[outside] += fitted.self_influence(train).values.double().numpy()
        seen[outside] += 1
        tell((k + 1) / folds)
    return Effects(influence / seen, own / seen)


@dataclass(frozen=True, eq=False)
class Behind:
    """Of T rows.

    Attributes
    ----------
    rows
        (T, depth) training rows that raise the loss of the given target most, the worst first; −1
        where there are fewer.
    scores
        (T, depth) their influence on that loss, negative.
    cells
        (T, d) derivative of the mean left-out loss by the features of the row as training row;
        positive = a larger value would raise the loss.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]
    cells: NDArray[np.float64]


def what_is_behind(
    problem: Problem,
    fit: Networks,
    rows: NDArray[np.intp],
    *,
    seed: int = 0,
    tell: Callable[[float], None] = lambda share: None,
) -> Behind:
    """Training rows that speak against the targets of some rows, and what single features do.

    The influence I[j, i] of training row i on the loss of row j, by the network without the fold of
    j; of 20,000 training rows where there are more. For the features, ∂I/∂x of the row itself as a
    training row of another network, on the mean loss of that network's left-out rows, with the
    opposite sign: of the loss and not of the help.
    """
    folds = fit.folds
    against = np.full((len(rows), DEPTH), -1, dtype=np.int64)
    scores = np.zeros((len(rows), DEPTH))
    cells = np.zeros((len(rows), problem.x.shape[1]))
    rng = np.random.default_rng(seed)
    for k in range(folds):
        fitted = _fitted(problem, fit, k)
        outside = np.flatnonzero(fit.fold != k)
        if len(outside) > SCORED:
            outside = np.sort(rng.choice(outside, SCORED, replace=False))
        inside = np.flatnonzero(fit.fold == k)
        here = fit.fold[rows] == k
        with _quiet():
            if here.any():
                found = fitted.scores(_rows(problem, rows[here]), _rows(problem, outside))
                values = found.values.double().numpy()
                order = np.argsort(values, axis=1)[:, :DEPTH]
                lowest = np.take_along_axis(values, order, axis=1)
                filled = np.where(lowest < 0, outside[order], -1)
                against[here, : order.shape[1]] = filled
                scores[here, : order.shape[1]] = np.minimum(lowest, 0)
            if (~here).any():
                moved = fitted.mean_scores(
                    _rows(problem, inside), _rows(problem, rows[~here]), mode="perturbation"
                )
                cells[~here] -= moved.values.double().numpy() / (folds - 1)
        tell((k + 1) / folds)
    return Behind(against, scores, cells)


def _fitted(problem: Problem, fit: Networks, k: int) -> Influence:
    outside = np.flatnonzero(fit.fold != k)
    if len(outside) > FITTED:
        outside = np.sort(np.random.default_rng(k).choice(outside, FITTED, replace=False))
    rows, model = _rows(problem, outside), fit.network(problem, k)

    def fitted(relative: Literal["layer", "global"]) -> Influence:
        method = EKFAC(relative=relative)
        influence = Influence(model, problem.loss, method=method, damping=RELATIVE, certify=0)
        with _quiet():
            return influence.fit(rows)

    try:
        return fitted("layer")
    except ValueError:  # a layer whose units are all dead has no curvature, and so no damping
        return fitted("global")


def _rows(problem: Problem, rows: NDArray[np.intp]) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.from_numpy(np.ascontiguousarray(rows))
    return problem.x[at], problem.y[at]


@contextmanager
def _quiet() -> Generator[None]:
    """EK-FAC is an approximation here by intent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResidualWarning)
        yield
