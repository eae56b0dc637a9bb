"""What becomes of every test row when groups of training rows are removed.

Training on the rows S is taken to minimise, from the weights θ that were trained on all n rows,

    F_S(θ') = 1/|S| Σ_{i∈S} ℓ_i(θ') + λ/2 ‖θ' − θ‖² − ∇L(θ)ᵀ(θ' − θ)

whose minimum for all rows is θ: λ stands for the weight decay, and for a training that ended before
it had converged. One Newton step from θ, with the curvature C_S of the rows that remain, is

    δ_S = −(C_S + λI)⁻¹ (∇L_S(θ) − ∇L(θ))

and the prediction is the test loss at θ + δ_S. With C in place of C_S, and the test loss taken as
linear, this is a sum of influences: 1/|S| Σ_{i∉S} (I[j, i] − Ī[j]), Ī the mean over all n rows.

Letters: n training rows, m test rows, p parameters, G groups, S the rows that remain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from upweight.curvature.reweighted import Reweighted
from upweight.fitted import Fitted
from upweight.inverse import (
    BlockFactors,
    Certificate,
    CGFactors,
    LissaFactors,
    NegativeCurvatureError,
    conjugate_gradients,
)
from upweight.inverse.approximate import as_preconditioner
from upweight.inverse.cg import write_solve
from upweight.operator import LinearOperator
from upweight.risk import EmpiricalRisk

__all__ = [
    "Order",
    "Prediction",
    "losses_at",
    "predict_removal",
    "removal_gradients",
    "removal_steps",
    "together",
]

Order = Literal["newton", "first"]

# Directions of all groups that are solved for at once stay below this many bytes.
STEP_BYTES = 2**30
# On a network for digits, predicted changes are then off by 1 to 4 times as much (condition 1e4 to
# 1e6), with and without a preconditioner: far less than the quadratic model is.
RTOL = 1e-4
MAX_STEPS = 1000
ADVICE = "Choose a larger damping, or method='direct'"


@dataclass(frozen=True, repr=False)
class Prediction:
    """The test losses of a model trained without some rows, as predicted.

    Attributes
    ----------
    before
        (m,): the test losses of the model as it is.
    after
        (G, m): the predicted test losses without each group of training rows.
    first_order
        (G, m): before + the sum of the influences of the rows in the group, ``1/|S| Σ I[j, i]``.
    nonlinearity
        (G,): ‖change − linear change‖ / ‖linear change‖ over the test rows, with the linear change
        that of the same step. Where it is near one or above, the step leaves the region in which
        the loss is as it is at θ, and only retraining can tell. NaN for ``order="first"``.
    dropped
        (G,): how many training rows each group has.
    groups, test_names
        The names of the groups and of the test rows.
    order
        ``"newton"`` or ``"first"``.
    certificate
        How exact the steps were; for ``order="first"``, how exact the inverse was on them.
    """

    before: Tensor
    after: Tensor
    first_order: Tensor
    nonlinearity: Tensor
    dropped: Tensor
    groups: pd.Index
    test_names: pd.Index
    order: Order
    certificate: Certificate

    @property
    def change(self) -> Tensor:
        """(G, m): after − before; positive where the test loss rises without the group."""
        return self.after - self.before

    def to_frame(self) -> pd.DataFrame:
        """One line for every group and test row: before, after, change, first_order."""
        count, m = self.after.shape
        return pd.DataFrame(
            {
                "group": self.groups.repeat(m),
                "test_row": np.tile(self.test_names, count),
                "before": self.before.repeat(count).numpy(),
                "after": self.after.flatten().numpy(),
                "change": self.change.flatten().numpy(),
                "first_order": (self.first_order - self.before).flatten().numpy(),
            }
        )

    def summary(self) -> pd.DataFrame:
        """One line for every group: how many rows, the mean change over the test rows."""
        return pd.DataFrame(
            {
                "rows": self.dropped.numpy(),
                "before": float(self.before.mean()),
                "after": self.after.mean(1).numpy(),
                "change": self.change.mean(1).numpy(),
                "first_order": (self.first_order - self.before).mean(1).numpy(),
                "nonlinearity": self.nonlinearity.numpy(),
            },
            index=self.groups,
        )

    def __repr__(self) -> str:
        count, m = self.after.shape
        told = "one Newton step" if self.order == "newton" else "a sum of influences"
        head = f"<Prediction for {count} group(s) removed, {m} test rows, by {told}>"
        return f"{head}\n{self.summary().head(10).to_string(float_format='{:.4g}'.format)}"

    def _repr_html_(self) -> str:
        return self.summary().to_html(float_format="{:.4g}".format, escape=True)


def predict_removal(
    fitted: Fitted,
    test: EmpiricalRisk,
    dropped: Tensor,
    groups: pd.Index,
    *,
    order: Order,
    rtol: float = RTOL,
    certify: int | None = 0,
) -> Prediction:
    """The test losses without each group, from a fitted influence and masks (G, n).

    Parameters
    ----------
    fitted
        Stays as it is, its certificate included.
    test, dropped, groups
        The test rows; which rows each group drops, and the names of the groups.
    order, rtol
        See `Influence.predict`.
    certify
        For how many steps of ``order="first"`` an approximate inverse measures its residual.
    """
    before = test.losses().to("cpu", torch.float64)
    damping = cast(float, fitted.damping)
    own = fitted.copied()
    inverse = own.ready(test, certify if order == "first" else 0)
    certificate = own.certificate()
    if order == "newton":
        _refuse_saddles(certificate, damping)
        certificate = Certificate("newton", damping, test.p)
    preconditioner = preconditioner_of(own, damping) if order == "newton" else None
    first, linear, after = [], [], []
    for block in dropped.split(together(test.p)):
        gradients = removal_gradients(fitted.risk, block)
        plain = -(inverse @ gradients)
        first.append(test.matmul(plain).T.to("cpu", torch.float64))
        if order == "first":
            continue
        steps = removal_steps(
            fitted.operator,
            ~block,
            gradients,
            damping,
            preconditioner=preconditioner,
            start=plain,
            rtol=rtol,
            certificate=certificate,
        )
        linear.append(test.matmul(steps).T.to("cpu", torch.float64))
        after.append(torch.stack([losses_at(test, step) for step in steps.T]))
    first_order = torch.cat(first)
    bends = torch.full((len(dropped),), torch.nan, dtype=torch.float64)
    ends = before + first_order
    if order == "newton":
        ends = torch.cat(after)
        bends = _nonlinearity(ends - before, torch.cat(linear))
    return Prediction(
        before=before,
        after=ends,
        first_order=before + first_order,
        nonlinearity=bends,
        dropped=dropped.sum(1),
        groups=groups,
        test_names=test.rows.names,
        order=order,
        certificate=certificate,
    )


def _nonlinearity(change: Tensor, linear: Tensor) -> Tensor:
    """‖change − linear‖ / ‖linear‖ over the test rows (G, m), and 0 where nothing changes."""
    size = torch.linalg.vector_norm(linear, dim=1)
    return torch.linalg.vector_norm(change - linear, dim=1) / size.clamp(min=1e-300)


def together(p: int) -> int:
    """How many groups are solved for at once: of each, conjugate gradients keep some 8 vectors."""
    return max(1, STEP_BYTES // (8 * 8 * p))


def _refuse_saddles(certificate: Certificate, damping: float) -> None:
    """No Newton step where the inverse has met negative eigenvalues."""
    negative = int(certificate.facts.get("negative eigenvalues", 0))
    if negative:
        lowest = certificate.facts.get("smallest eigenvalue", "below 0")
        raise NegativeCurvatureError(
            f"C + {damping:g}·I is indefinite: {negative} of its eigenvalues are negative, down to "
            f"{lowest}, so that a Newton step leads to a saddle and not to the model without these "
            "rows. Use curvature='ggn', which is never negative, or a larger damping"
        )


def removal_gradients(train: EmpiricalRisk, dropped: Tensor) -> Tensor:
    """∇L_S(θ) − ∇L(θ) for every group, (p, G)."""
    kept = (~dropped).T.to(torch.float64)
    weights = kept / kept.sum(0) - 1.0 / train.n
    return train.rmatmul(weights)


def removal_steps(
    curvature: LinearOperator,
    kept: Tensor,
    gradients: Tensor,
    damping: float,
    *,
    preconditioner: LinearOperator | None = None,
    start: Tensor | None = None,
    rtol: float = RTOL,
    certificate: Certificate | None = None,
) -> Tensor:
    """δ_S = −(C_S + λI)⁻¹ (∇L_S − ∇L) for every group, (p, G), by conjugate gradients.

    Parameters
    ----------
    curvature
        C of all rows.
    kept
        (G, n): which rows remain.
    gradients
        ∇L_S − ∇L, (p, G).
    damping
        λ.
    preconditioner, start, rtol
        See `conjugate_gradients`.
    certificate
        Where residuals, steps and products are written. With one, there is a warning of what is
        not solved to the tolerance.
    """
    remaining = Reweighted(curvature, kept.T, damping)
    solved = conjugate_gradients(
        remaining,
        -gradients,
        preconditioner=preconditioner,
        start=start,
        rtol=rtol,
        max_steps=MAX_STEPS,
    )
    if certificate is not None:
        certificate.products += remaining.products
        write_solve(certificate, solved, rtol, remaining.dtype, ADVICE)
    return solved.solution


def preconditioner_of(fitted: Fitted, damping: float) -> LinearOperator | None:
    """What the fitted method has that is near (C + λI)⁻¹, for conjugate gradients; or None."""
    prepared = fitted.prepared
    if isinstance(prepared, CGFactors):
        prepared = prepared.preconditioner_factors
    parts = prepared.prepared.values() if isinstance(prepared, BlockFactors) else [prepared]
    # an iteration inside of every step costs more than it saves
    slow = any(part is None or isinstance(part, CGFactors | LissaFactors) for part in parts)
    if slow or prepared is None or getattr(prepared, "waits", False):
        return None
    return as_preconditioner(prepared, damping)


def losses_at(test: EmpiricalRisk, step: Tensor) -> Tensor:
    """The test losses at θ + δ, (m,), in float64 on the CPU."""
    with test.model.evaluating(), torch.no_grad():
        at = test.model.moved(step)
        losses = torch.cat([test.batch_losses(at, chunk.batch) for chunk in test.chunks()])
    return losses.to("cpu", torch.float64)
