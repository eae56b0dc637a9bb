"""(A + λI)⁻¹ by preconditioned conjugate gradients, for all right-hand sides at once.

For every column b on its own, with M ≈ (A + λI)⁻¹ positive definite:

    r = b − (A + λI)x,   z = Mr,   d = z
    α = rᵀz / dᵀ(A + λI)d,   x += α d,   r −= α (A + λI)d,   z = Mr,   d = z + (rᵀz / r₋ᵀz₋) d

Columns stop one by one when ‖r‖ ≤ rtol ‖b‖, and are then verified together: r is computed anew from
x, and columns whose recursion has drifted from it go on from the true r.

References
----------
Y. Saad, *Iterative methods for sparse linear systems* (2003), §6.7, §9.2. H. A. van der Vorst,
Q. Ye, *Residual replacement strategies for Krylov subspace iterative methods* (2000), §3.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from upweight.inverse.approximate import Prepared, as_preconditioner, products_spent
from upweight.inverse.certificate import (
    Certificate,
    NegativeCurvatureError,
    check_damping,
    relative_residuals,
    warn_of_residuals,
)
from upweight.operator import Identity, LinearOperator, wide

__all__ = ["CGFactors", "CGInverse", "Solved", "conjugate_gradients", "write_solve"]

# What a verified residual may exceed the tolerance by, before the column goes on.
SLACK = 1.5
# A residual that round-off stopped so many times above the tolerance is worth a warning.
ROUND_OFF = 100


@dataclass(frozen=True)
class Solved:
    """Solutions (p, k) with their relative residuals (k,), verified, and the steps that each took.

    ``limited`` says for which columns round-off in the products stopped them above the tolerance.
    """

    solution: Tensor
    residuals: Tensor
    steps: Tensor
    limited: Tensor


def default_rtol(operator: LinearOperator) -> float:
    """The relative residual to stop at where none is given: what the dtype reaches with ease."""
    return 1e-5 if torch.finfo(operator.dtype).eps > 1e-10 else 1e-8


def conjugate_gradients(
    operator: LinearOperator,
    columns: Tensor,
    *,
    preconditioner: LinearOperator | None = None,
    rtol: float | None = None,
    max_steps: int = 1000,
    start: Tensor | None = None,
) -> Solved:
    """Solve A X = B for a positive definite A, column by column, with products A @ V of all.

    Every column may have a matrix of its own: an operator with a method ``at(columns)`` is asked
    for the operator of the columns that are still to be multiplied.

    Parameters
    ----------
    operator
        A, with damping in it.
    columns
        B, (p, k).
    preconditioner
        M, positive definite, near A⁻¹; default: I.
    rtol
        The relative residual ‖b − Ax‖/‖b‖ to stop at; default 1e-5 in float32, 1e-8 in float64.
        Where the precision of the products allows no less, the residual that it allows.
    max_steps
        At most so many steps for each column.
    start
        X₀, (p, k); default 0.

    Raises
    ------
    NegativeCurvatureError
        If dᵀAd ≤ 0 for a direction d, or zero to working precision: A is not positive definite,
        and there is nothing to return.
    ValueError
        If a product is not finite, or the preconditioner is not positive definite.

    Examples
    --------
    >>> from upweight.operator import Diagonal
    >>> A = Diagonal(torch.tensor([1.0, 4.0], dtype=torch.float64))
    >>> solved = conjugate_gradients(A, torch.tensor([[2.0], [8.0]]))
    >>> solved.solution.T, int(solved.steps)
    (tensor([[2., 2.]], dtype=torch.float64), 2)
    """
    kind = wide(operator.dtype, operator.device)
    right = columns.to(operator.device, kind)
    k = right.shape[1]
    state = _State(
        operator=operator,
        preconditioner=preconditioner or Identity(operator.size, kind, operator.device),
        right=right,
        x=torch.zeros_like(right) if start is None else start.to(right).clone(),
        steps=torch.zeros(k, dtype=torch.int64, device=right.device),
        size=torch.linalg.vector_norm(right, dim=0),
    )
    rtol = default_rtol(operator) if rtol is None else rtol
    best_x, best = state.x.clone(), torch.full((k,), torch.inf, dtype=kind, device=right.device)
    limited = torch.zeros(k, dtype=torch.bool, device=right.device)
    active = torch.arange(k, device=right.device)
    residual = right if start is None else right - state.product(state.x, active)
    while True:
        state.iterate(active, residual, rtol, max_steps)
        residual = right[:, active] - state.product(state.x[:, active], active)
        now = relative_residuals(residual, right[:, active])
        better, before = now < best[active], best[active]
        best_x[:, active[better]] = state.x[:, active[better]]
        best[active[better]] = now[better]
        above = now > SLACK * rtol
        stuck = above & (now > before / 2)
        limited[active[stuck]] = True
        on = above & ~stuck & (state.steps[active] < max_steps)
        if not bool(on.any()):
            break
        active, residual = active[on], residual[:, on]
    limited &= state.steps < max_steps
    return Solved(best_x, best, state.steps, limited)


@dataclass
class _State:
    operator: LinearOperator
    preconditioner: LinearOperator
    right: Tensor
    x: Tensor
    steps: Tensor
    size: Tensor
    top: float = 0.0  # the largest vᵀAv / vᵀv that was met

    def product(self, columns: Tensor, active: Tensor) -> Tensor:
        at = getattr(self.operator, "at", None)
        operator = self.operator if at is None else at(active)
        product = (operator @ columns).to(self.right.dtype)
        if not bool(torch.isfinite(product).all()):
            raise ValueError("a product with the curvature is not finite (NaN or inf)")
        return product

    def iterate(self, active: Tensor, residual: Tensor, rtol: float, max_steps: int) -> None:
        """Step with these columns from their true residual until each recursion is below rtol."""
        x, r = self.x[:, active], residual
        small = torch.linalg.vector_norm(r, dim=0) <= rtol * self.size[active]
        z = self._precondition(r)
        d, rz = z, (r * z).sum(0)
        keep = ~small
        while True:
            keep = keep & (self.steps[active] < max_steps)
            if not bool(keep.all()):
                self.x[:, active[~keep]] = x[:, ~keep]
                active, x, r, d, rz = (
                    active[keep],
                    x[:, keep],
                    r[:, keep],
                    d[:, keep],
                    rz[keep],
                )
            if not len(active):
                return
            self._check_positive(rz)
            ad = self.product(d, active)
            curvature = (d * ad).sum(0)
            self._check_curvature(curvature, d, active)
            alpha = rz / curvature
            x = x + alpha * d
            r = r - alpha * ad
            self.steps[active] += 1
            z = self._precondition(r)
            rz, before = (r * z).sum(0), rz
            d = z + (rz / before) * d
            keep = torch.linalg.vector_norm(r, dim=0) > rtol * self.size[active]

    def _precondition(self, residual: Tensor) -> Tensor:
        return (self.preconditioner @ residual).to(residual.dtype)

    def _check_positive(self, rz: Tensor) -> None:
        if not bool((rz > 0).all()):
            raise ValueError(
                "the preconditioner is not positive definite (rᵀMr ≤ 0) or not finite, as the "
                "direct inverse of an indefinite C + λI is. Use curvature='ggn', a larger damping, "
                "or another preconditioner"
            )

    def _check_curvature(self, curvature: Tensor, d: Tensor, active: Tensor) -> None:
        quotients = curvature / d.square().sum(0)
        self.top = max(self.top, float(quotients.max()))
        # what round-off leaves of zero, or makes negative, is no curvature to divide by
        floor = 4 * torch.finfo(self.operator.dtype).eps * self.top
        bad, step = ~(quotients > floor), int(self.steps[active].max()) + 1
        if not bool(bad.any()):
            return
        quotient = float(quotients.min())
        if quotient > -floor:
            raise NegativeCurvatureError(
                f"C + λI is singular to working precision: at step {step} conjugate gradients met "
                f"vᵀ(C + λI)v / vᵀv = {quotient:.1e}, against {self.top:.1e} at the top. Choose a "
                "larger damping"
            )
        raise NegativeCurvatureError(
            f"conjugate gradients met negative curvature at step {step}, for {int(bad.sum())} of "
            f"{self.right.shape[1]} right-hand sides: vᵀ(C + λI)v / vᵀv = {quotient:.3g}. "
            "C + λI is indefinite, its lowest eigenvalue is that or less, and there is no answer "
            "to return. Use curvature='ggn', which is never negative, a larger damping, or "
            "method='direct', which tells how much larger"
        )


class CGInverse(LinearOperator):
    """(A + λI)⁻¹ by conjugate gradients, with the residual of every solve in `certificate`."""

    def __init__(self, factors: CGFactors, damping: float, preconditioner: LinearOperator) -> None:
        operator = factors.operator
        kind = wide(operator.dtype, operator.device)
        super().__init__(operator.size, kind, operator.device)
        self.damping = damping
        self.certificate = Certificate("cg", damping, self.size, steps=0, converged=True)
        self.certificate.facts["preconditioner"] = factors.described
        self._factors = factors
        self._damped = operator.damped(damping)
        self._preconditioner = preconditioner

    def _apply(self, columns: Tensor) -> Tensor:
        factors, certificate = self._factors, self.certificate
        rtol = default_rtol(factors.operator) if factors.rtol is None else factors.rtol
        solved = conjugate_gradients(
            self._damped,
            columns,
            preconditioner=self._preconditioner,
            rtol=rtol,
            max_steps=factors.max_steps,
            start=factors.recall(columns),
        )
        factors.remember(columns, solved.solution)
        certificate.products = products_spent(factors.operator)
        advice = "Choose a preconditioner, a larger damping or more steps"
        write_solve(certificate, solved, rtol, factors.operator.dtype, advice)
        return solved.solution


def write_solve(
    certificate: Certificate, solved: Solved, rtol: float, dtype: torch.dtype, advice: str
) -> None:
    """Write a solve into a certificate, and warn of what is above the tolerance.

    Parameters
    ----------
    certificate, solved
        Where to, and of what.
    rtol
        The tolerance.
    dtype
        Of the products, whose round-off may have limited the residual.
    advice
        What to do where the steps were not enough.
    """
    certificate.add(solved.residuals.cpu())
    certificate.steps = max(certificate.steps or 0, int(solved.steps.max()))
    certificate.facts["tolerance"] = f"{rtol:.0e}"
    unsolved = solved.residuals > SLACK * rtol
    if not bool(unsolved.any()):
        certificate.converged = certificate.converged is not False
        return
    certificate.converged = False
    if bool(solved.limited[unsolved].all()):
        kind = str(dtype)[6:]
        certificate.note(f"round-off in {kind} limits the residual")
        why = f"round-off in {kind} allows no less. Use a model in float64"
        # where it is not far above, the note is enough
        warn_of_residuals(solved.residuals, ROUND_OFF * rtol, why)
    else:
        why = f"{int(solved.steps.max())} steps were not enough. {advice}"
        warn_of_residuals(solved.residuals, rtol, why)


class CGFactors:
    """Conjugate gradients on A + λI for every λ.

    Parameters
    ----------
    operator
        A.
    preconditioner
        A prepared method, whose ``preconditioner(λ)`` or ``inverse(λ)`` is M.
    described
        What the preconditioner is, for the certificate.
    rtol, max_steps
        See `conjugate_gradients`.
    warm_start
        Keep the last right-hand sides and their solution, and begin with it where the same ones
        come again, as after a change of damping.

    Examples
    --------
    >>> from upweight.operator import Dense
    >>> factors = CGFactors(Dense(torch.tensor([[2.0, 0.0], [0.0, 4.0]])))
    >>> factors.inverse(1.0) @ torch.tensor([3.0, 5.0])
    tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        operator: LinearOperator,
        preconditioner: Prepared | None = None,
        *,
        described: str = "none",
        rtol: float | None = None,
        max_steps: int = 1000,
        warm_start: bool = False,
    ) -> None:
        if rtol is not None and not 0.0 < rtol < 1.0:
            raise ValueError(f"expected rtol between 0 and 1; got {rtol}")
        if max_steps < 1:
            raise ValueError(f"expected max_steps of at least 1; got {max_steps}")
        self.operator = operator
        self.preconditioner_factors = preconditioner
        self.described = described
        self.rtol = rtol
        self.max_steps = max_steps
        self.warm_start = warm_start
        self._last: tuple[Tensor, Tensor] | None = None

    def __copy__(self) -> CGFactors:
        """The same without a solution to begin with."""
        return CGFactors(
            self.operator,
            copy.copy(self.preconditioner_factors),
            described=self.described,
            rtol=self.rtol,
            max_steps=self.max_steps,
            warm_start=self.warm_start,
        )

    @property
    def waits(self) -> bool:
        """Whether the preconditioner should not be computed before a start is known."""
        return bool(getattr(self.preconditioner_factors, "waits", False))

    def inform(self, start: Tensor) -> bool:
        """Hand the preconditioner a start vector (p,); whether that changes anything."""
        inform = getattr(self.preconditioner_factors, "inform", None)
        return inform is not None and bool(inform(start))

    def inverse(self, damping: float) -> CGInverse:
        """(A + damping · I)⁻¹."""
        check_damping(damping)
        prepared = self.preconditioner_factors
        if prepared is None:
            kind = wide(self.operator.dtype, self.operator.device)
            chosen: LinearOperator = Identity(self.operator.size, kind, self.operator.device)
        else:
            chosen = as_preconditioner(prepared, damping)
        return CGInverse(self, damping, chosen)

    def recall(self, columns: Tensor) -> Tensor | None:
        """The last solution, if these right-hand sides were solved for last."""
        if self._last is None or not torch.equal(self._last[0], columns):
            return None
        return self._last[1]

    def remember(self, columns: Tensor, solution: Tensor) -> None:
        """Keep a solution, if that is wanted."""
        if self.warm_start:
            self._last = columns.clone(), solution
