"""Recipes from some eigenpairs of the curvature, or from its diagonal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from upweight.costs import NUMBER, Cost, Workload
from upweight.inverse import JacobiFactors, LanczosFactors, NystroemFactors
from upweight.operator import LinearOperator

__all__ = ["Arnoldi", "Jacobi", "Nystroem"]


RANK = 30


def _rank(rank: int | None, size: int) -> int:
    return min(RANK, size) if rank is None else rank


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
        Eigenpairs of largest eigenvalues, in absolute value, to keep; default 30, or all of fewer
        parameters. In blocks of parameters at most as many as the block has.
    steps
        Products to spend on them; default 1.5 · rank and at least rank + 5, or rank with
        ``start="test"``.
    start
        ``"random"``, or ``"test"``: the mean gradient of the test rows, whose scores then depend on
        what else is scored with them.
    seed
        Of the random start.
    """

    rank: int | None = None
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
            _rank(self.rank, curvature.size),
            steps=self._steps(curvature.size),
            informed=self.start == "test",
            seed=self.seed,
        )
        if self.start == "random":
            factors.pairs()
        return factors

    def within(self, size: int) -> Arnoldi:
        """The same for a block of so many parameters."""
        return replace(self, rank=None if self.rank is None else min(self.rank, size))

    def _steps(self, size: int) -> int:
        if self.steps is not None:
            return self.steps
        rank = _rank(self.rank, size)
        # With a start of its own every Ritz pair counts. Otherwise the smallest ones that the last
        # steps give are far from eigenpairs: half as many steps again bring those kept near.
        return rank if self.start == "test" else rank + max(5, rank // 2)

    def cost(self, work: Workload) -> Cost:
        """One product for each step."""
        steps = self._steps(work.p)
        flops = 4.0 * steps**2 * work.p + 4.0 * _rank(self.rank, work.p) * work.p * work.m
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
        Random directions; default 30, or as many as there are parameters if these are fewer. In
        blocks of parameters at most as many as the block has.
    power
        Times that they are multiplied with C first, which turns them to the top of the spectrum.
    seed
        Of the directions.
    """

    rank: int | None = None
    power: int = 2
    seed: int = 0

    @property
    def name(self) -> str:
        """``"nystroem"``."""
        return "nystroem"

    def prepare(self, curvature: LinearOperator) -> NystroemFactors:
        """Sketch C."""
        rank = _rank(self.rank, curvature.size)
        return NystroemFactors(curvature, rank, power=self.power, seed=self.seed)

    def within(self, size: int) -> Nystroem:
        """The same for a block of so many parameters."""
        return replace(self, rank=None if self.rank is None else min(self.rank, size))

    def cost(self, work: Workload) -> Cost:
        """rank · (1 + power) products."""
        rounds, rank = 1 + self.power, _rank(self.rank, work.p)
        flops = 6.0 * rounds * rank**2 * work.p + 4.0 * rank * work.p * work.m
        memory = 4 * rank * work.p * NUMBER + work.solved_bytes
        return Cost(rounds * rank, rounds, flops, memory)


@dataclass(frozen=True)
class Jacobi:
    """diag(1/(d + λ)) for the diagonal d of C: a preconditioner, and hardly more.

    *Needs* p numbers. *Costs* ``probes`` products with C; for the exact diagonal as many as a row
    has outputs, or p of the Hessian. *Use it* to precondition `CG` where parameters have very
    different scales.

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
