"""Sums over rows of what was captured: the factors A and G, and the eigenvalues Λ.

Letters: b rows in a piece, s positions of a row, k of its roots, q groups with o outputs and i
columns of ã each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upweight.curvature.capture import Piece
from upweight.curvature.products import gram, summed_outer, turned
from upweight.curvature.sites import Site
from upweight.operator import wide
from upweight.risk import EmpiricalRisk

if TYPE_CHECKING:
    from upweight.cluster import Cluster

__all__ = ["Corrections", "Factors", "may_keep"]

# Inputs and derivatives of all rows are kept for the eigenvalues if they need no more than this.
KEPT_BYTES = 256 * 2**20
# Gradients of single rows that are formed together stay below this many bytes.
FORMED_BYTES = 32 * 2**20


def may_keep(risk: EmpiricalRisk, numbers: tuple[int, int], roots: int) -> bool:
    """Whether the pieces of all rows fit, from how many numbers ã and g have for one row."""
    each = (numbers[0] + roots * numbers[1]) * risk.dtype.itemsize
    share = slice(0, risk.n) if risk.cluster is None else risk.cluster.share(risk.n)
    return (share.stop - share.start) * each <= risk.memory.chunk(KEPT_BYTES)


class Factors:
    """Σ ã ãᵀ and Σ g gᵀ of every site, and the pieces themselves if memory allows.

    Of a side that is too wide for a matrix only the diagonal is kept.
    """

    def __init__(self, risk: EmpiricalRisk, sites: Sequence[Site], *, keep: bool) -> None:
        self.risk = risk
        self._a = [self._zeros(site.groups, site.columns, site.wide[1]) for site in sites]
        self._g = [self._zeros(site.groups, site.outputs, site.wide[0]) for site in sites]
        self._positions = [0 for _ in sites]
        self.lengths: list[set[int]] = [set() for _ in sites]  # the s of the chunks
        self.kept: list[Piece] | None = [] if keep else None
        self._bytes = 0

    def _zeros(self, q: int, d: int, diagonal: bool) -> Tensor:
        shape = (q, d) if diagonal else (q, d, d)
        kind = wide(self.risk.dtype, self.risk.device)
        return torch.zeros(shape, dtype=kind, device=self.risk.device)

    def add(self, piece: Piece) -> None:
        """Add rows and roots."""
        for at, (a, g) in enumerate(zip(piece.inputs, piece.slopes, strict=True)):
            if a is None or g is None:
                continue
            assert isinstance(a, Tensor)
            if piece.first:
                counted = _counted(a, piece.active)
                _add_moment(self._a[at], a.flatten(0, 1) if counted is None else a[counted])
                if counted is None:
                    self._positions[at] += a.shape[0] * a.shape[1]
                    self.lengths[at].add(a.shape[1])
                else:
                    self._positions[at] += int(counted.sum())
                self._bytes += a.numel() * a.itemsize
            _add_moment(self._g[at], g.flatten(0, 2))
            self._bytes += g.numel() * g.itemsize
        if self._bytes > self.risk.memory.chunk(KEPT_BYTES):
            self.kept = None
        if self.kept is not None:
            self.kept.append(piece)

    def share(self, cluster: Cluster, others: Sequence[Tensor]) -> bool:
        """Put the sums over all ranks here and in `others`; whether all have kept their pieces."""
        counts = torch.tensor(self._positions, dtype=torch.float64)
        cluster.add([*self._a, *self._g, *others, counts], "sums over rows")
        self._positions = [int(count) for count in counts]
        told = [sorted(lengths) for lengths in self.lengths], self.kept is not None
        every = cluster.meet("lengths of rows", told)
        self.lengths = [
            {length for lengths, _ in every for length in lengths[at]}
            for at in range(len(self.lengths))
        ]
        return all(kept for _, kept in every)

    def release(self) -> None:
        """Let go of all matrices."""
        self._a, self._g = [], []

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """The shapes of A and G of every site, one after the other."""
        return [tuple(x.shape) for pair in zip(self._a, self._g, strict=True) for x in pair]

    def factor(self, at: int) -> Tensor:
        """A (q, i, i) or G (q, o, o) of a site, or its diagonal: in the order of `sizes`."""
        if at % 2:
            return self._g[at // 2] / self.risk.n
        return self._a[at // 2] / max(1, self._positions[at // 2])


def _counted(a: Tensor, active: Tensor | None) -> Tensor | None:
    """Which positions (b, s) of ã count, where those of the output are those of all calls."""
    if active is None or a.shape[1] % active.shape[1]:
        return None
    return active.repeat(1, a.shape[1] // active.shape[1])


def _add_moment(total: Tensor, x: Tensor) -> None:
    """Add Σ x xᵀ, or its diagonal, of x (rows, q, d)."""
    total += gram(x) if total.ndim == 3 else x.square().sum(0)


class Corrections:
    """Σ_rows Σ_k (U_Gᵀ (Σ_positions g_k ãᵀ) U_A)² of every site, (q, o, i)."""

    def __init__(
        self,
        risk: EmpiricalRisk,
        sites: Sequence[Site],
        vectors: Sequence[tuple[Tensor | None, Tensor | None]],
    ) -> None:
        self._vectors = vectors
        self._most = risk.memory.buffer(FORMED_BYTES)
        kind = wide(risk.dtype, risk.device)
        self.totals = [
            torch.zeros(site.groups, site.outputs, site.columns, dtype=kind, device=risk.device)
            for site in sites
        ]

    def add(self, piece: Piece) -> None:
        """Add rows and roots."""
        for total, (u_g, u_a), a, g in zip(
            self.totals, self._vectors, piece.inputs, piece.slopes, strict=True
        ):
            if a is None or g is None:
                continue
            assert isinstance(a, Tensor)
            x = turned(a.transpose(1, 2), u_a)  # (b, q, s, i)
            y = turned(g.transpose(2, 3), u_g)  # (k, b, q, s, o)
            if x.shape[2] == 1:
                # with one position (g ãᵀ)² = g² (ã²)ᵀ, and all rows are one product of matrices
                h = y.square().sum(0)[:, :, 0].permute(1, 2, 0)  # (q, o, b)
                total += h @ x.square()[:, :, 0].transpose(0, 1)
            else:
                _add_squares(total, x, y, self._most)


def _add_squares(total: Tensor, x: Tensor, y: Tensor, most: int) -> None:
    """Add Σ_rows Σ_k (Σ_s y x)² for x (b, q, s, i) and y (k, b, q, s, o), some rows at once."""
    each = total.numel() * x.itemsize
    rows = max(1, min(y.shape[1], most // each))
    for start in range(0, y.shape[1], rows):
        right = x[start : start + rows]
        for left in y[:, start : start + rows]:
            total += summed_outer(left, right).square_().sum(0)
