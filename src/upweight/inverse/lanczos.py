"""Lanczos' method with full reorthogonalisation, and what it tells of a spectrum.

    A Q = Q T + β_r q_{r+1} e_rᵀ,     T tridiagonal (r, r), Q (p, r) orthonormal

Eigenvalues of T (Ritz values) approach those of A, the outer ones first; an eigenvector s of T with
A's Ritz vector Qs leaves ‖A Qs − θ Qs‖ = β_r |s_r|.

References
----------
B. N. Parlett, *The symmetric eigenvalue problem* (1998), §13.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upweight.operator import LinearOperator, wide

__all__ = ["Ritz", "lanczos", "random_columns"]


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs, eigenvalues ascending.

    Attributes
    ----------
    values, vectors
        (r,) and orthonormal (p, r).
    errors
        ‖A v − θ v‖ for each; every |θ − eigenvalue of A| is below it.
    """

    values: Tensor
    vectors: Tensor
    errors: Tensor


def random_columns(operator: LinearOperator, k: int, seed: int) -> Tensor:
    """Standard normal columns (p, k), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    kind = wide(operator.dtype, operator.device)
    columns = torch.randn(operator.size, k, generator=generator, dtype=torch.float64)
    return columns.to(operator.device, kind)


def lanczos(operator: LinearOperator, start: Tensor, steps: int, *, seed: int = 0) -> Ritz:
    """Ritz pairs from `steps` products, begun with the vector `start` (p,).

    Where the Krylov space of `start` ends earlier (it is invariant: multiple eigenvalues, or a
    start with few components), a random vector continues it.
    """
    p, steps = operator.size, min(steps, operator.size)
    kind = wide(operator.dtype, operator.device)
    basis = torch.zeros(p, steps, dtype=kind, device=operator.device)
    tridiagonal = torch.zeros(steps, steps, dtype=kind, device=operator.device)
    precision, scale = 10 * torch.finfo(operator.dtype).eps, 0.0
    rest, beta = start.to(operator.device, kind), float(start.norm())
    for j in range(steps):
        if beta <= precision * scale:
            rest, beta = _orthogonal(random_columns(operator, 1, seed + j)[:, 0], basis[:, :j]), 0.0
        elif j:
            tridiagonal[j, j - 1] = tridiagonal[j - 1, j] = beta
        basis[:, j] = rest / rest.norm()
        product = (operator @ basis[:, j]).to(kind)
        if not bool(torch.isfinite(product).all()):
            raise ValueError("a product with the curvature is not finite (NaN or inf)")
        tridiagonal[j, j] = basis[:, j] @ product
        rest = _orthogonal(product, basis[:, : j + 1])
        beta, scale = float(rest.norm()), max(scale, float(product.norm()))
    values, inner = torch.linalg.eigh(tridiagonal)
    return Ritz(values, basis @ inner, beta * inner[-1].abs())


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    # twice is enough (Parlett, §6.9): once leaves what cancellation made of it
    for _ in range(2):
        vector = vector - basis @ (basis.T @ vector)
    return vector
