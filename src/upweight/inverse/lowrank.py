"""Damped inverses from some eigenpairs of A, and the complement of their span.

    A ≈ V diag(s) Vᵀ,  V (p, r) orthonormal
    (A + λI)⁻¹ ≈ V diag(1/(s + λ)) Vᵀ + (1/λ)(I − VVᵀ)

Leaving out the complement, as low-rank inverses often do, would set the solution to zero in all the
other p − r directions, where it is in truth at its largest.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from upweight.inverse.approximate import ApproximateInverse, products_spent
from upweight.inverse.certificate import Certificate, check_damping, warn_of_indefinite
from upweight.inverse.lanczos import lanczos, random_columns
from upweight.inverse.nystroem import Eigenpairs, nystroem
from upweight.operator import LinearOperator, wide

__all__ = ["LanczosFactors", "LowRank", "NystroemFactors"]


class LowRank(LinearOperator):
    """V diag(d) Vᵀ + c (I − VVᵀ) for orthonormal V (p, r).

    Examples
    --------
    >>> V = torch.tensor([[1.0], [0.0]])
    >>> LowRank(V, torch.tensor([3.0]), 2.0).dense()
    tensor([[3., 0.],
            [0., 2.]], dtype=torch.float64)
    """

    def __init__(self, vectors: Tensor, entries: Tensor, complement: float) -> None:
        super().__init__(vectors.shape[0], vectors.dtype, vectors.device)
        self.vectors = vectors
        self.entries = entries
        self.complement = complement

    def _apply(self, columns: Tensor) -> Tensor:
        inner = (self.entries - self.complement)[:, None] * (self.vectors.T @ columns)
        return self.vectors @ inner + self.complement * columns


class _Pairs(Protocol):
    """Where eigenpairs come from."""

    method: str
    operator: LinearOperator

    def pairs(self) -> Eigenpairs: ...


def _check_damping(factors: _Pairs, damping: float, rank: int) -> None:
    check_damping(damping)
    p = factors.operator.size
    if damping == 0.0 and rank < p:
        raise ValueError(
            f"{factors.method} with rank {rank} of {p} takes the other directions as eigenvalue 0, "
            "so A + 0·I is singular. Choose a damping above 0"
        )


def smallest_kept(factors: _Pairs) -> float:
    """The smallest size of an eigenvalue that was kept; 0 where all are."""
    values = factors.pairs().values
    return float(values.abs().min()) if len(values) < factors.operator.size else 0.0


def _inverse(factors: _Pairs, damping: float) -> ApproximateInverse:
    pairs = factors.pairs()
    p, r = pairs.vectors.shape
    _check_damping(factors, damping, r)
    shifted = pairs.values + damping
    largest = float(shifted.abs().max())
    precision = 10 * torch.finfo(factors.operator.dtype).eps
    if float(shifted.abs().min()) <= precision * largest:
        raise ValueError(
            f"A + {damping:g}·I is singular to working precision: an eigenvalue is "
            f"{float(shifted.abs().min()):.1e}, against {largest:.1e} at the top. Choose another "
            "damping"
        )
    certificate = Certificate(factors.method, damping, p)
    certificate.products = products_spent(factors.operator)
    certificate.facts["rank"] = f"{r} of {p}"
    certificate.facts.update(pairs.facts)
    cut = smallest_kept(factors)
    if damping < cut / 2:
        certificate.note(
            f"the damping is below {cut:.2g}, the smallest eigenvalue kept: directions that were "
            "not kept count as if they had no curvature at all. Scores are truer with a damping "
            "near it, or a higher rank"
        )
    warn_of_indefinite(certificate, shifted, damping)
    complement = 1.0 / damping if damping else 0.0
    # in the precision of A: the approximation costs more than round-off does
    kind = factors.operator.dtype
    solve = LowRank(pairs.vectors.to(kind), (1.0 / shifted).to(kind), complement)
    return ApproximateInverse(solve, factors.operator.damped(damping), certificate)


def _preconditioner(factors: _Pairs, damping: float) -> LinearOperator:
    """Positive definite, and the complement as if its eigenvalues went on from the smallest kept.

    For conjugate gradients that is better than 1/λ: what is left of the spectrum begins there.
    """
    check_damping(damping)
    pairs = factors.pairs()
    values = pairs.values.clamp(min=0.0)
    smallest = float(values.min()) if len(values) < factors.operator.size else 0.0
    floor = torch.finfo(values.dtype).eps * float(values.max()) or 1.0
    shifted = (values + damping).clamp(min=floor)
    return LowRank(pairs.vectors, 1.0 / shifted, 1.0 / max(smallest + damping, floor))


def check_rank(rank: int, size: int) -> None:
    """Refuse a rank that is no number from 1 to p."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"expected a whole number for the rank; got {rank!r}")
    if not 1 <= rank <= size:
        raise ValueError(f"expected a rank from 1 to p = {size}; got {rank}")


class LanczosFactors:
    """The r eigenpairs of largest |eigenvalue| that some steps of Lanczos' method find.

    Parameters
    ----------
    operator
        A.
    rank
        r, at most p.
    steps
        Products to spend, at least r; default r.
    informed
        Whether `inform` may give another start than a random one. For a start b, (A + λI)⁻¹b is
        exact up to the error of conjugate gradients after as many steps, long before the spectrum
        is known.
    seed
        Of the random start.
    """

    method = "arnoldi"

    def __init__(
        self,
        operator: LinearOperator,
        rank: int,
        *,
        steps: int | None = None,
        informed: bool = False,
        seed: int = 0,
    ) -> None:
        check_rank(rank, operator.size)
        if steps is not None and not rank <= steps:
            raise ValueError(f"expected at least as many steps as the rank {rank}; got {steps}")
        self.operator = operator
        self.rank = rank
        self.steps = min(rank if steps is None else steps, operator.size)
        self.informed = informed
        self.seed = seed
        self._start: Tensor | None = None
        self._found: Eigenpairs | None = None

    @property
    def waits(self) -> bool:
        """Whether the eigenpairs should not be computed before a start is known."""
        return self.informed and self._start is None

    def check(self, damping: float) -> None:
        """Refuse a damping that no eigenpairs could make up for."""
        _check_damping(self, damping, self.rank)

    def inform(self, start: Tensor) -> bool:
        """Begin with this vector (p,), if that is wanted; whether it changes the eigenpairs."""
        if not self.informed or float(start.norm()) == 0.0:
            return False
        if self._start is not None and torch.equal(self._start, start):
            return False
        self._start, self._found = start, None
        return True

    def pairs(self) -> Eigenpairs:
        """The eigenpairs, computed when they are first needed."""
        if self._found is None:
            start = self._start
            facts: dict[str, Any] = {"start": "the mean right-hand side"}
            if start is None:
                start = random_columns(self.operator, 1, self.seed)[:, 0]
                facts["start"] = "random"
            ritz = lanczos(self.operator, start, self.steps, seed=self.seed + 1)
            kept = ritz.values.abs().argsort(descending=True, stable=True)[: self.rank]
            facts["largest eigenvalue"] = f"{float(ritz.values.max()):.3g}"
            self._found = Eigenpairs(ritz.values[kept], ritz.vectors[:, kept], facts)
        return self._found

    def inverse(self, damping: float) -> ApproximateInverse:
        """(A + damping · I)⁻¹ on the span of the eigenvectors, 1/λ on its complement."""
        return _inverse(self, damping)

    def preconditioner(self, damping: float) -> LinearOperator:
        """The same, positive definite, for conjugate gradients."""
        return _preconditioner(self, damping)


class NystroemFactors:
    """Eigenpairs of the Nyström approximation of A from r random directions.

    Parameters
    ----------
    operator
        A.
    rank
        r, at most p.
    power
        Times that the random directions are multiplied with A first.
    seed
        Of the directions.
    """

    method = "nystroem"

    def __init__(
        self, operator: LinearOperator, rank: int, *, power: int = 0, seed: int = 0
    ) -> None:
        check_rank(rank, operator.size)
        if power < 0:
            raise ValueError(f"expected power of at least 0; got {power}")
        self.operator = operator
        kind = wide(operator.dtype, operator.device)
        test = random_columns(operator, rank, seed).to(kind)
        self._found = nystroem(operator, test, power)

    def pairs(self) -> Eigenpairs:
        """The eigenpairs."""
        return self._found

    def inverse(self, damping: float) -> ApproximateInverse:
        """(A + damping · I)⁻¹ on the span of the eigenvectors, 1/λ on its complement."""
        return _inverse(self, damping)

    def preconditioner(self, damping: float) -> LinearOperator:
        """The same, positive definite, for conjugate gradients."""
        return _preconditioner(self, damping)
