"""Recipes from some eigenpairs of the curvature, or from its diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upweight.costs import NUMBER, Cost, Workload
from upweight.inverse import JacobiFactors, LanczosFactors, NystroemFactors
from upweight.operator import LinearOperator

__all__ = ["Arnoldi", "Jacobi", "Nystroem"]


@dataclass(frozen=True)
class Arnoldi:
    """(C + λI)⁻¹ from the eigenpairs that Lanczos' method finds, and their complement.

        (C + λI)⁻¹ ≈ V diag(1/(s + λ)) Vᵀ + (1/λ)(I − VVᵀ)

    *Needs* p numbers for each eigenpair. *Costs* 1.5 · rank products with C, one after the other,
    and no more for any number of test rows or dampings. *Use it* for many test rows; with
    ``start="test"`` the mean influence over the test rows is exact long before the spectrum is.

    Parameters
    ----------
    rank
        Eigenpairs of largest eigenvalues, in absolute value, to keep.
    steps
        Products to spend on them; default 1.5 · rank, and rank with ``start="test"``.
    start
        ``"random"``, or ``"test"``: the mean gradient of the test rows, whose scores then depend on
        what else is scored with them.
    seed
        Of the random start.
    """

    rank: int = 30
    steps: int | None = None
    start: Literal["random", "test"] = "random"
    seed: int = 0

    @property
    def name(self) -> str:
        """``"arnoldi"``."""
        return "arnoldi"

    def prepare(self, curvature: LinearOperator) -> LanczosFactors:
        """Find the eigenpairs; with ``start="test"`` when the test rows are known."""
        if self.start not in ("random", "test"):
            raise ValueError(f"expected start 'random' or 'test'; got {self.start!r}")
        factors = LanczosFactors(
            curvature,
            self.rank,
            steps=self._steps(),
            informed=self.start == "test",
            seed=self.seed,
        )
        if self.start == "random":
            factors.pairs()
        return factors

    def _steps(self) -> int:
        if self.steps is not None:
            return self.steps
        # With a start of its own every Ritz pair counts. Otherwise the smallest ones that the last
        # steps give are far from eigenpairs: half as many steps again bring those kept near.
        return self.rank if self.start == "test" else self.rank + max(5, self.rank // 2)

    def cost(self, work: Workload) -> Cost:
        """One product for each step."""
        steps = self._steps()
        flops = 4.0 * steps**2 * work.p + 4.0 * self.rank * work.p * work.m
        return Cost(steps, steps, flops, steps * work.p * NUMBER + work.solved_bytes)


@dataclass(frozen=True)
class Nystroem:
    """(C + λI)⁻¹ from a random sketch of C, and the complement of its range.

    *Needs* p numbers for each direction. *Costs* rank · (1 + power) products with C, in 1 + power
    rounds (one more where C is indefinite), and no more for any number of test rows or dampings.
    *Use it* as a preconditioner, and for many test rows where the top of the spectrum matters.

    Parameters
    ----------
    rank
        Random directions.
    power
        Times that they are multiplied with C first, which turns them to the top of the spectrum.
    seed
        Of the directions.
    """

    rank: int = 30
    power: int = 2
    seed: int = 0

    @property
    def name(self) -> str:
        """``"nystroem"``."""
        return "nystroem"

    def prepare(self, curvature: LinearOperator) -> NystroemFactors:
        """Sketch C."""
        return NystroemFactors(curvature, self.rank, power=self.power, seed=self.seed)

    def cost(self, work: Workload) -> Cost:
        """rank · (1 + power) products."""
        rounds = 1 + self.power
        flops = 6.0 * rounds * self.rank**2 * work.p + 4.0 * self.rank * work.p * work.m
        memory = 4 * self.rank * work.p * NUMBER + work.solved_bytes
        return Cost(rounds * self.rank, rounds, flops, memory)


@dataclass(frozen=True)
class Jacobi:
    """diag(1/(d + λ)) for the diagonal d of C: a preconditioner, and hardly more.

    *Needs* p numbers. *Costs* ``probes`` products with C, or the roots of every row for the exact
    diagonal. *Use it* to precondition `CG` where parameters have very different scales.

    Parameters
    ----------
    probes
        Random sign vectors for an estimate of the diagonal; None for the exact one.
    seed
        Of the sign vectors.
    """

    probes: int | None = 20
    seed: int = 0

    @property
    def name(self) -> str:
        """``"jacobi"``."""
        return "jacobi"

    def prepare(self, curvature: LinearOperator) -> JacobiFactors:
        """Find the diagonal."""
        return JacobiFactors(curvature, self.probes, seed=self.seed)

    def cost(self, work: Workload) -> Cost:
        """``probes`` products."""
        exact = work.roots if work.gram else work.p
        return Cost(self.probes or exact, 1, work.p * work.m, work.solved_bytes)
