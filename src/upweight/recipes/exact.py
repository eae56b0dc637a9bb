"""Recipes that are exact: by factorisation, or by iteration to a tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from upweight.costs import NUMBER, Cost, Workload
from upweight.inverse import CGFactors, DirectFactors, LissaFactors, Part
from upweight.operator import LinearOperator
from upweight.recipes.base import Recipe

__all__ = ["CG", "Direct", "LiSSA"]

# The share of the steps that a preconditioner leaves, as measured in docs/howto/choose-a-method.md.
# The others there saved none.
SAVED = {"nystroem": 0.5, "arnoldi": 0.5}


@dataclass(frozen=True)
class Direct:
    """(C + λI)⁻¹ by factorisation: exact to round-off.

    *Needs* the p × p matrix in memory (or its n·K × p side where that is smaller and an output has
    no more than 512 numbers), 8 bytes a number. *Costs* n·p² operations for the matrix and p³/3 for
    its factorisation; a new damping one factorisation and no pass over the data. *Use it* for
    networks up to some ten thousand parameters, and as the reference for all others.

    Examples
    --------
    >>> Direct()
    Direct()
    """

    @property
    def name(self) -> str:
        """``"direct"``."""
        return "direct"

    def prepare(self, curvature: LinearOperator) -> DirectFactors:
        """Form the matrix, or its smaller side."""
        return DirectFactors(curvature)

    def cost(self, work: Workload) -> Cost:
        """n·p² + r³/3 + 2·p·r·m operations for a side of r."""
        n, p = work.n, work.p
        side = min(p, n * work.roots) if work.gram else p
        products = 0.0 if work.dense else float(work.roots if work.gram else p)
        flops = n * float(p) ** 2 + side**3 / 3 + 2.0 * p * side * work.m
        return Cost(products, 1, flops, 2.5 * side * p * NUMBER + work.solved_bytes)


@dataclass(frozen=True)
class CG:
    """(C + λI)⁻¹ by preconditioned conjugate gradients: exact to a tolerance.

    *Needs* products with C only, and some vectors (p, m). *Costs* one product with C for each step
    and right-hand side; about ½√κ ln(2/rtol) steps for κ = (λ_max + λ)/λ, fewer with a
    preconditioner. *Use it* where the matrix does not fit, and to make any approximation exact.

    Parameters
    ----------
    preconditioner
        A recipe or its name: ``Nystroem(rank=50)``, ``EKFAC()``, ``Jacobi()``, …
    rtol
        The relative residual to stop at; default 1e-5 in float32, 1e-8 in float64.
    max_steps
        At most so many steps for each right-hand side.
    warm_start
        Begin with the last solution where the same right-hand sides come again, as in a sweep over
        dampings. Keeps them in memory.

    Examples
    --------
    >>> CG(preconditioner="ekfac").name
    'cg+ekfac'
    """

    preconditioner: Recipe | str | None = None
    rtol: float | None = None
    max_steps: int = 1000
    warm_start: bool = False

    @property
    def name(self) -> str:
        """``"cg"``, or ``"cg+nystroem"`` with its preconditioner."""
        chosen = self._preconditioner()
        return "cg" if chosen is None else f"cg+{chosen.name}"

    def _preconditioner(self) -> Recipe | None:
        if self.preconditioner is None:
            return None
        # not above: a recipe is looked up among all, and this is one of them
        from upweight.recipes import choose_recipe

        return choose_recipe(self.preconditioner, "preconditioner")

    def within(self, size: int) -> CG:
        """The same for a block of so many parameters."""
        within = getattr(self._preconditioner(), "within", None)
        return self if within is None else replace(self, preconditioner=within(size))

    def prepare(self, curvature: LinearOperator) -> CGFactors:
        """Prepare the preconditioner."""
        chosen = self._preconditioner()
        return CGFactors(
            curvature,
            None if chosen is None else chosen.prepare(curvature),
            described="none" if chosen is None else repr(chosen),
            rtol=self.rtol,
            max_steps=self.max_steps,
            warm_start=self.warm_start,
        )

    def cost(self, work: Workload) -> Cost:
        """One product for each step and right-hand side."""
        chosen = self._preconditioner()
        rtol = self.rtol or 1e-5
        steps = min(work.cg_steps(rtol), self.max_steps, work.p)
        before = Cost(0, 0, 0, 0)
        if chosen is not None:
            steps, before = math.ceil(SAVED.get(chosen.name, 1.0) * steps), chosen.cost(work)
        return Cost(
            products=before.products + (steps + 1) * work.m,
            calls=before.calls + steps + 1,
            flops=before.flops + 20.0 * steps * work.p * work.m,
            memory=before.memory + 4 * work.solved_bytes,
            note=f"about {steps} steps",
        )


@dataclass(frozen=True)
class LiSSA:
    """(C + λI)⁻¹ by a fixed-point iteration over all rows or over minibatches.

    *Needs* products with C, or with parts of it. *Costs* about √κ/2 · ln(2/rtol) steps with all
    rows, and κ ln(1/rtol) steps with minibatches of them. *Use it* with minibatches where there are
    many more rows than κ = (λ_max + λ)/λ times the batch; conjugate gradients need fewer products
    otherwise.

    Parameters
    ----------
    batch_size
        Rows of one step; None for all rows.
    scale
        s in x ← x + (b − (C + λI)x)/s; None: from an estimate of the largest eigenvalue.
    accelerate
        Chebyshev acceleration of steps with all rows, where no scale is given.
    rtol
        The relative residual to stop at.
    max_steps
        At most so many steps.
    seed
        Of the batches and their order.
    """

    batch_size: int | None = None
    scale: float | None = None
    accelerate: bool = True
    rtol: float = 1e-3
    max_steps: int = 2000
    seed: int = 0

    @property
    def name(self) -> str:
        """``"lissa"``."""
        return "lissa"

    def prepare(self, curvature: LinearOperator) -> LissaFactors:
        """Cut the rows into batches, and estimate the ends of the spectrum."""
        return LissaFactors(
            curvature,
            self._parts(curvature),
            scale=self.scale,
            accelerate=self.accelerate,
            rtol=self.rtol,
            max_steps=self.max_steps,
            semidefinite=curvature.semidefinite,
            seed=self.seed,
        )

    def _parts(self, curvature: LinearOperator) -> list[Part]:
        if self.batch_size is None:
            return []
        if self.batch_size < 1:
            raise ValueError(f"expected batch_size of at least 1, or None; got {self.batch_size}")
        on_rows: Any = getattr(curvature, "on_rows", None)
        if on_rows is None:
            raise TypeError(
                "LiSSA with a batch_size needs a curvature of some rows (on_rows), as "
                f"curvature='ggn' has; got {curvature!r}. Use batch_size=None"
            )
        n = int(getattr(curvature, "risk").n)  # noqa: B009
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed)).tolist()
        batches = [order[a : a + self.batch_size] for a in range(0, n, self.batch_size)]
        if len(batches) == 1:
            return []
        return [Part(on_rows(rows), share=len(rows) / n) for rows in batches]

    def cost(self, work: Workload) -> Cost:
        """One product for each step and right-hand side."""
        if self.batch_size is None or self.batch_size >= work.n:
            steps = float(min(work.chebyshev_steps(self.rtol), self.max_steps))
            passes = steps
        else:
            steps = min(work.condition * 7, self.max_steps)
            passes = 2 * steps * self.batch_size / work.n
        return Cost(
            products=12 + passes * work.m,
            calls=12 + steps,
            flops=10.0 * steps * work.p * work.m,
            memory=2.5 * work.solved_bytes,
            note=f"about {steps:.0f} steps",
        )
