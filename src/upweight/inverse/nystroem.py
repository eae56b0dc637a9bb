"""Nyström's approximation of a symmetric matrix from products with random directions.

    A ≈ Y W⁺ Yᵀ,   Y = AQ,   W = QᵀAQ,   Q (p, r) orthonormal    where A is positive semi-definite
    A ≈ U (UᵀAU) Uᵀ,   U an orthonormal basis of Y               where W shows that it is not

The first form is exact on the span of Q and needs no second round of products. With an indefinite W
its inverse may be anything, so there the matrix is projected on the range of Y instead
(Rayleigh-Ritz), for r more products.

References
----------
J. A. Tropp, A. Yurtsever, M. Udell, V. Cevher, *Fixed-rank approximation of a positive-semidefinite
matrix from streaming data* (2017), §3. Z. Frangella, J. A. Tropp, M. Udell, *Randomized Nyström
preconditioning* (2023), §2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from upweight.operator import LinearOperator

__all__ = ["Eigenpairs", "nystroem"]


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenvalues (r,) and orthonormal eigenvectors (p, r) of A, and how they came."""

    values: Tensor
    vectors: Tensor
    facts: dict[str, Any] = field(default_factory=lambda: {})


def nystroem(operator: LinearOperator, test: Tensor, power: int) -> Eigenpairs:
    """Eigenpairs of the approximation of A by directions `test` (p, r)."""
    basis = torch.linalg.qr(test).Q
    for _ in range(power):
        basis = torch.linalg.qr(_product(operator, basis)).Q
    sketch = _product(operator, basis)  # Y
    core = basis.T @ sketch
    core = (core + core.T) / 2  # W
    values = torch.linalg.eigvalsh(core)
    # what round-off in the products may leave of a zero eigenvalue
    size = float(sketch.norm())
    if size == 0.0:
        return Eigenpairs(torch.zeros_like(values), basis, {"form": "A is zero"})
    noise = 10 * len(values) ** 0.5 * torch.finfo(operator.dtype).eps * size
    if float(values[0]) < -noise:
        return _rayleigh_ritz(operator, sketch)
    return _semidefinite(basis, sketch, core, noise)


def _semidefinite(basis: Tensor, sketch: Tensor, core: Tensor, noise: float) -> Eigenpairs:
    shift = 0.0
    factor, failed = torch.linalg.cholesky_ex(core)
    pivots = factor.diagonal().square()
    if int(failed) or float(pivots.min()) <= noise:
        # (A + νI) in place of A, and ν taken off its eigenvalues again
        shift = noise
        sketch = sketch + shift * basis
        core = core + shift * torch.eye(len(core), dtype=core.dtype, device=core.device)
        lowest = float(torch.linalg.eigvalsh(core)[0])
        if lowest <= noise / 2:
            extra = noise - lowest
            shift += extra
            sketch = sketch + extra * basis
            core.diagonal().add_(extra)
        factor = torch.linalg.cholesky(core)
    root = torch.linalg.solve_triangular(factor, sketch.T, upper=False).T  # Y W^{-1/2}
    vectors, singular, _ = torch.linalg.svd(root, full_matrices=False)
    values = (singular.square() - shift).clamp(min=0.0)
    facts: dict[str, Any] = {"form": "Nyström"}
    if shift:
        facts["shift"] = f"{shift:.1e}"
    return Eigenpairs(values, vectors, facts)


def _rayleigh_ritz(operator: LinearOperator, sketch: Tensor) -> Eigenpairs:
    basis = torch.linalg.qr(sketch).Q
    core = basis.T @ _product(operator, basis)
    values, inner = torch.linalg.eigh((core + core.T) / 2)
    return Eigenpairs(values, basis @ inner, {"form": "Rayleigh-Ritz: A is indefinite"})


def _product(operator: LinearOperator, columns: Tensor) -> Tensor:
    product = (operator @ columns).to(columns.dtype)
    if not bool(torch.isfinite(product).all()):
        raise ValueError("a product with the curvature is not finite (NaN or inf)")
    return product
