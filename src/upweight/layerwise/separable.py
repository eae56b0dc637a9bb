"""W = 1/(Λ + λ) as a short sum of products, so that neither gradients nor W ∘ them are formed.

    W ≈ Σ_k u_k v_kᵀ        u_k (o,), v_k (i,)

If the entries of rotated gradients are independent with mean squares Λ, the score of a random pair
has the variance Σ_oi W² Λ², and what the sum leaves of W adds an error of variance Σ_oi (ΔW)² Λ².
So W is approximated with the weights Λ, which are taken as a product a bᵀ of their sums over rows
and columns: the best terms are then those of the singular value decomposition of a W bᵀ.

Letters: o outputs and i columns of a layer, r terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Split", "split_weight"]

# Ranks that are tried, one after the other.
RANKS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Split:
    """W ≈ Σ_k u_k v_kᵀ for every group.

    Attributes
    ----------
    u, v
        (r, q, o) and (r, q, i).
    rest, size
        Σ (ΔW)² Λ² and Σ W² Λ²; the root of their quotient is the relative error that scores have
        under the independence of entries.
    """

    u: Tensor
    v: Tensor
    rest: float
    size: float

    @property
    def rank(self) -> int:
        """r."""
        return len(self.u)


def split_weight(values: Tensor, weight: Tensor, most: float, tolerance: float) -> Split | None:
    """The fewest terms that reach the tolerance; None if more than `most` would be needed.

    Parameters
    ----------
    values, weight
        Λ and W, (q, o, i).
    most
        Beyond so many terms the sum is dearer than W itself.
    tolerance
        The relative error of scores that may be left.
    """
    lam, exact = values.double(), weight.double()
    total = lam.sum((1, 2), keepdim=True)
    if not bool((total > 0).all()):
        return None
    # not zero, where a side says nothing of W
    floor = 1e-12 * lam.mean()
    a = lam.sum(2, keepdim=True) / total.sqrt() + floor  # (q, o, 1)
    b = lam.sum(1, keepdim=True) / total.sqrt() + floor  # (q, 1, i)
    scaled = a * exact * b
    size = min(scaled.shape[1:])
    norm = float((exact * lam).square().sum())
    for rank in dict.fromkeys(min(rank, size) for rank in RANKS):
        if rank > most:
            return None
        left, s, right = _leading(scaled, rank)
        u = (left * s[:, None]) / a  # (q, o, r)
        v = right / b.mT  # (q, i, r)
        rest = float(((u @ v.mT - exact) * lam).square().sum())
        if rest <= tolerance**2 * norm:
            u, v = (part.permute(2, 0, 1).to(weight.dtype).contiguous() for part in (u, v))
            return Split(u, v, rest, norm)
    return None


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (q, o, r), s (q, r) and V (q, i, r), by the range of products with random columns."""
    q, _, i = matrix.shape
    k = min(rank + 8, *matrix.shape[1:])
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(q, i, k, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ probe)[0]
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis)[0])[0]
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return (basis @ u)[..., :rank], s[:, :rank], vh.mT[..., :rank]
