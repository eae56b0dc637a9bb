"""Recipes by Kronecker factors of every layer's block."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from upweight.costs import NUMBER, Cost, Workload
from upweight.curvature import KroneckerCurvature
from upweight.inverse import ApproximateInverse, Certificate, check_damping
from upweight.inverse.approximate import products_spent
from upweight.operator import Diagonal, LinearOperator

__all__ = ["EKFAC", "KFAC", "KroneckerFactors"]

KINDS = ("kronecker", "dense", "diagonal")
FisherKind = Literal["exact", "sampled", "empirical"]


@dataclass(frozen=True)
class _Kronecker(ABC):
    """What K-FAC and EK-FAC are told."""

    fisher: FisherKind = "exact"
    samples: int = 1
    seed: int = 0
    relative: Literal["global", "layer"] | None = None
    other: Literal["auto", "dense", "diagonal", "refuse"] = "auto"
    factored: float | None = None

    #: C is taken as zero between layers.
    by_block: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """``"kfac"`` or ``"ekfac"``."""

    def prepare(
        self, curvature: LinearOperator, *, factors: str | os.PathLike[str] | None = None
    ) -> KroneckerFactors:
        """Collect the factors, and for EK-FAC the eigenvalues in their basis; or from a file."""
        return KroneckerFactors.of(curvature, self, factors)

    def cost(self, work: Workload) -> Cost:
        """One or two passes with K output gradients for every row."""
        roots = {"exact": work.roots, "sampled": self.samples, "empirical": 1}[self.fisher]
        sides = sum(o**2 + i**2 for o, i in work.layers)
        cubes = sum(o**3 + i**3 for o, i in work.layers)
        flops = 4.0 * work.n * roots * sides + 15.0 * cubes + 8.0 * work.m * work.p
        memory = 2 * NUMBER * (sides + work.p) + work.solved_bytes
        note = f"no product, but {roots} backward passes for every row"
        return Cost(roots, calls=2, flops=flops, memory=memory, note=note)


@dataclass(frozen=True)
class KFAC(_Kronecker):
    """(C + λI)⁻¹ by Kronecker factors: a block G ⊗ A for every layer.

    *Needs* Σ (o² + i²) numbers over the layers. *Costs* one pass over the rows and eigenvalues of
    matrices of the size of a layer's sides. *Use it* where `EKFAC` is too slow, which is rare.

    Parameters
    ----------
    fisher
        Labels for the output gradients: ``"exact"`` sums over all that the model could give (for
        the losses without a known distribution, over the roots of the output Hessian),
        ``"sampled"`` draws some, ``"empirical"`` takes those of the rows.
    samples, seed
        For ``"sampled"``.
    relative
        None: λ is added to all eigenvalues. ``"global"``: λ times their mean (with `blocks`, of
        those in the block). ``"layer"``: λ times the mean of the layer's own.
    other
        Parameters without factors (norms, embeddings, …) as exact ``"dense"`` or ``"diagonal"``
        blocks, by their size (``"auto"``), or ``"refuse"``.
    factored
        With which relative error scores may take 1/(Λ + λ) as a short sum of products, which is
        faster by far for networks with one position per row and wide layers, and never slower. The
        error that was reached is in the certificate. None: exact.

    References
    ----------
    J. Martens, R. Grosse, *Optimizing neural networks with Kronecker-factored approximate
    curvature*, ICML 2015, §3.

    Examples
    --------
    >>> KFAC(fisher="sampled").name
    'kfac'
    """

    @property
    def name(self) -> str:
        """``"kfac"``."""
        return "kfac"


@dataclass(frozen=True)
class EKFAC(_Kronecker):
    """(C + λI)⁻¹ by Kronecker factors with the right eigenvalues: a block for every layer.

        C_layer ≈ (U_G ⊗ U_A) diag(Λ) (U_G ⊗ U_A)ᵀ

    *Needs* Σ (o² + i² + o·i) numbers over the layers. *Costs* one or two passes over the rows and
    eigenvalues of matrices of the size of a layer's sides; a new damping nothing. *Use it* for
    large networks, and to precondition `CG`. Between layers it takes C as zero: on small networks
    scores are of the right order and rank, not of the right size.

    Parameters
    ----------
    fisher, samples, seed, relative, other, factored
        As for `KFAC`.
    correction_rows
        The number, or the share below 1, of rows at random that the eigenvalues are computed from;
        default: all. They are means of squares over rows: how many do depends on how much rows
        differ, and another seed shows it.

    References
    ----------
    T. George, C. Laurent, X. Bouthillier, N. Ballas, P. Vincent, *Fast approximate natural gradient
    descent in a Kronecker-factored eigenbasis*, NeurIPS 2018, §3. R. Grosse et al., *Studying large
    language model generalization with influence functions* (2023), §2.4.

    Examples
    --------
    >>> EKFAC(relative="layer").name
    'ekfac'
    """

    correction_rows: int | float | None = None

    @property
    def name(self) -> str:
        """``"ekfac"``."""
        return "ekfac"


@dataclass(frozen=True)
class KroneckerFactors:
    """Kronecker factors of a curvature, and the exact one to measure against."""

    exact: LinearOperator
    kronecker: KroneckerCurvature
    relative: Literal["global", "layer"] | None
    factored: float | None = None

    @classmethod
    def of(
        cls,
        curvature: LinearOperator,
        recipe: _Kronecker,
        factors: str | os.PathLike[str] | None = None,
    ) -> KroneckerFactors:
        """The factors of the risk behind a curvature."""
        risk: Any = getattr(curvature, "risk", None)
        if risk is None:
            raise TypeError(
                f"{recipe.name} needs a curvature of a model and rows, as 'ggn', 'hessian' and "
                f"'fisher' are; got {curvature!r}"
            )
        if recipe.relative not in (None, "global", "layer"):
            raise ValueError(
                f"expected relative None, 'global' or 'layer'; got {recipe.relative!r}"
            )
        if recipe.factored is not None and not 0.0 < recipe.factored < 1.0:
            raise ValueError(
                f"expected a relative error between 0 and 1 as factored, or None; got "
                f"{recipe.factored!r}"
            )
        kronecker = KroneckerCurvature(
            risk,
            corrected=recipe.name == "ekfac",
            fisher=recipe.fisher,
            samples=recipe.samples,
            seed=recipe.seed,
            distribution=getattr(curvature, "distribution", None),
            correction_rows=getattr(recipe, "correction_rows", None),
            other=recipe.other,
            factors=factors,
        )
        return cls(curvature, kronecker, recipe.relative, recipe.factored)

    def inverse(self, damping: float) -> ApproximateInverse:
        """Block by block, (C_layer + λI)⁻¹."""
        kronecker = self.kronecker
        certificate = Certificate(kronecker.name, damping, kronecker.size)
        certificate.coverage = kronecker.coverage
        certificate.products = products_spent(self.exact)
        certificate.facts["passes over the rows"] = kronecker.passes
        counts = Counter[str]()
        for block in kronecker.blocks:
            counts[block.kind] += block.parameters
        if len(counts) > 1:
            for kind, count in sorted(counts.items(), key=lambda item: KINDS.index(item[0])):
                certificate.facts[f"parameters in {kind} blocks"] = f"{count:,}"
        for note in kronecker.notes:
            certificate.note(note)
        solve = self.kronecker.inverse(damping, relative=self.relative, factored=self.factored)
        return ApproximateInverse(solve, self._damped(damping, certificate), certificate)

    def _damped(self, damping: float, certificate: Certificate) -> LinearOperator:
        """The exact C with the damping that the blocks have."""
        if self.relative is None:
            return self.exact.damped(damping)
        shift = self.shift(damping)
        certificate.facts["damping of layers"] = (
            f"{float(shift.min()):.3g} to {float(shift.max()):.3g}"
        )
        return self.exact + Diagonal(shift)

    def shift(self, damping: float) -> torch.Tensor:
        """The damping of every parameter, (p,)."""
        shift = torch.empty(self.exact.size, dtype=self.exact.dtype, device=self.exact.device)
        own = self.kronecker.dampings(damping, self.relative)
        for block, value in zip(self.kronecker.blocks, own, strict=True):
            shift[block.entries.to(shift.device)] = value
        return shift

    def preconditioner(self, damping: float) -> LinearOperator:
        """Block by block, (C_layer + λI)⁻¹."""
        check_damping(damping)
        return self.kronecker.inverse(damping, relative=self.relative)
