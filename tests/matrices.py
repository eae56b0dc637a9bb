"""Small dense matrices as operators, which count what they are multiplied with."""

from __future__ import annotations

import torch
from torch import Tensor

from upweight.operator import LinearOperator


class Counting(LinearOperator):
    """A dense matrix that counts the columns that it is multiplied with, call by call."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix
        self.calls: list[int] = []

    @property
    def products(self) -> int:
        return sum(self.calls)

    def _apply(self, columns: Tensor) -> Tensor:
        self.calls.append(columns.shape[1])
        return self.matrix @ columns


def with_spectrum(values: list[float] | Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    ).Q
    return (q * values) @ q.T


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def solved(matrix: Tensor, damping: float, right: Tensor) -> Tensor:
    """(A + λI)⁻¹ B by LU, in float64."""
    shifted = matrix.double() + damping * torch.eye(len(matrix), dtype=torch.float64)
    return torch.linalg.solve(shifted, right.double())


def residuals(matrix: Tensor, damping: float, x: Tensor, right: Tensor) -> Tensor:
    """‖(A + λI)x − b‖ / ‖b‖ column by column."""
    rest = matrix.double() @ x.double() + damping * x.double() - right.double()
    return rest.norm(dim=0) / right.double().norm(dim=0)


def off(got: Tensor, wanted: Tensor) -> float:
    """The relative distance of two matrices."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
