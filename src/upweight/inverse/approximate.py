"""Inverses that are not exact, with their residual against the exact matrix measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from upweight.inverse.certificate import Certificate, relative_residuals
from upweight.operator import BlockDiagonal, LinearOperator, Product, Scaled, Sum

__all__ = ["ApproximateInverse", "Prepared", "as_preconditioner", "products_spent"]


class Prepared(Protocol):
    """What a method has computed of A for any damping."""

    def inverse(self, damping: float) -> Any:
        """The operator (A + damping · I)⁻¹, with its `Certificate` as ``certificate``."""
        ...


class ApproximateInverse(LinearOperator):
    """An operator P ≈ (A + λI)⁻¹ that can measure how well it solves.

    Parameters
    ----------
    inverse
        P.
    damped
        The exact A + λI.
    certificate
        Where residuals are written.
    refresh
        Called with the certificate after every solve, to bring it up to date.

    Attributes
    ----------
    budget
        For how many more right-hand sides ‖(A + λI)Pb − b‖/‖b‖ is measured, at one product with A
        each; 0 to begin with.
    """

    def __init__(
        self,
        inverse: LinearOperator,
        damped: LinearOperator,
        certificate: Certificate,
        refresh: Callable[[Certificate], None] | None = None,
    ) -> None:
        super().__init__(inverse.size, inverse.dtype, inverse.device)
        self.inner = inverse
        self.damped_operator = damped
        self.certificate = certificate
        self.budget = 0
        self._refresh = refresh

    def _apply(self, columns: Tensor) -> Tensor:
        solution = self.inner @ columns
        self._measure(columns, solution)
        if self._refresh is not None:
            self._refresh(self.certificate)
        return solution

    def _measure(self, columns: Tensor, solution: Tensor) -> None:
        k = columns.shape[1]
        count = min(k, self.budget)
        if not count:
            self.certificate.add(torch.empty(0), k)
            return
        self.budget -= count
        # spread over the columns: neighbours may be rows of one class
        chosen = torch.linspace(0, k - 1, count, device=columns.device).round().long()
        right = columns[:, chosen]
        residual = self.damped_operator @ solution[:, chosen] - right
        self.certificate.add(relative_residuals(residual, right), k)
        self.certificate.products = products_spent(self.damped_operator)


def products_spent(operator: LinearOperator) -> int:
    """Products that the curvatures in an operator have counted."""
    own = int(getattr(operator, "products", 0))
    parts: tuple[LinearOperator, ...] = ()
    if isinstance(operator, Sum):
        parts = operator.terms
    elif isinstance(operator, BlockDiagonal):
        parts = operator.blocks
    elif isinstance(operator, Product):
        parts = operator.factors
    elif isinstance(operator, Scaled):
        parts = (operator.operator,)
    return own + sum(products_spent(part) for part in parts)


def as_preconditioner(prepared: Prepared, damping: float) -> LinearOperator:
    """A positive definite operator that is near (A + damping · I)⁻¹, for conjugate gradients."""
    make = getattr(prepared, "preconditioner", prepared.inverse)
    return make(damping)
