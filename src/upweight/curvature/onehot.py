"""Inputs that are unit vectors of tokens, never written out, and gradients from any inputs.

Letters: b rows in a piece, k of their roots, s positions, q groups with o outputs and i columns of
inputs each, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OneHot", "row_gradients"]


@dataclass(frozen=True)
class OneHot:
    """Inputs (b, s, 1, V) of an embedding: the unit vector of the token at every position.

    Attributes
    ----------
    ids
        Tokens (b, s).
    size
        V.

    Examples
    --------
    >>> import torch
    >>> OneHot(torch.tensor([[2, 0]]), 3).dense(torch.float32)[0, :, 0]
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """

    ids: Tensor
    size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(b, s, 1, V)."""
        b, s = self.ids.shape
        return b, s, 1, self.size

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> OneHot:
        return OneHot(self.ids[rows], self.size)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The unit vectors, (b, s, 1, V)."""
        out = torch.zeros(self.shape, dtype=dtype, device=self.ids.device)
        return out.scatter_(3, self.ids[:, :, None, None], 1.0)


def row_gradients(a: Tensor | OneHot, g: Tensor) -> Tensor:
    """Σ_s g ãᵀ for ã (b, s, q, i) and g (k, b, s, q, o): (k, b, q, o, i).

    Examples
    --------
    >>> import torch
    >>> g = torch.tensor([5.0, 7.0, 1.0]).view(1, 1, 3, 1, 1)
    >>> row_gradients(OneHot(torch.tensor([[2, 0, 2]]), 3), g).flatten()
    tensor([7., 0., 6.])
    """
    if not isinstance(a, OneHot):
        if g.shape[4] == 1 < g.shape[3]:  # as normalisations have it: no products worth a matrix
            return (g * a).sum(2)[:, :, :, None]
        return g.permute(0, 1, 3, 4, 2) @ a.transpose(1, 2)
    k, b, s, _, o = g.shape
    out = g.new_zeros(k, b, a.size, o)
    out.scatter_add_(2, a.ids[None, :, :, None].expand(k, b, s, o), g[:, :, :, 0])
    return out.mT[:, :, None]
