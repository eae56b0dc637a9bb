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

import copy
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

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
from upweight.inverse.certificate import warn_of_residuals
from upweight.inverse.cg import ROUND_OFF, SLACK, Solved
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
    "together",
]

Order = Literal["newton", "first"]
Drop = Mapping[Any, Any] | Iterable[Any] | np.ndarray | Tensor | pd.Series

# Directions of all groups that are solved for at once stay below this many bytes.
STEP_BYTES = 2**30
# On a network for digits, predicted changes are then off by 1 to 4 times as much (condition 1e4 to
# 1e6), with and without a preconditioner: far less than the quadratic model is.
RTOL = 1e-4
MAX_STEPS = 1000


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
    if drop is None or isinstance(drop, str | bytes | int | float | np.generic):
        raise TypeError(
            f"expected rows to drop, as a sequence; got {drop!r}. One row alone is [{drop!r}]"
        )
    if isinstance(drop, Mapping):
        groups = pd.Index(list(drop), name="group", tupleize_cols=False)
        masks = [_mask(rows, names) for rows in drop.values()]
    else:
        masks = [_mask(rows, names) for rows in _groups_in(drop)]
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


def _groups_in(drop: Any) -> list[Any]:
    """The groups of a sequence of groups or of a matrix; a sequence of rows is one group."""
    if isinstance(drop, Tensor | np.ndarray):
        return list(drop) if drop.ndim == 2 else [drop]
    if isinstance(drop, pd.Series | pd.Index | pd.DataFrame):
        return [drop]
    entries: list[Any] = list(drop)
    first = entries[0] if entries else None
    several = isinstance(first, Sequence | set | frozenset | pd.Series | pd.Index) or (
        isinstance(first, Tensor | np.ndarray) and first.ndim == 1
    )
    return entries if several and not isinstance(first, str) else [entries]


def _mask(rows: Any, names: pd.Index) -> Tensor:
    """The rows of one group as booleans (n,)."""
    n = len(names)
    array = _row_array(rows, names)
    kind = array.dtype.kind
    if kind == "b":
        if array.shape != (n,):
            raise ValueError(
                f"expected a mask of shape ({n},) over the training rows; got {array.shape}"
            )
        return torch.from_numpy(array.copy())
    if array.ndim != 1:
        raise ValueError(f"expected positions of rows (k,) or a mask ({n},); got {array.shape}")
    mask = torch.zeros(n, dtype=torch.bool)
    if not len(array):
        return mask
    if kind in "OUTMm":
        given = pd.Index(array, tupleize_cols=False)
        missing = given[~given.isin(names)]
        if len(missing):
            raise KeyError(f"no training row is called {missing[0]!r}")
        return torch.from_numpy(names.isin(given))
    if kind not in "iu":
        raise TypeError(f"expected positions of rows, names or a mask; got {array.dtype}")
    if array.min() < 0 or array.max() >= n:
        raise IndexError(
            f"expected positions of rows from 0 to {n - 1}; got {array.min()} to {array.max()}"
        )
    found, times = np.unique(array, return_counts=True)
    if len(found) < len(array):
        raise ValueError(
            f"expected different rows; position {found[times.argmax()]} comes {times.max()} times. "
            "A mask has booleans, not 0 and 1"
        )
    mask[torch.from_numpy(found.astype(np.int64))] = True
    return mask


def _row_array(rows: Any, names: pd.Index) -> np.ndarray:
    """Positions, names or a mask as an array of a dtype that says which."""
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu().numpy() if not rows.is_floating_point() else rows.tolist()
    if isinstance(rows, set | frozenset):
        rows = list(cast("set[Any]", rows))
    try:
        array = np.asarray(rows)
    except ValueError as error:
        raise ValueError(f"expected the rows of one group; got {rows!r}") from error
    if array.dtype.kind == "O" and array.ndim == 1:
        strange = [row for row in array if not isinstance(row, Hashable)]
        if strange:
            raise TypeError(f"expected positions of rows, names or a mask; got {strange[0]!r}")
        # what pandas keeps as objects
        kind = pd.api.types.infer_dtype(array, skipna=False)
        array = array.astype({"boolean": bool, "integer": np.int64}.get(kind, object))
    of_names = isinstance(rows, pd.Series) and array.dtype.kind == "b" and len(rows) == len(names)
    if of_names and not _same_order(cast("pd.Series", rows).index, names):
        raise ValueError(
            "expected a mask in the order of the training rows; the index of this Series is "
            "another one than their names. Reindex it, or pass mask.to_numpy()"
        )
    return array


def _same_order(index: pd.Index, names: pd.Index) -> bool:
    return index.equals(names) or index.equals(pd.RangeIndex(len(names)))


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
    own = replace(fitted, prepared=copy.copy(fitted.prepared), inverse=None)
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
        after.append(
            torch.stack([losses_at(test, step) for step in steps.T]).to("cpu", torch.float64)
        )
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
        _tell(certificate, solved, rtol, remaining.dtype)
    return solved.solution


def _tell(certificate: Certificate, solved: Solved, rtol: float, dtype: torch.dtype) -> None:
    """Write a solve into a certificate, and warn of what is above the tolerance."""
    certificate.add(solved.residuals.cpu())
    certificate.steps = max(certificate.steps or 0, int(solved.steps.max()))
    certificate.facts["tolerance"] = f"{rtol:.0e}"
    unsolved = solved.residuals > SLACK * rtol
    if not bool(unsolved.any()):
        certificate.converged = certificate.converged is not False
        return
    certificate.converged = False
    if bool(solved.limited[unsolved].all()):
        certificate.note(f"round-off in {str(dtype)[6:]} limits the residual")
        why = f"round-off in {str(dtype)[6:]} allows no less. Use a model in float64"
        warn_of_residuals(solved.residuals, ROUND_OFF * rtol, why)
    else:
        why = f"{MAX_STEPS} steps were not enough. Choose a larger damping, or method='direct'"
        warn_of_residuals(solved.residuals, rtol, why)


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
    """The test losses at θ + δ, (m,)."""
    model = test.model
    with model.evaluating(), torch.no_grad():
        theta = model.parameters()
        moved = model.unflatten(step[None].to(test.dtype))
        at = {name: value + moved[name][0].to(value.dtype) for name, value in theta.items()}
        return torch.cat([test.batch_losses(at, chunk.batch) for chunk in test.chunks()])
