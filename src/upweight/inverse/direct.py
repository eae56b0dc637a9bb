"""(A + λI)⁻¹ by factorisation, exact to round-off.

    A + λI = L Lᵀ                  Cholesky, where it is positive definite
    A = Q diag(s) Qᵀ               eigenvalues, where it is not: X = Q (Qᵀ B / (s + λ))
    A = RᵀR, R (r, p), r < p       the smaller side (Woodbury): X = (B − Rᵀ(RRᵀ + λI)⁻¹ R B) / λ

All in float64, where a matrix from float32 products loses nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from upweight.inverse.certificate import (
    Certificate,
    check_damping,
    relative_residuals,
    warn_of_indefinite,
    warn_of_residuals,
)
from upweight.operator import Dense, Gram, LinearOperator, free_memory, wide

__all__ = ["DirectFactors", "DirectInverse"]

# A solve that leaves more than this is told: float32 gradients are not known better.
RESIDUAL_LIMIT = 1e-6


@runtime_checkable
class Factored(Protocol):
    """An operator A = RᵀR that can give its rows R."""

    @property
    def rank_bound(self) -> int:
        """The number of rows of R."""
        ...

    def factor_rows(self) -> Iterator[Tensor] | None:
        """Blocks of rows of R."""
        ...


class DirectInverse(LinearOperator):
    """(A + λI)⁻¹ from a factorisation, with the residual of every solve in `certificate`."""

    def __init__(
        self,
        operator: LinearOperator,
        damping: float,
        solve: Callable[[Tensor], Tensor],
        certificate: Certificate,
    ) -> None:
        super().__init__(operator.size, operator.dtype, operator.device)
        self.operator = operator
        self.damping = damping
        self.certificate = certificate
        self._solve = solve

    def _apply(self, columns: Tensor) -> Tensor:
        solution = self._solve(columns)
        residual = self.operator @ solution + self.damping * solution - columns
        residuals = relative_residuals(residual, columns)
        self.certificate.add(residuals)
        why = "the matrix is close to singular. Choose a larger damping"
        warn_of_residuals(residuals, RESIDUAL_LIMIT, why)
        return solution


class Solve(LinearOperator):
    """(A + λI)⁻¹ from a factorisation and nothing else: a preconditioner."""

    def __init__(self, operator: LinearOperator, solve: Callable[[Tensor], Tensor]) -> None:
        super().__init__(operator.size, operator.dtype, operator.device)
        self._solve = solve

    def _apply(self, columns: Tensor) -> Tensor:
        return self._solve(columns)


@dataclass(frozen=True)
class _Factor:
    """How to solve with A + λI for one λ; its eigenvalues, where they had to be found."""

    damping: float
    solve: Callable[[Tensor], Tensor]
    described: str
    eigenvalues: Tensor | None = None


class DirectFactors:
    """What a direct inverse keeps of A for every damping: the matrix, its rows R, eigenvalues.

    Parameters
    ----------
    operator
        A. If it offers rows R with A = RᵀR (as the GGN does) and they are fewer than p, the r × r
        matrix RRᵀ is factorised instead of A.

    Raises
    ------
    MemoryError
        If the matrix would not fit into the machine's memory.

    Examples
    --------
    >>> import torch
    >>> factors = DirectFactors(Dense(torch.tensor([[2.0, 0.0], [0.0, 4.0]])))
    >>> factors.inverse(1.0) @ torch.tensor([3.0, 5.0])
    tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self, operator: LinearOperator) -> None:
        p = operator.size
        kind = wide(operator.dtype, operator.device)
        rank = operator.rank_bound if isinstance(operator, Factored) else p
        _check_memory(p, min(rank, p), kind, operator.device)
        blocks = cast(Factored, operator).factor_rows() if rank < p else None
        if blocks is None:
            self.operator: LinearOperator = Dense(_finite(operator.dense()))
        else:
            self.operator = Gram(_finite(torch.cat([b.to(kind) for b in blocks])))
        self.products = int(getattr(operator, "products", 0))
        # What round-off leaves of a zero eigenvalue, relative to the largest: that of the products.
        self._precision = max(_precision(kind, p), torch.finfo(operator.dtype).eps)
        self._eigen: tuple[Tensor, Tensor] | None = None
        self._inner: Tensor | None = None
        self._last: _Factor | None = None

    def inverse(self, damping: float) -> DirectInverse:
        """(A + damping · I)⁻¹.

        Raises
        ------
        ValueError
            If the damping is negative or not finite, or A + λI is singular to working precision.

        Warns
        -----
        IndefiniteCurvatureWarning
            If A + λI has negative eigenvalues. The inverse is exact all the same.
        """
        check_damping(damping)
        certificate = Certificate("direct", damping, self.operator.size, products=self.products)
        factor = self._factor(damping)
        certificate.facts["factorisation"] = factor.described
        if factor.eigenvalues is not None:
            warn_of_indefinite(certificate, factor.eigenvalues, damping)
        return DirectInverse(self.operator, damping, factor.solve, certificate)

    def preconditioner(self, damping: float) -> LinearOperator:
        """(A + damping · I)⁻¹ without a certificate, and without a warning if it is indefinite."""
        check_damping(damping)
        return Solve(self.operator, self._factor(damping).solve)

    def _factor(self, damping: float) -> _Factor:
        # the last one is kept: an inverse and a preconditioner of one damping share it
        if self._last is None or self._last.damping != damping:
            self._last = None  # makes room first
            self._last = self._factorise(damping)
        return self._last

    def _factorise(self, damping: float) -> _Factor:
        if isinstance(self.operator, Gram):
            return self._small_side(self.operator.rows, damping)
        return self._cholesky(damping) or self._eigenvalues(damping)

    def _small_side(self, rows: Tensor, damping: float) -> _Factor:
        if damping == 0.0:
            raise ValueError(
                f"A has rank at most {rows.shape[0]} < {rows.shape[1]} parameters, so A + 0·I is "
                "singular. Choose a damping above 0"
            )
        if self._inner is None:
            self._inner = rows @ rows.T
        shifted = self._inner.clone()
        shifted.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        largest = float(self._inner.diagonal().max())
        if int(failed) or damping <= _precision(rows.dtype, len(rows)) * largest:
            raise ValueError(
                f"A + {damping:g}·I is singular to working precision: A has rank at most "
                f"{rows.shape[0]} < {rows.shape[1]} parameters, and eigenvalues of {largest:.1e} "
                "and more. Choose a larger damping"
            )

        def solve(columns: Tensor) -> Tensor:
            inner = torch.cholesky_solve(rows @ columns, factor)
            return (columns - rows.T @ inner) / damping

        return _Factor(damping, solve, f"Cholesky of the smaller side, {len(rows)} rows")

    def _cholesky(self, damping: float) -> _Factor | None:
        matrix = cast(Dense, self.operator).matrix
        shifted = matrix.clone()
        shifted.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        pivots = factor.diagonal().square()
        if int(failed) or float(pivots.min()) <= self._precision * float(pivots.max()):
            return None
        return _Factor(
            damping,
            lambda columns: torch.cholesky_solve(columns, factor),
            "Cholesky: positive definite",
        )

    def _eigenvalues(self, damping: float) -> _Factor:
        matrix = cast(Dense, self.operator).matrix
        if self._eigen is None:
            values, vectors = torch.linalg.eigh(matrix)
            self._eigen = (values, vectors)
        values, vectors = self._eigen
        shifted = values + damping
        smallest, largest = float(shifted.abs().min()), float(shifted.abs().max())
        if smallest <= self._precision * largest:
            raise ValueError(
                f"A + {damping:g}·I is singular: its eigenvalues go down to {smallest:.1e}, "
                f"against {largest:.1e} at the top. Choose a larger damping"
            )
        return _Factor(
            damping,
            lambda columns: vectors @ ((vectors.T @ columns) / shifted[:, None]),
            "eigenvalues",
            shifted,
        )


def _precision(dtype: torch.dtype, size: int) -> float:
    """What a factorisation may leave of a zero eigenvalue, relative to the largest."""
    return 10 * torch.finfo(dtype).eps * size


def _finite(tensor: Tensor) -> Tensor:
    # A NaN or inf anywhere shows in the sum, which is several times faster than looking at each.
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            "the curvature is not finite (NaN or inf): the loss or an activation overflows at some "
            "row. Try float64, or another curvature"
        )
    return tensor


def _check_memory(p: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
    """A direct inverse holds the matrix and its factor at the same time."""
    needed = 2.5 * rank * p * dtype.itemsize
    there = free_memory(device)
    if there and needed > 0.9 * there:
        raise MemoryError(
            f"a direct inverse for {p:,} parameters needs about {needed / 2**30:.1f} GiB; "
            f"{there / 2**30:.1f} GiB are free. Choose fewer parameters (parameters='head.*'), or, "
            "with few training rows, curvature='ggn', whose smaller side is rows times outputs"
        )
