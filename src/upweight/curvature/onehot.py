"""Inputs that are unit vectors of tokens, never written out, and sums over rows of any inputs.

Letters: b rows in a piece, k of their roots, s positions, q groups with o outputs and i columns of
inputs each, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OneHot", "add_squares", "rotate", "row_gradients", "second_moment"]

# Gradients of single rows that are formed together stay below this many bytes.
FORMED_BYTES = 32 * 2**20


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

    def times(self, matrix: Tensor) -> Tensor:
        """ãᵀ M for M (V, d): its lines by token, (b, s, d)."""
        return matrix[self.ids]


def second_moment(x: Tensor | OneHot, *, diagonal: bool = False) -> Tensor:
    """Σ x xᵀ of x (…, q, d) over all but the last two dimensions.

    Parameters
    ----------
    x
        Inputs (b, s, q, d), derivatives (k, b, s, q, d), or tokens.
    diagonal
        Whether to keep the diagonal alone. That of tokens is all there is.

    Returns
    -------
    Tensor
        (q, d, d), or (q, d) for the diagonal.

    Examples
    --------
    >>> import torch
    >>> second_moment(OneHot(torch.tensor([[2, 0, 2]]), 3), diagonal=True)
    tensor([[1., 0., 2.]])
    """
    if isinstance(x, OneHot):
        found = torch.bincount(x.ids.flatten(), minlength=x.size).to(torch.get_default_dtype())
        return found[None] if diagonal else torch.diag(found)[None]
    by_group = x.flatten(0, -3).transpose(0, 1)  # (q, rows, d)
    return by_group.square().sum(1) if diagonal else by_group.mT @ by_group


def rotate(x: Tensor | OneHot, vectors: Tensor | None) -> Tensor | OneHot:
    """xᵀ U at every position: (…, s, q, d) → (…, q, s, d), for U (q, d, d).

    None is the identity. Tokens stay tokens under the identity, and are (b, 1, s, V) otherwise.
    """
    if isinstance(x, OneHot):
        return x if vectors is None else x.times(vectors[0])[:, None]
    x = x.transpose(-3, -2)
    return x if vectors is None else x @ vectors


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


def add_squares(total: Tensor, x: Tensor | OneHot, y: Tensor) -> None:
    """Add Σ_rows Σ_k (Σ_s y xᵀ)² to (q, o, i), for rotated x (b, q, s, i) and y (k, b, q, s, o)."""
    if isinstance(x, OneHot):
        _add_squares_of_tokens(total, x, y[:, :, 0])
        return
    if x.shape[2] == 1:
        # with one position (g ãᵀ)² = g² (ã²)ᵀ, and all rows are one product of matrices
        h = y.square().sum(0)[:, :, 0].permute(1, 2, 0)  # (q, o, b)
        total += h @ x.square()[:, :, 0].transpose(0, 1)
        return
    k, b = y.shape[:2]
    each = total.numel() * x.itemsize
    some = max(1, min(k, FORMED_BYTES // each))
    rows = max(1, min(b, FORMED_BYTES // (each * some)))
    for start in range(0, b, rows):
        right = x[start : start + rows]
        for first in range(0, k, some):
            left = y[first : first + some, start : start + rows]
            merged = left.permute(1, 2, 0, 4, 3).flatten(2, 3)  # (b, q, k·o, s)
            formed = (merged @ right).square_().sum(0)  # (q, k·o, i)
            total += formed.unflatten(1, (len(left), -1)).sum(1)


def _add_squares_of_tokens(total: Tensor, x: OneHot, y: Tensor) -> None:
    """Add to (1, o, V) for y (k, b, s, o): what a row has is summed by its tokens, then squared."""
    k, b, s, o = y.shape
    lines = torch.arange(b, device=x.ids.device)[:, None] * x.size + x.ids
    found, places = lines.flatten().unique(return_inverse=True)  # tokens of a row, each once
    sums = y.new_zeros(k, len(found), o)
    sums.index_add_(1, places, y.reshape(k, b * s, o))
    squares = sums.square().sum(0)  # (found, o)
    total[0].index_add_(1, found % x.size, squares.T.to(total.dtype))
