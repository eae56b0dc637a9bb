"""(A + λI)⁻¹ by the fixed-point iteration of LiSSA, without its noise.

    x ← x + (1/s)(b − (A + λI)x)                                   s, the scale, ≥ λ_max(A + λI)

That is LiSSA's recursion for s·(A + λI)⁻¹b, divided by s. Two things are mended:

- With the whole of A in every step the iteration is accelerated by Chebyshev polynomials: √κ steps
  where the plain one needs κ = λ_max / λ_min.
- With parts A_B of A (those of minibatches B) the last iterate of the plain recursion keeps the
  noise of the last parts. Here they act on the *difference* to an anchor x̃ whose residual is exact,

      x ← x + (1/s)(r̃ − (w_B A_B + λI)(x − x̃)),   r̃ = b − (A + λI)x̃

  so that the noise dies out with the error, at one product with A for every round of parts.

References
----------
N. Agarwal, B. Bullins, E. Hazan, *Second-order stochastic optimization for machine learning in
linear time* (2017), §3. R. Johnson, T. Zhang, *Accelerating stochastic gradient descent using
predictive variance reduction* (2013), §2. Y. Saad, *Iterative methods for sparse linear systems*
(2003), §12.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upweight.inverse.approximate import products_spent
from upweight.inverse.certificate import (
    Certificate,
    DivergenceError,
    check_damping,
    relative_residuals,
    warn_of_residuals,
)
from upweight.inverse.lanczos import lanczos, random_columns
from upweight.operator import LinearOperator, wide

__all__ = ["LissaFactors", "LissaInverse", "Part"]

# Products with which the ends of a spectrum are estimated.
PROBES = 12
# A residual that has grown to so many times its least will not come back.
DIVERGED = 1e3


@dataclass(frozen=True)
class Part:
    """A_B of some of the rows, and its weight w_B: Σ w_B A_B over all parts is their number × A."""

    operator: LinearOperator
    weight: float


class LissaFactors:
    """What LiSSA knows of A for every λ: the ends of its spectrum.

    Parameters
    ----------
    operator
        A.
    parts
        A in parts, each step with one of them; none: each step with A.
    scale
        s; default: from estimates of the largest eigenvalues of A and of its parts.
    accelerate
        Chebyshev acceleration, where there are no parts and no scale is given.
    rtol
        The relative residual to stop at.
    max_steps
        At most so many steps.
    semidefinite
        Whether A is known to have no negative eigenvalue.
    seed
        Of the order of the parts.
    """

    def __init__(
        self,
        operator: LinearOperator,
        parts: Sequence[Part] = (),
        *,
        scale: float | None = None,
        accelerate: bool = True,
        rtol: float = 1e-3,
        max_steps: int = 2000,
        semidefinite: bool = False,
        seed: int = 0,
    ) -> None:
        if scale is not None and not 0.0 < scale < float("inf"):
            raise ValueError(f"expected a scale above 0; got {scale}")
        if not 0.0 < rtol < 1.0:
            raise ValueError(f"expected rtol between 0 and 1; got {rtol}")
        if max_steps < 1:
            raise ValueError(f"expected max_steps of at least 1; got {max_steps}")
        self.operator = operator
        self.parts = tuple(parts)
        self.scale = scale
        self.accelerate = accelerate and not parts and scale is None
        self.rtol = rtol
        self.max_steps = max_steps
        self.semidefinite = semidefinite
        self.seed = seed
        ritz = lanczos(operator, random_columns(operator, 1, seed)[:, 0], PROBES, seed=seed + 1)
        self.lowest = float(ritz.values[0])
        self.largest = float((ritz.values + ritz.errors).max())
        self.step_largest = max([self.largest, *self._part_estimates()])

    def _part_estimates(self) -> list[float]:
        found: list[float] = []
        stride = max(1, len(self.parts) // 8)
        for part in self.parts[::stride]:
            start = random_columns(part.operator, 1, self.seed)[:, 0]
            ritz = lanczos(part.operator, start, PROBES // 2, seed=self.seed + 1)
            found.append(part.weight * float((ritz.values + ritz.errors).max()))
        return found

    def inverse(self, damping: float) -> LissaInverse:
        """(A + damping · I)⁻¹."""
        check_damping(damping)
        return LissaInverse(self, damping)


class LissaInverse(LinearOperator):
    """(A + λI)⁻¹ by LiSSA, with the residual of every solve in `certificate`."""

    def __init__(self, factors: LissaFactors, damping: float) -> None:
        operator = factors.operator
        kind = wide(operator.dtype, operator.device)
        super().__init__(operator.size, kind, operator.device)
        self.damping = damping
        self.factors = factors
        self._damped = operator.damped(damping)
        self.upper = 1.05 * (factors.step_largest + damping)
        self.scale = factors.scale or self.upper
        self.certificate = Certificate("lissa", damping, self.size, steps=0, converged=True)
        facts = self.certificate.facts
        facts["scale"] = f"{self.scale:.3g}"
        facts["largest eigenvalue"] = f"{factors.largest + damping:.3g} (estimate)"
        facts["step"] = f"one of {len(factors.parts)} parts" if factors.parts else "all rows"
        if factors.lowest + damping <= 0.0:
            raise DivergenceError(
                f"C + {damping:g}·I has a negative eigenvalue, {factors.lowest + damping:.3g} or "
                "less, so LiSSA diverges with any scale. Use curvature='ggn', or a damping above "
                f"{-factors.lowest:.3g}"
            )

    def _apply(self, columns: Tensor) -> Tensor:
        factors, certificate = self.factors, self.certificate
        if factors.parts:
            x, residuals, steps = self._by_parts(columns)
        elif factors.accelerate:
            x, residuals, steps = self._chebyshev(columns)
        else:
            x, residuals, steps = self._plain(columns)
        certificate.add(residuals)
        certificate.products = products_spent(factors.operator) + sum(
            round(products_spent(part.operator) / len(factors.parts)) for part in factors.parts
        )
        certificate.steps = max(certificate.steps or 0, steps)
        solved = bool((residuals <= factors.rtol).all())
        certificate.converged = bool(certificate.converged) and solved
        certificate.facts["tolerance"] = f"{factors.rtol:.0e}"
        why = (
            f"{steps} steps were not enough. Choose a larger damping, more steps, or "
            "conjugate gradients (method='cg')"
        )
        warn_of_residuals(residuals, factors.rtol, why)
        return x

    def _plain(self, b: Tensor) -> tuple[Tensor, Tensor, int]:
        """Every step by 1/s along the residual."""
        x, r = torch.zeros_like(b), b
        watch = _Watch(self, b)
        for step in range(self.factors.max_steps):
            if watch.solved(r, step):
                return x, relative_residuals(r, b), step
            x = x + r / self.scale
            r = b - self._damped @ x
        watch.solved(r, self.factors.max_steps)
        return x, relative_residuals(r, b), self.factors.max_steps

    def _chebyshev(self, b: Tensor) -> tuple[Tensor, Tensor, int]:
        """Steps whose polynomial is smallest on [lower, upper], which encloses the spectrum."""
        lower = self._lower()
        center, radius = (self.upper + lower) / 2, (self.upper - lower) / 2
        radius = max(1e-12 * center, radius)
        rho = radius / center
        x, r = torch.zeros_like(b), b
        d = r / center
        watch = _Watch(self, b)
        for step in range(self.factors.max_steps):
            if watch.solved(r, step):
                return x, relative_residuals(r, b), step
            x = x + d
            r = b - self._damped @ x
            rho_next = 1.0 / (2.0 * center / radius - rho)
            d = rho_next * rho * d + (2.0 * rho_next / radius) * r
            rho = rho_next
        watch.solved(r, self.factors.max_steps)
        return x, relative_residuals(r, b), self.factors.max_steps

    def _lower(self) -> float:
        """Where the spectrum of A + λI begins. Too high a guess costs steps, no more."""
        if self.factors.semidefinite:
            return max(self.damping, 1e-8 * self.upper)
        return max((self.factors.lowest + self.damping) / 2, 1e-8 * self.upper)

    def _by_parts(self, b: Tensor) -> tuple[Tensor, Tensor, int]:
        factors = self.factors
        generator = torch.Generator().manual_seed(factors.seed)
        anchor, r = torch.zeros_like(b), b
        watch, step = _Watch(self, b), 0
        while step < factors.max_steps and not watch.solved(r, step):
            difference = torch.zeros_like(b)
            for at in torch.randperm(len(factors.parts), generator=generator).tolist():
                part = factors.parts[at]
                moved = part.weight * (part.operator @ difference) + self.damping * difference
                difference = difference + (r - moved) / self.scale
                step += 1
            anchor = anchor + difference
            r = b - self._damped @ anchor
        watch.solved(r, step)
        return anchor, relative_residuals(r, b), step


class _Watch:
    """Sees whether the residuals are small enough, or have begun to grow."""

    def __init__(self, inverse: LissaInverse, right: Tensor) -> None:
        self._inverse = inverse
        self._right = right
        self._least = float("inf")

    def solved(self, residual: Tensor, step: int) -> bool:
        factors = self._inverse.factors
        now = float(relative_residuals(residual, self._right).max()) if residual.numel() else 0.0
        if not now <= DIVERGED * self._least and step:
            scale, upper = self._inverse.scale, self._inverse.upper
            advice = (
                f"A scale of {upper:.3g} would work (the largest eigenvalue of C + λI is about "
                f"{upper / 1.05:.3g}); scale=None chooses it"
                if scale < upper / 2
                else "C + λI may be indefinite: use curvature='ggn', a larger damping, or "
                "conjugate gradients"
            )
            raise DivergenceError(
                f"LiSSA diverged at step {step}: the relative residual went from "
                f"{self._least:.1e} to {now:.1e} with scale {scale:.3g}. {advice}"
            )
        self._least = min(self._least, now)
        return now <= factors.rtol
