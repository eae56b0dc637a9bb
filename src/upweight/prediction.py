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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from upweight.curvature.reweighted import Reweighted
from upweight.fitted import Fitted
from upweight.inverse import Certificate, conjugate_gradients
from upweight.inverse.approximate import as_preconditioner, products_spent
from upweight.inverse.cg import CGFactors
from upweight.operator import LinearOperator
from upweight.risk import EmpiricalRisk

__all__ = [
    "Drop",
    "Order",
    "Prediction",
    "losses_at",
    "masks_of",
    "predict_removal",
    "removal_gradients",
    "removal_steps",
]

Order = Literal["newton", "first"]
Drop = Mapping[Any, Any] | Sequence[Any] | np.ndarray | Tensor | pd.Series

# Directions of all groups that are solved for at once stay below this many bytes.
STEP_BYTES = 2**30
# What is left of the gradient matters less than what the quadratic model leaves out.
RTOL = 1e-3


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
        (G, m): before + the sum of the influences of the rows in the group, 1/|S| Σ I[j, i].
    nonlinearity
        (G,): ‖change − linear change‖ / ‖linear change‖ over the test rows, with the linear change
        that of the same step. Where it is near one or above, the step leaves the region in which
        the loss is as it is at θ, and only retraining can tell.
    dropped
        (G,): how many training rows each group has.
    groups, test_names
        The names of the groups and of the test rows.
    order
        ``"newton"`` or ``"first"``.
    certificate
        How exact the steps were.
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


def masks_of(drop: Drop, names: pd.Index) -> tuple[Tensor, pd.Index]:
    """Which rows each group drops, (G, n) booleans, and the names of the groups.

    Parameters
    ----------
    drop
        Rows of one group: positions from 0, names that are text, or a mask (n,). Several groups: a
        mapping from names to such rows, a sequence of such sequences, or masks (G, n).
    names
        Of the n rows.

    Raises
    ------
    ValueError, IndexError, KeyError
        If there are no rows with these positions or names, or a group leaves none.
    """
    n = len(names)
    if isinstance(drop, Mapping):
        groups = pd.Index(list(drop), name="group")
        masks = [_mask(rows, names) for rows in drop.values()]
    else:
        array = drop if isinstance(drop, Tensor | np.ndarray) else None
        if array is not None and array.ndim == 2:
            masks = [_mask(row, names) for row in array]
        elif _is_nested(drop):
            masks = [_mask(rows, names) for rows in cast("Sequence[Any]", drop)]
        else:
            masks = [_mask(drop, names)]
        groups = pd.RangeIndex(len(masks), name="group")
    if not masks:
        raise ValueError("expected at least one group of rows to drop; got none")
    found = torch.stack(masks)
    for group, mask in zip(groups, found, strict=True):
        if not bool(mask.any()):
            raise ValueError(f"group {group!r} drops no row")
        if bool(mask.all()):
            raise ValueError(f"group {group!r} drops all {n} rows: none is left to train on")
    return found, groups


def _is_nested(drop: Any) -> bool:
    if isinstance(drop, Tensor | np.ndarray | pd.Series | str):
        return False
    first = next(iter(drop), None)
    return not isinstance(first, str) and (
        isinstance(first, Sequence)
        or (isinstance(first, Tensor | np.ndarray | pd.Series) and first.ndim == 1)
    )


def _mask(rows: Any, names: pd.Index) -> Tensor:
    n = len(names)
    array = np.asarray(rows)
    mask = torch.zeros(n, dtype=torch.bool)
    if array.dtype.kind == "b":
        if array.shape != (n,):
            raise ValueError(
                f"expected a mask of shape ({n},) over the training rows; got {array.shape}"
            )
        return torch.from_numpy(array.copy())
    if array.ndim != 1:
        raise ValueError(f"expected positions of rows (k,) or a mask ({n},); got {array.shape}")
    if array.dtype.kind in "OUT" and len(array):
        missing = [name for name in array if name not in names]
        if missing:
            raise KeyError(f"no training row is called {missing[0]!r}")
        mask[torch.from_numpy(np.isin(np.asarray(names), array))] = True
        return mask
    if array.dtype.kind not in "iu" and len(array):
        raise TypeError(f"expected positions of rows, names or a mask; got {array.dtype}")
    if len(array) and (array.min() < 0 or array.max() >= n):
        raise IndexError(
            f"expected positions of rows from 0 to {n - 1}; got {array.min()} to {array.max()}"
        )
    mask[torch.as_tensor(array.astype(np.int64))] = True
    return mask


def predict_removal(
    fitted: Fitted,
    test: EmpiricalRisk,
    dropped: Tensor,
    groups: pd.Index,
    *,
    order: Order,
    rtol: float = RTOL,
) -> Prediction:
    """The test losses without each group, from a fitted influence and masks (G, n)."""
    before = test.losses().to("cpu", torch.float64)
    damping = cast(float, fitted.damping)
    first, linear, after = [], [], []
    certificate = Certificate("newton" if order == "newton" else fitted.method, damping, test.p)
    for block in _blocks(dropped, test.p):
        gradients = removal_gradients(fitted.risk, block)
        inverse = fitted.ready(None, 0)
        plain = -(inverse @ gradients)
        first.append(test.matmul(plain).T.to("cpu", torch.float64))
        if order == "first":
            continue
        steps = removal_steps(
            fitted.operator,
            ~block,
            gradients,
            damping,
            preconditioner=preconditioner_of(fitted, damping),
            start=plain,
            rtol=rtol,
            certificate=certificate,
        )
        linear.append(test.matmul(steps).T.to("cpu", torch.float64))
        after.append(
            torch.stack([losses_at(test, step) for step in steps.T]).to("cpu", torch.float64)
        )
    first_order = torch.cat(first)
    if order == "first":
        ends, slopes = before + first_order, first_order
        certificate = fitted.certificate()
    else:
        ends, slopes = torch.cat(after), torch.cat(linear)
    size = torch.linalg.vector_norm(slopes, dim=1)
    nonlinearity = torch.linalg.vector_norm(ends - before - slopes, dim=1) / size.clamp(min=1e-300)
    return Prediction(
        before=before,
        after=ends,
        first_order=before + first_order,
        nonlinearity=nonlinearity if order == "newton" else torch.full_like(size, torch.nan),
        dropped=dropped.sum(1),
        groups=groups,
        test_names=test.rows.names,
        order=order,
        certificate=certificate,
    )


def _blocks(dropped: Tensor, p: int) -> Iterator[Tensor]:
    together = max(1, STEP_BYTES // (8 * 8 * p))
    yield from dropped.split(together)


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
        Where residuals, steps and products are written.
    """
    remaining = Reweighted(curvature, kept.T, damping)
    solved = conjugate_gradients(
        remaining, -gradients, preconditioner=preconditioner, start=start, rtol=rtol
    )
    if certificate is not None:
        certificate.add(solved.residuals.cpu())
        certificate.steps = max(certificate.steps or 0, int(solved.steps.max()))
        certificate.products = products_spent(curvature)
    return solved.solution


def preconditioner_of(fitted: Fitted, damping: float) -> LinearOperator | None:
    """What the fitted method has that is near (C + λI)⁻¹, for conjugate gradients."""
    prepared = fitted.prepared
    if isinstance(prepared, CGFactors):
        prepared = prepared.preconditioner_factors
    if prepared is None or getattr(prepared, "waits", False):
        return None
    return as_preconditioner(prepared, damping)


def losses_at(test: EmpiricalRisk, step: Tensor) -> Tensor:
    """The test losses at θ + δ, (m,)."""
    model = test.model
    with model.evaluating(), torch.no_grad():
        theta = model.parameters()
        moved = model.unflatten(step[None].to(test.dtype))
        at = {name: value + moved[name][0].to(value.dtype) for name, value in theta.items()}
        return torch.cat([test.batch_losses(at, chunk.batch) for chunk in test.chunks()])
