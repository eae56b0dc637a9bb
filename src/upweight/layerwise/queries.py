"""Solved gradients of test rows, held in the form in which training rows meet them cheapest.

    I[j, i] = Σ_h ⟨(C_h + λ_h I)⁻¹ ∇_h ℓ_j, ∇_h ℓ_i⟩

For one block, with W = 1/(Λ + λ) in the eigenbasis and both gradients rotated into it,

    ⟨W ∘ Σ_t y_t x_tᵀ, Σ_s y_s x_sᵀ⟩

can be had in three ways. `Formed` holds the solved gradients (m, q, o, i) of the parameters, and
rows need not be rotated. `Weighted` holds the sides (m, q, t, o + i) and makes W ∘ (y xᵀ) of some
of them at a time: less to hold where t (o + i) < o·i. `Separable` takes W as Σ_k u_k v_kᵀ, and
forms nothing:

    Σ_k Σ_t Σ_s ⟨y_t ∘ u_k, y_s⟩ ⟨x_t ∘ v_k, x_s⟩

Letters: m test rows, b training rows, q groups, t and s positions of a test and a training row, o
outputs and i columns of inputs, r terms of W.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from upweight.layerwise.sides import Sides

__all__ = ["Formed", "Queries", "Separable", "Weighted", "block_bytes"]


def block_bytes(device: torch.device) -> int:
    """What the tensors of one product may take."""
    # a CPU wants them in its caches as far as that goes; a GPU wants large products
    return 2**24 if device.type == "cpu" else 2**29


class Queries(Protocol):
    """The solved gradients of m test rows by the parameters of one block."""

    def scores(self, rows: Sides) -> Tensor:
        """⟨solved, ∇_h ℓ⟩ for every test row and these rows, (m, b)."""
        ...


@dataclass(frozen=True)
class Formed:
    """The solved gradients themselves.

    Attributes
    ----------
    values
        (m, q, o, i).
    bases
        Eigenvectors that rows are rotated by first; None where `values` are of the parameters.
    """

    values: Tensor
    bases: tuple[Tensor | None, Tensor | None] | None = None

    def scores(self, rows: Sides) -> Tensor:
        """(m, b)."""
        rows = rows if self.bases is None else rows.rotated(*self.bases)
        m, s = len(self.values), rows.positions
        # multiply-adds by o·i: m·s directly, m + s if the gradients of the rows are formed first
        if rows.right is not None and (m == 1 or (s == 1 and m <= 4)):
            return _direct(self.values, rows)
        flat = self.values.flatten(1)  # (m, q·o·i)
        each = flat.shape[1] * flat.itemsize
        size = max(1, int(block_bytes(flat.device) / each))
        parts = [
            flat @ rows.rows(slice(at, at + size)).formed().flatten(1).T
            for at in range(0, len(rows), size)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Weighted:
    """The sides of the test rows in the eigenbasis, and W.

    Attributes
    ----------
    left, right
        (m, q, t, o) and (m, q, t, i), rotated.
    weight
        W (q, o, i).
    bases
        What rows are rotated by first; None where they already are.
    """

    left: Tensor
    right: Tensor
    weight: Tensor
    bases: tuple[Tensor | None, Tensor | None] | None

    def scores(self, rows: Sides) -> Tensor:
        """(m, b)."""
        rows = rows if self.bases is None else rows.rotated(*self.bases)
        parts = [_direct(formed, rows) for formed in self._formed()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _formed(self) -> Iterator[Tensor]:
        """W ∘ Σ_t y xᵀ of some test rows at a time, (some, q, o, i)."""
        size = max(1, int(block_bytes(self.weight.device) / (self.weight.numel() * 4)))
        for y, x in zip(self.left.split(size), self.right.split(size), strict=True):
            yield Sides(y, x).formed() * self.weight


@dataclass(frozen=True)
class Separable:
    """The sides of the test rows in the eigenbasis, and W ≈ Σ_k u_k v_kᵀ.

    Attributes
    ----------
    left, right
        (m, q, t, o) and (m, q, t, i), rotated.
    u, v
        (r, q, o) and (r, q, i).
    bases
        What rows are rotated by first; None where they already are.
    """

    left: Tensor
    right: Tensor
    u: Tensor
    v: Tensor
    bases: tuple[Tensor | None, Tensor | None] | None

    def scores(self, rows: Sides) -> Tensor:
        """(m, b)."""
        rows = rows if self.bases is None else rows.rotated(*self.bases)
        assert rows.right is not None
        t, b, s = self.left.shape[2], len(rows), rows.positions
        y, x = (side.permute(1, 3, 0, 2).flatten(2) for side in (rows.left, rows.right))
        each = t * b * s * y.itemsize * 2  # (q, o, b·s) and (q, i, b·s)
        some = max(1, int(block_bytes(y.device) / each))
        parts: list[Tensor] = []
        for left, right in zip(self.left.split(some), self.right.split(some), strict=True):
            yq, xq = (side.transpose(0, 1).flatten(1, 2) for side in (left, right))  # (q, m·t, ·)
            total = torch.zeros(len(left), b, dtype=y.dtype, device=y.device)
            for u, v in zip(self.u, self.v, strict=True):
                by_pair = ((yq * u[:, None]) @ y).mul_((xq * v[:, None]) @ x)  # (q, m·t, b·s)
                by_pair = by_pair if len(by_pair) > 1 else by_pair.squeeze(0)
                by_pair = by_pair.sum(0) if by_pair.ndim == 3 else by_pair
                total += _summed(by_pair, t, s)
            parts.append(total)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _summed(by_pair: Tensor, t: int, s: int) -> Tensor:
    """Over the positions of both: (m·t, b·s) → (m, b)."""
    if t == 1 and s == 1:
        return by_pair
    return by_pair.unflatten(1, (-1, s)).sum(2).unflatten(0, (-1, t)).sum(1)


def _direct(values: Tensor, rows: Sides) -> Tensor:
    """⟨V_j, Σ_s y xᵀ⟩ for V (m, q, o, i), one side after the other: (m, b)."""
    assert rows.right is not None
    (m, q, o, i), (b, s) = values.shape, (len(rows), rows.positions)
    first, second = rows.left, rows.right  # (b, q, s, o), (b, q, s, i)
    if i > o:  # what is left after the first product should be the narrower side
        values, first, second, o, i = values.mT, second, first, i, o
    columns = values.permute(1, 2, 0, 3).reshape(q, o, m * i)
    each = s * q * m * i * values.itemsize
    size = max(1, int(block_bytes(values.device) / each))
    parts: list[Tensor] = []
    for at in range(0, b, size):
        y, x = first[at : at + size], second[at : at + size]
        n = len(y)
        met = y.transpose(0, 1).reshape(q, n * s, o) @ columns  # (q, n·s, m·i)
        met = met.view(q, n, s, m, i)
        if q == 1 and s == 1:
            # a sum over the last dimension of a product, without a second tensor of that size
            parts.append(torch.einsum("nmi,ni->mn", met[0, :, 0], x[:, 0, 0]))
        else:
            parts.append(torch.einsum("qnsmi,nqsi->mn", met, x))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
