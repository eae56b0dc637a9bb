"""Gradients of rows, layer by layer, as factors that are never multiplied out unless it pays.

    ∇_h ℓ_i = Σ_s left[i, :, s] right[i, :, s]ᵀ            (q, o, i) for block h

Letters: b rows in a chunk, q groups of a block, s positions, o outputs and i columns of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from upweight.curvature import KroneckerCurvature
from upweight.curvature.capture import DeclinedCallError, Piece
from upweight.curvature.exact import Fisher
from upweight.curvature.products import summed_outer, turned
from upweight.risk import Chunk, EmpiricalRisk

__all__ = ["LayerGradients", "Sides"]


@dataclass(frozen=True)
class Sides:
    """The gradients of b rows by the parameters of one block.

    Attributes
    ----------
    left
        (b, q, s, o): derivatives by the outputs of the layer.
    right
        (b, q, s, i): its inputs. None for a block without this side, i = 1 and s = 1; `left` is
        then the gradient itself.
    """

    left: Tensor
    right: Tensor | None = None

    def __len__(self) -> int:
        return len(self.left)

    @property
    def positions(self) -> int:
        """s."""
        return self.left.shape[2]

    @property
    def columns(self) -> int:
        """i."""
        return 1 if self.right is None else self.right.shape[3]

    @property
    def outputs(self) -> int:
        """o."""
        return self.left.shape[3]

    def rows(self, some: slice) -> Sides:
        """Some of the rows."""
        return Sides(self.left[some], None if self.right is None else self.right[some])

    def formed(self) -> Tensor:
        """The gradients themselves, (b, q, o, i)."""
        if self.right is None:
            return self.left.mT
        return summed_outer(self.left, self.right)

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Sides:
        """By eigenvectors (q, o, o) and (q, i, i); None for the identity."""
        x = self.right if self.right is None else turned(self.right, right)
        return Sides(turned(self.left, left), x)


class LayerGradients:
    """The gradients of the rows of a risk, in the blocks of a Kronecker-factored curvature.

    Where hooks see what goes into a layer and what the loss does to its outputs, no gradient of a
    parameter is formed. Parameters that no hook sees have theirs by `torch.func`.

    Parameters
    ----------
    curvature
        Whose blocks are meant.
    risk
        The rows, of the same model.
    """

    def __init__(self, curvature: KroneckerCurvature, risk: EmpiricalRisk) -> None:
        self.curvature = curvature
        self.risk = risk
        self._capture = curvature.capture.whole().over(risk)
        self._form = Fisher(risk, "empirical").form
        self._seen, self._unseen = curvature.gradients_of_rests

    @property
    def dtype(self) -> torch.dtype:
        """Of the sides."""
        return self.risk.dtype

    def first(self, rows: int) -> LayerGradients:
        """The first few rows alone."""
        some = self.risk.rows.subset(range(min(rows, self.risk.n)))
        return LayerGradients(self.curvature, self.risk.with_rows(some))

    def chunks(self, row_bytes: float = 0.0) -> Iterator[tuple[Chunk, list[Sides | None]]]:
        """All rows in order, with the sides of every block; None for a block that is not used.

        Sides are those of the parameters themselves, not rotated. `row_bytes` is what the caller
        makes of each row.
        """
        rest = self._rest_bytes()
        if not self._capture.sites:
            for chunk in self.risk.chunks(row_bytes + rest):
                yield chunk, self._by_autodiff(chunk)
            return
        try:
            for chunk, piece in self._capture.pieces(self._form, row_bytes + rest):
                found = [[*self._by_hooks(piece), *self._by_autodiff(chunk)]]
                del piece
                yield chunk, found.pop()  # the caller alone has them, and may let them go
        except DeclinedCallError as declined:
            raise ValueError(
                f"some rows go another way through the model than those of fit(): {declined}. "
                "Score them with batches of one shape, or with curvature='ggn' and a solver"
            ) from declined

    def _rest_bytes(self) -> float:
        seen = sum(gradients.size for gradients in self._seen)
        unseen = sum(rest.size for rest in self._unseen)
        own = 2.0 * self.risk.activation_bytes if unseen else 0.0
        return 2.0 * (seen + unseen) * self.risk.dtype.itemsize + own

    def _by_hooks(self, piece: Piece) -> Iterator[Sides | None]:
        count = len(self.curvature.capture.sites)
        for a, g in zip(piece.inputs[:count], piece.slopes[:count], strict=True):
            if a is None or g is None:
                yield None
                continue
            assert isinstance(a, Tensor)
            # (b, s, q, i) and (1, b, s, q, o)
            yield Sides(g[0].transpose(1, 2), a.transpose(1, 2))
        for gradients in self._seen:
            flat = gradients.flat(piece.inputs[count:], piece.slopes[count:])  # (1, b, size)
            yield None if flat is None else Sides(flat[0][:, None, None])

    def _by_autodiff(self, chunk: Chunk) -> list[Sides | None]:
        """The blocks that no hook sees, as flat gradients."""
        if not self._unseen:
            return []
        risk = self.risk.restricted([name for rest in self._unseen for name in rest.names])
        with risk.model.evaluating():
            gradients = risk.chunk_gradients(chunk)  # (b, p of these)
        places = [rest.places(risk).to(gradients.device) for rest in self._unseen]
        return [Sides(gradients[:, None, None, at]) for at in places]
