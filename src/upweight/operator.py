"""Symmetric matrices that are known by their products, and the small algebra on them.

Curvature, its damped inverse, a preconditioner and a projection are all the same thing: a symmetric
p × p matrix A of which we can compute A @ V. Letters: p parameters, k right-hand sides, r rank.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Gram",
    "Identity",
    "LinearOperator",
    "Product",
    "Scaled",
    "Sum",
]


def wide(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which sums over rows and factorisations are kept: float64 where it exists."""
    return dtype if device.type == "mps" else torch.promote_types(dtype, torch.float64)


def free_memory(device: torch.device) -> int | None:
    """Bytes of free memory on a device, where it can be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


class LinearOperator(ABC):
    """A symmetric p × p matrix A, known by its products A @ V.

    Parameters
    ----------
    size
        p, the number of rows and columns.
    dtype, device
        The dtype in which products are computed, and where.

    Notes
    -----
    ``A @ v`` takes a vector (p,) or columns (p, k) and returns the same shape in ``A.dtype``.
    ``A + B``, ``2.0 * A`` and ``A.damped(0.1)`` (A + 0.1 I) are operators again. A subclass writes
    `_apply`; it may also write `_dense` and `_diagonal` where it knows a shorter way.

    Examples
    --------
    >>> import torch
    >>> A = Diagonal(torch.tensor([1.0, 2.0])).damped(0.5)
    >>> A @ torch.ones(2)
    tensor([1.5000, 2.5000])
    """

    #: Whether it is known to have no negative eigenvalue.
    semidefinite = False

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.size = int(size)
        self.dtype = dtype
        self.device = torch.device(device)

    @property
    def shape(self) -> tuple[int, int]:
        """(p, p)."""
        return (self.size, self.size)

    @abstractmethod
    def _apply(self, columns: Tensor) -> Tensor:
        """A @ columns for columns (p, k) in ``self.dtype`` on ``self.device``."""

    def __matmul__(self, other: Tensor) -> Tensor:
        if other.ndim not in (1, 2) or other.shape[0] != self.size:
            raise ValueError(
                f"expected a vector ({self.size},) or columns ({self.size}, k) to multiply with "
                f"{self!r}; got shape {tuple(other.shape)}"
            )
        columns = other.to(self.device, self.dtype)
        if other.ndim == 1:
            return self._apply(columns[:, None])[:, 0]
        return self._apply(columns)

    def dense(self) -> Tensor:
        """The matrix itself, (p, p), in `wide` precision."""
        return self._dense()

    def _dense(self, block: int = 1024) -> Tensor:
        out = torch.empty(self.shape, dtype=wide(self.dtype, self.device), device=self.device)
        for start in range(0, self.size, block):
            stop = min(start + block, self.size)
            out[:, start:stop] = self @ basis_columns(self, start, stop)
        return out

    def diagonal(self) -> Tensor:
        """The diagonal, (p,)."""
        return self._diagonal()

    def _diagonal(self, block: int = 1024) -> Tensor:
        parts = []
        for start in range(0, self.size, block):
            stop = min(start + block, self.size)
            columns = self @ basis_columns(self, start, stop)
            parts.append(columns[start:stop].diagonal())
        return torch.cat(parts)

    def damped(self, damping: float) -> LinearOperator:
        """A + damping · I."""
        return self + Identity(self.size, self.dtype, self.device) * damping

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum([self, other])

    def __mul__(self, factor: float) -> LinearOperator:
        return Scaled(self, float(factor))

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.size} × {self.size}, {str(self.dtype)[6:]}>"


def basis_columns(operator: LinearOperator, start: int, stop: int) -> Tensor:
    """Columns start…stop of the identity, (p, stop - start)."""
    columns = torch.zeros(operator.size, stop - start, dtype=operator.dtype, device=operator.device)
    columns[start:stop].fill_diagonal_(1.0)
    return columns


class Identity(LinearOperator):
    """The identity I (p × p)."""

    def _apply(self, columns: Tensor) -> Tensor:
        return columns.clone()

    def _diagonal(self, block: int = 1024) -> Tensor:
        return torch.ones(self.size, dtype=self.dtype, device=self.device)


class Diagonal(LinearOperator):
    """diag(d), for a vector d of shape (p,)."""

    def __init__(self, entries: Tensor) -> None:
        super().__init__(entries.numel(), entries.dtype, entries.device)
        self.entries = entries

    def _apply(self, columns: Tensor) -> Tensor:
        return self.entries[:, None] * columns

    def _diagonal(self, block: int = 1024) -> Tensor:
        return self.entries.clone()


class Dense(LinearOperator):
    """A symmetric matrix that is kept in memory, (p, p)."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"expected a square matrix; got shape {tuple(matrix.shape)}")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _apply(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns

    def _dense(self, block: int = 1024) -> Tensor:
        return self.matrix.to(wide(self.dtype, self.device))

    def _diagonal(self, block: int = 1024) -> Tensor:
        return self.matrix.diagonal().clone()


class Gram(LinearOperator):
    """RᵀR for rows R of shape (r, p): positive semi-definite, of rank at most r."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows.shape[1], rows.dtype, rows.device)
        self.rows = rows

    def _apply(self, columns: Tensor) -> Tensor:
        return self.rows.T @ (self.rows @ columns)

    def _diagonal(self, block: int = 1024) -> Tensor:
        return self.rows.square().sum(0)


class BlockDiagonal(LinearOperator):
    """diag(A_1, …, A_B): parameters are split into blocks.

    Parameters
    ----------
    blocks
        A_1, …, A_B.
    entries
        Which parameters each block consists of, (size of the block,): every one in one block.
        Default: consecutive ones.

    Examples
    --------
    >>> import torch
    >>> blocks = [Diagonal(torch.tensor([2.0, 3.0])), Diagonal(torch.tensor([5.0]))]
    >>> BlockDiagonal(blocks, [torch.tensor([0, 2]), torch.tensor([1])]).diagonal()
    tensor([2., 5., 3.])
    """

    def __init__(
        self, blocks: Sequence[LinearOperator], entries: Sequence[Tensor] | None = None
    ) -> None:
        if not blocks:
            raise ValueError("expected at least one block")
        sizes = [block.size for block in blocks]
        super().__init__(sum(sizes), blocks[0].dtype, blocks[0].device)
        self.blocks = tuple(blocks)
        every = torch.arange(self.size)
        order = every if entries is None else torch.cat([e.cpu() for e in entries])
        given = sizes if entries is None else [len(e) for e in entries]
        seen = torch.zeros(self.size, dtype=torch.bool)
        seen[order.clamp(0, self.size - 1)] = True
        if given != sizes or not bool(seen.all()):
            raise ValueError(
                f"expected every one of {self.size} parameters in one block of sizes {sizes}; got "
                f"entries of lengths {given}"
            )
        self.entries = tuple(_compact(part, self.device) for part in order.split(sizes))

    def _apply(self, columns: Tensor) -> Tensor:
        out = torch.empty_like(columns)
        for block, entries in zip(self.blocks, self.entries, strict=True):
            out[entries] = (block @ columns[entries]).to(out.dtype)
        return out

    def _dense(self, block: int = 1024) -> Tensor:
        out = torch.zeros(self.shape, dtype=wide(self.dtype, self.device), device=self.device)
        every = torch.arange(self.size, device=self.device)
        for part, entries in zip(self.blocks, self.entries, strict=True):
            at = every[entries]
            out[at[:, None], at] = part.dense().to(out.dtype)
        return out

    def _diagonal(self, block: int = 1024) -> Tensor:
        out = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for part, entries in zip(self.blocks, self.entries, strict=True):
            out[entries] = part.diagonal().to(out.dtype)
        return out


def _compact(index: Tensor, device: torch.device) -> Tensor | slice:
    """Positions as a slice where they follow each other, which is faster."""
    start = int(index[0]) if len(index) else 0
    ordered = torch.equal(index, torch.arange(start, start + len(index)))
    return slice(start, start + len(index)) if ordered else index.to(device)


class Sum(LinearOperator):
    """A_1 + … + A_m."""

    def __init__(self, terms: Sequence[LinearOperator]) -> None:
        sizes = {t.size for t in terms}
        if len(sizes) != 1:
            raise ValueError(f"expected operators of one size to add; got sizes {sorted(sizes)}")
        dtype = terms[0].dtype
        for term in terms[1:]:
            dtype = torch.promote_types(dtype, term.dtype)
        super().__init__(terms[0].size, dtype, terms[0].device)
        self.terms = tuple(terms)

    def _apply(self, columns: Tensor) -> Tensor:
        total = (self.terms[0] @ columns).to(self.dtype)
        for term in self.terms[1:]:
            total = total + term @ columns
        return total

    def _dense(self, block: int = 1024) -> Tensor:
        return torch.stack([t.dense() for t in self.terms]).sum(0)

    def _diagonal(self, block: int = 1024) -> Tensor:
        return torch.stack([t.diagonal().to(self.dtype) for t in self.terms]).sum(0)


class Scaled(LinearOperator):
    """c · A for a number c."""

    def __init__(self, operator: LinearOperator, factor: float) -> None:
        super().__init__(operator.size, operator.dtype, operator.device)
        self.operator = operator
        self.factor = factor

    def _apply(self, columns: Tensor) -> Tensor:
        return self.factor * (self.operator @ columns)

    def _dense(self, block: int = 1024) -> Tensor:
        return self.factor * self.operator.dense()

    def _diagonal(self, block: int = 1024) -> Tensor:
        return self.factor * self.operator.diagonal()


class Product(LinearOperator):
    """A_1 ⋯ A_m, for factors whose product is symmetric (as in a preconditioned P½ A P½)."""

    def __init__(self, factors: Sequence[LinearOperator]) -> None:
        sizes = {f.size for f in factors}
        if len(sizes) != 1:
            raise ValueError(f"expected operators of one size; got sizes {sorted(sizes)}")
        super().__init__(factors[0].size, factors[0].dtype, factors[0].device)
        self.factors = tuple(factors)

    def _apply(self, columns: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            columns = factor @ columns
        return columns
