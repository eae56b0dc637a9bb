"""(A + λI)⁻¹ by the fixed-point iteration of LiSSA, without its noise.

    x ← x + (1/s)(b − (A + λI)x)                                   s, the scale, ≥ λ_max(A + λI)

That is LiSSA's recursion for s·(A + λI)⁻¹b, divided by s. Two things are mended:

- With the whole of A in every step the iteration is accelerated by Chebyshev polynomials: √κ steps
  where the plain one needs κ = λ_max / λ_min.
- With parts A_B of A (those of minibatches B) the last iterate of the plain recursion keeps the
  noise of the last parts. Here they act on the *difference* to an anchor x̃ whose residual is exact,

      x ← x + (1/s)(r̃ − (w_B A_B + λI)(x − x̃)),   r̃ = b − (A + λI)x̃

  with weights w_B, the number of parts times the share of the rows that B has, whose mean is A;
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
    """A_B of the rows of a batch B, and the share of all rows that these are: Σ share · A_B = A."""

    operator: LinearOperator
    share: float


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
            found.append(len(self.parts) * part.share * float((ritz.values + ritz.errors).max()))
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
        self.damped_operator = operator.damped(damping)
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
        state = _State(self, columns)
        if factors.parts:
            self._by_parts(state)
        elif factors.accelerate:
            self._chebyshev(state)
        else:
            self._plain(state)
        residuals = relative_residuals(state.residual, columns)
        certificate.add(residuals)
        certificate.products = products_spent(factors.operator) + round(
            # each part in the share of the rows that it has
            sum(part.share * products_spent(part.operator) for part in factors.parts)
        )
        certificate.steps = max(certificate.steps or 0, state.step)
        solved = bool((residuals <= factors.rtol).all())
        certificate.converged = bool(certificate.converged) and solved
        certificate.facts["tolerance"] = f"{factors.rtol:.0e}"
        why = (
            f"{state.step} steps were not enough. Choose a larger damping, more steps, or "
            "conjugate gradients (method='cg')"
        )
        warn_of_residuals(residuals, factors.rtol, why)
        return state.x

    def _plain(self, state: _State) -> None:
        """Every step by 1/s along the residual."""
        while state.goes_on():
            state.move(state.r / self.scale)
            state.step += 1

    def _chebyshev(self, state: _State) -> None:
        """Steps whose polynomial is smallest on [lower, upper], which encloses the spectrum."""
        lower = self._lower()
        center, radius = (self.upper + lower) / 2, (self.upper - lower) / 2
        radius = max(1e-12 * center, radius)
        rho = radius / center
        d = torch.zeros_like(state.x)
        while state.goes_on():
            at = state.active
            if state.step == 0:
                d[:, at] = state.r / center
            else:
                rho_next = 1.0 / (2.0 * center / radius - rho)
                d[:, at] = rho_next * rho * d[:, at] + (2.0 * rho_next / radius) * state.r
                rho = rho_next
            state.move(d[:, at])
            state.step += 1

    def _lower(self) -> float:
        """Where the spectrum of A + λI begins. Too high a guess costs steps, no more."""
        if self.factors.semidefinite:
            return max(self.damping, 1e-8 * self.upper)
        return max((self.factors.lowest + self.damping) / 2, 1e-8 * self.upper)

    def _by_parts(self, state: _State) -> None:
        """Rounds over the parts, which move the difference to an anchor with an exact residual."""
        factors = self.factors
        generator = torch.Generator().manual_seed(factors.seed)
        while state.goes_on():
            difference = torch.zeros_like(state.r)
            for at in torch.randperm(len(factors.parts), generator=generator).tolist():
                if state.step == factors.max_steps:
                    break
                part = factors.parts[at]
                weight = len(factors.parts) * part.share  # so that a round adds up to A
                moved = weight * (part.operator @ difference) + self.damping * difference
                difference = difference + (state.r - moved) / self.scale
                state.step += 1
            state.move(difference)


class _State:
    """Solutions x of (A + λI)x = b with their residuals; columns stop one by one.

    What a column becomes does not depend on the columns beside it.
    """

    def __init__(self, inverse: LissaInverse, right: Tensor) -> None:
        self._inverse = inverse
        self._right = right
        self.x = torch.zeros_like(right)
        self.residual = right.clone()
        self.active = torch.arange(right.shape[1], device=right.device)
        self.step = 0
        self._least = torch.full((right.shape[1],), torch.inf, dtype=right.dtype).to(right.device)

    @property
    def r(self) -> Tensor:
        """Residuals of the columns that go on."""
        return self.residual[:, self.active]

    def move(self, difference: Tensor) -> None:
        """Add to the columns that go on, and find their residuals."""
        self.x[:, self.active] += difference
        own = self.x[:, self.active]
        self.residual[:, self.active] = (
            self._right[:, self.active] - self._inverse.damped_operator @ own
        )

    def goes_on(self) -> bool:
        """Leave out the columns that are solved; whether any are left, and steps for them."""
        factors = self._inverse.factors
        now = relative_residuals(self.r, self._right[:, self.active])
        if self.step:
            self._check(now)
        self._least[self.active] = torch.minimum(self._least[self.active], now)
        self.active = self.active[now > factors.rtol]
        return len(self.active) > 0 and self.step < factors.max_steps

    def _check(self, now: Tensor) -> None:
        least = self._least[self.active]
        grown = ~(now <= DIVERGED * least)
        if not bool(grown.any()):
            return
        scale, upper = self._inverse.scale, self._inverse.upper
        advice = (
            f"A scale of {upper:.3g} would work (the largest eigenvalue of C + λI is about "
            f"{upper / 1.05:.3g}); scale=None chooses it"
            if scale < upper / 2
            else "C + λI may be indefinite: use curvature='ggn', a larger damping, or "
            "conjugate gradients"
        )
        raise DivergenceError(
            f"LiSSA diverged at step {self.step}: the relative residual went from "
            f"{float(least[grown].min()):.1e} to {float(now[grown].max()):.1e} with scale "
            f"{scale:.3g}. {advice}"
        )
