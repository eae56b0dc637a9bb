"""Matrices that are known by eigenvalues and eigenvectors, and the blocks of θ they are of.

Letters: q groups, each with o·i parameters; p parameters, k columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from upweight.curvature.products import turned
from upweight.operator import LinearOperator, wide

__all__ = ["Block", "Kind", "Rotated"]

Kind = Literal["kronecker", "dense", "diagonal"]


class Rotated(LinearOperator):
    """(U ⊗ W) diag(Λ) (U ⊗ W)ᵀ for each of q groups, with orthogonal U and W.

    Parameters
    ----------
    left, right
        U (q, o, o) and W (q, i, i); None for the identity.
    values
        Λ (q, o, i). Vectors are flattened in this order.
    """

    def __init__(self, left: Tensor | None, right: Tensor | None, values: Tensor) -> None:
        super().__init__(values.numel(), values.dtype, values.device)
        self.left, self.right, self.values = left, right, values

    def with_values(self, values: Tensor) -> Rotated:
        """The same eigenvectors with other eigenvalues."""
        return Rotated(self.left, self.right, values)

    def _apply(self, columns: Tensor) -> Tensor:
        x = columns.T.reshape(-1, *self.values.shape)  # (k, q, o, i)
        # vec(V) -> U (Λ ∘ (Uᵀ V W)) Wᵀ
        x = self.back(self.forth(x) * self.values)
        return x.flatten(1).T

    def forth(self, x: Tensor) -> Tensor:
        """Uᵀ X W for X (…, q, o, i)."""
        return turned(turned(x, self.right).mT, self.left).mT

    def back(self, x: Tensor) -> Tensor:
        """U X Wᵀ for X (…, q, o, i)."""
        left, right = (None if u is None else u.mT for u in (self.left, self.right))
        return turned(turned(x, right).mT, left).mT

    def _dense(self, block: int = 1024) -> Tensor:
        kind = wide(self.dtype, self.device)
        values = self.values.to(kind)
        parts: list[Tensor] = []
        for at, own in enumerate(values):
            u = torch.eye(own.shape[0]) if self.left is None else self.left[at]
            w = torch.eye(own.shape[1]) if self.right is None else self.right[at]
            vectors = torch.kron(u.to(self.device, kind), w.to(self.device, kind))
            parts.append((vectors * own.flatten()) @ vectors.T)
        return torch.block_diag(*parts)

    def _diagonal(self, block: int = 1024) -> Tensor:
        x = self.values if self.left is None else self.left.square() @ self.values
        return (x if self.right is None else x @ self.right.square().mT).flatten()


@dataclass(frozen=True)
class Block:
    """The curvature of some parameters, apart from all others.

    Attributes
    ----------
    name
        Of the module they belong to, or of the parameter.
    kind
        ``"kronecker"`` (a grouped convolution has a G ⊗ A for every group), ``"dense"`` or
        ``"diagonal"``.
    operator
        C_h. Its `values` are the eigenvalues.
    locate
        Finds `entries`, which take more memory than the parameters, when they are needed.
    """

    name: str
    kind: Kind
    operator: Rotated
    locate: Callable[[], Tensor]

    @property
    def entries(self) -> Tensor:
        """Where the parameters are in θ, (size,), in the order of `operator`."""
        return self.locate()

    @property
    def parameters(self) -> int:
        """How many parameters the block has."""
        return self.operator.size
