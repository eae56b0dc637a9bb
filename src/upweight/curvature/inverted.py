"""The damped inverse of a Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from upweight.curvature.rotated import Rotated
from upweight.operator import BlockDiagonal, LinearOperator

if TYPE_CHECKING:
    from upweight.curvature.kronecker import KroneckerCurvature

__all__ = ["KroneckerInverse"]


class KroneckerInverse(LinearOperator):
    """(C_h + λ_h I)⁻¹ block by block.

    Parameters
    ----------
    curvature
        C.
    weights
        1/(Λ + λ_h) for every block, (q, o, i).
    factored
        With which relative error scores may take the weights as sums of products; None: not.
    """

    semidefinite = True

    def __init__(
        self,
        curvature: KroneckerCurvature,
        weights: Sequence[Tensor],
        factored: float | None = None,
    ) -> None:
        super().__init__(curvature.size, curvature.dtype, curvature.device)
        self.curvature = curvature
        self.weights = tuple(weights)
        self.factored = factored

    @cached_property
    def _whole(self) -> BlockDiagonal:
        """For vectors of all parameters; scores need none."""
        return BlockDiagonal(
            [self.block(at) for at in range(len(self.weights))],
            [block.entries for block in self.curvature.blocks],
        )

    def block(self, at: int) -> Rotated:
        """(C_h + λ_h I)⁻¹ alone."""
        return self.curvature.blocks[at].operator.with_values(self.weights[at])

    def _apply(self, columns: Tensor) -> Tensor:
        return self._whole @ columns

    def _dense(self, block: int = 1024) -> Tensor:
        return self._whole.dense()

    def _diagonal(self, block: int = 1024) -> Tensor:
        return self._whole.diagonal()
