"""Sums over rows of what was captured: the factors A and G, and the eigenvalues Λ.

Letters: b rows in a piece, s positions of a row, k of its roots, q groups with o outputs and i
columns of ã each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upweight.curvature.capture import Capture, Piece
from upweight.curvature.rotated import turned
from upweight.operator import wide
from upweight.risk import EmpiricalRisk

__all__ = ["Corrections", "Factors"]

# Inputs and derivatives of all rows are kept for the eigenvalues if they need no more than this.
KEPT_BYTES = 256 * 2**20
# Gradients of single rows that are formed together stay below this many bytes.
FORMED_BYTES = 32 * 2**20


class Factors:
    """Σ ã ãᵀ and Σ g gᵀ of every site, and the pieces themselves if memory allows."""

    def __init__(self, risk: EmpiricalRisk, capture: Capture, *, keep: bool) -> None:
        self.risk = risk
        self._kind = wide(risk.dtype, risk.device)
        self._a = [self._zeros(site.groups, site.columns) for site in capture.sites]
        self._g = [self._zeros(site.groups, site.outputs) for site in capture.sites]
        self._positions = [0 for _ in capture.sites]
        self.lengths: list[set[int]] = [set() for _ in capture.sites]  # the s of the chunks
        self.kept: list[Piece] | None = [] if keep else None
        self._bytes = 0

    def _zeros(self, q: int, d: int) -> Tensor:
        return torch.zeros(q, d, d, dtype=self._kind, device=self.risk.device)

    def add(self, piece: Piece) -> None:
        """Add rows and roots."""
        for at, (a, g) in enumerate(zip(piece.inputs, piece.slopes, strict=True)):
            if a is None or g is None:
                continue
            if piece.first:
                self._a[at] += _gram(a.flatten(0, 1))
                self._positions[at] += a.shape[0] * a.shape[1]
                self.lengths[at].add(a.shape[1])
                self._bytes += a.numel() * a.itemsize
            self._g[at] += _gram(g.flatten(0, 2))
            self._bytes += g.numel() * g.itemsize
        if self._bytes > KEPT_BYTES:
            self.kept = None
        if self.kept is not None:
            self.kept.append(piece)

    def factors(self, at: int) -> tuple[Tensor, Tensor]:
        """A (q, i, i) and G (q, o, o) of a site."""
        return self._a[at] / max(1, self._positions[at]), self._g[at] / self.risk.n


def _gram(x: Tensor) -> Tensor:
    """Σ x xᵀ for x (rows, q, d): (q, d, d)."""
    by_group = x.transpose(0, 1)
    return by_group.mT @ by_group


class Corrections:
    """Σ_rows Σ_k (U_Gᵀ (Σ_positions g_k ãᵀ) U_A)² of every site, (q, o, i)."""

    def __init__(self, risk: EmpiricalRisk, vectors: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._vectors = vectors
        kind = wide(risk.dtype, risk.device)
        self.totals = [
            torch.zeros(*u_g.shape[:2], u_a.shape[1], dtype=kind, device=risk.device)
            for u_g, u_a in vectors
        ]

    def add(self, piece: Piece) -> None:
        """Add rows and roots."""
        for total, (u_g, u_a), a, g in zip(
            self.totals, self._vectors, piece.inputs, piece.slopes, strict=True
        ):
            if a is None or g is None:
                continue
            x = turned(a.transpose(1, 2), u_a)  # (b, q, s, i)
            y = turned(g.transpose(2, 3), u_g)  # (k, b, q, s, o)
            if x.shape[2] == 1:
                # with one position (g ãᵀ)² = g² (ã²)ᵀ, and all rows are one product of matrices
                h = y.square().sum(0)[:, :, 0].permute(1, 2, 0)  # (q, o, b)
                total += h @ x.square()[:, :, 0].transpose(0, 1)
            else:
                _add_squares(total, x, y)


def _add_squares(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add Σ_rows Σ_k (Σ_s y x)² for x (b, q, s, i) and y (k, b, q, s, o), some of them at once."""
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
