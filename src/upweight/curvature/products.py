"""The products of matrices that everything by layers is made of, each in its fastest form.

Letters: B rows (or rows and roots), q groups, s positions, o outputs and i columns, d either.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["gram", "summed_outer", "turned"]

# Multiply-adds of one small product from which on a CPU is faster with one call for each (torch
# 2.13: products of a batch reach two thirds of the speed of single ones).
SINGLE = 2**20
# Sides of blocks in which only one half of a symmetric matrix is computed.
HALVED = 256


def turned(x: Tensor, vectors: Tensor | None) -> Tensor:
    """x U for x (…, q, s, d) and U (q, d, e); None for the identity.

    Examples
    --------
    >>> turned(torch.ones(5, 1, 3, 2), torch.tensor([[[1.0], [2.0]]]))[0, 0, 0]
    tensor([3.])
    """
    if vectors is None:
        return x
    d, e = vectors.shape[1:]
    if len(vectors) == 1:
        # one product of matrices, where x @ vectors is one for every row
        return (x.reshape(-1, d) @ vectors[0]).view(*x.shape[:-1], e)
    by_group = x.movedim(-3, 0)  # (q, …, s, d)
    flat = by_group.reshape(len(vectors), -1, d) @ vectors
    return flat.view(*by_group.shape[:-1], e).movedim(0, -3)


def gram(x: Tensor) -> Tensor:
    """Σ x xᵀ for x (rows, q, d): (q, d, d).

    Examples
    --------
    >>> gram(torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]))
    tensor([[[10.,  2.],
             [ 2.,  4.]]])
    """
    by_group = x.transpose(0, 1)
    d = x.shape[2]
    if x.device.type != "cpu" or d < 2 * HALVED:
        return by_group.mT @ by_group
    out = x.new_empty(x.shape[1], d, d)
    edges = [*range(0, d - d % HALVED, HALVED), d]
    for start, stop in pairwise(edges):
        block = by_group[..., start:stop].mT @ by_group[..., :stop]  # the lower half
        out[:, start:stop, :stop] = block
        out[:, :start, start:stop] = block[..., :start].mT
    return out


def summed_outer(y: Tensor, x: Tensor) -> Tensor:
    """Σ_s y xᵀ for y (B, q, s, o) and x (B, q, s, i): (B, q, o, i).

    Examples
    --------
    >>> summed_outer(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 1)).flatten()
    tensor([3., 3.])
    """
    b, q, s, o = y.shape
    i = x.shape[3]
    if s == 1:
        return y.mT * x
    if y.device.type != "cpu" or s * o * i < SINGLE:
        return y.mT @ x
    out = torch.empty(b, q, o, i, dtype=y.dtype)
    for row in range(b):
        for group in range(q):
            torch.mm(y[row, group].T, x[row, group], out=out[row, group])
    return out
