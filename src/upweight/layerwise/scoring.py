"""Scores, self-influence and mean scores by blocks of layers, in one pass over the training rows.

    I[j, i] = Σ_h ⟨(C_h + λ_h I)⁻¹ ∇_h ℓ_j, ∇_h ℓ_i⟩

Letters: m test rows, n training rows, b rows in a chunk, p parameters, k columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from upweight.curvature import KroneckerCurvature
from upweight.layerwise.checking import check_scores
from upweight.layerwise.holding import SHOWN, Frames, Held
from upweight.layerwise.queries import Formed, Queries, block_bytes
from upweight.layerwise.sides import Sides

__all__ = [
    "against_rows",
    "blocks_of_parts",
    "column_queries",
    "factored_error",
    "own_influence",
]

# Training rows that show what sums of products in place of weights cost.
SHOWN_ROWS = 256


class Span(Protocol):
    """Consecutive rows."""

    @property
    def start(self) -> int:
        """The first."""
        ...

    @property
    def stop(self) -> int:
        """After the last."""
        ...


class Source(Protocol):
    """Where the sides of training rows come from: a model, or a store."""

    @property
    def dtype(self) -> torch.dtype:
        """In which scores come out."""
        ...

    def chunks(self, row_bytes: float = 0.0) -> Iterator[tuple[Span, Sequence[Sides | None]]]:
        """All rows in order, with the sides of every block."""
        ...

    def first(self, rows: int) -> Source:
        """The first few rows alone."""
        ...


def blocks_of_parts(
    curvature: KroneckerCurvature, parts: Sequence[Tensor]
) -> list[list[int]] | None:
    """Which blocks each part of θ consists of; None where a part cuts through a block."""
    owner = torch.full((curvature.size,), -1)
    for at, entries in enumerate(parts):
        owner[entries.cpu()] = at
    found: list[list[int]] = [[] for _ in parts]
    for at, block in enumerate(curvature.blocks):
        owners = owner[block.entries.cpu()].unique().tolist()
        if len(owners) != 1:
            return None
        if owners[0] >= 0:
            found[owners[0]].append(at)
    return found


def column_queries(curvature: KroneckerCurvature, columns: Tensor) -> Held:
    """Any columns (p, k) of parameters, such as solutions of another method, by block."""
    queries: list[Queries | None] = []
    for block in curvature.blocks:
        shape = block.operator.values.shape
        own = columns[block.entries.to(columns.device)].to(curvature.dtype)
        queries.append(Formed(own.T.reshape(-1, *shape)))
    return Held(slice(0, columns.shape[1]), queries)


def against_rows(
    held: Held,
    train: Source,
    blocks: Sequence[Sequence[int]] | None = None,
    start: int = 0,
) -> Iterator[tuple[slice, int, Tensor]]:
    """Scores of held test rows on all training rows: (columns, part, (m, b)).

    `blocks` are those of every part, default: one part of all. `start` is the position that the
    first training row has elsewhere.
    """
    m = held.rows.stop - held.rows.start
    for chunk, sides in train.chunks(2.0 * m * train.dtype.itemsize):
        first = start + chunk.start
        columns = slice(first, start + chunk.stop)
        for at, own in enumerate([range(len(sides))] if blocks is None else blocks):
            block = _summed(held.queries, sides, own, (m, chunk.stop - chunk.start))
            check_scores(block, first)
            yield columns, at, block.to(train.dtype)
        del sides  # before the next are made


def _summed(
    queries: Sequence[Queries | None],
    sides: Sequence[Sides | None],
    own: Sequence[int],
    shape: tuple[int, int],
) -> Tensor:
    """Σ over some blocks, (m, b)."""
    total: Tensor | None = None
    for h in own:
        query, rows = queries[h], sides[h]
        if query is not None and rows is not None:
            part = query.scores(rows).double()
            total = part if total is None else total.add_(part)
    return torch.zeros(shape, dtype=torch.float64) if total is None else total


def factored_error(held: Held, train: Source) -> float | None:
    """‖approximate − exact‖ / ‖exact‖ of scores, over some test rows and the first training rows.

    None where no weight is taken as a sum of products.
    """
    if held.exact is None:
        return None
    wrong, whole = 0.0, 0.0
    for chunk, sides in train.first(SHOWN_ROWS).chunks():
        every, m = range(len(sides)), held.rows.stop - held.rows.start
        b = chunk.stop - chunk.start
        exact = _summed(held.exact, sides, every, (min(SHOWN, m), b))
        got = _summed(held.queries, sides, every, (m, b))[: len(exact)]
        wrong += float((got - exact).square().sum())
        whole += float(exact.square().sum())
    return (wrong / whole) ** 0.5 if whole else 0.0


def own_influence(rows: Source, frames: Frames) -> Tensor:
    """∇ℓ_iᵀ (C + λI)⁻¹ ∇ℓ_i for every row, (n,)."""
    parts: list[Tensor] = []
    for chunk, sides in rows.chunks():
        b, device = chunk.stop - chunk.start, frames.weights[0].device
        total = torch.zeros(b, dtype=torch.float64, device=device)
        for own, bases, weight in zip(sides, frames.bases, frames.weights, strict=True):
            if own is not None:
                turned = own if frames.turned else own.rotated(*bases)
                total += _weighted_squares(turned, weight)
        check_scores(total[None], chunk.start)
        parts.append(total)
        del sides  # before the next are made
    return torch.cat(parts)


def _weighted_squares(sides: Sides, weight: Tensor) -> Tensor:
    """Σ_oi W (Σ_s y xᵀ)² for W (q, o, i): (b,)."""
    if sides.right is None:  # (b, q, 1, o·i), which may have come formed
        return sides.left.square().flatten(1).to(weight.dtype) @ weight.flatten()
    if sides.positions == 1:
        # with one position (y xᵀ)² = y² (x²)ᵀ, and all rows are one product of matrices
        y, x = (side[:, :, 0].square().transpose(0, 1) for side in (sides.left, sides.right))
        return ((y @ weight) * x).sum((0, 2))
    size = max(1, int(block_bytes(weight.device) / (weight.numel() * weight.itemsize)))
    parts = [
        (sides.rows(slice(at, at + size)).formed().square_() * weight).sum((1, 2, 3))
        for at in range(0, len(sides), size)
    ]
    return torch.cat(parts)
