"""The influence of training rows on test rows, in blocks of constant memory.

    I[j, i]     = g_test[j]ᵀ (C + λI)⁻¹ g_train[i]             mode "up"
    I[j, i, *x] = ∂I[j, i] / ∂x_i                              mode "perturbation"

Positive = row i helps test row j: up-weighting it lowers the test loss. No 1/n, no minus sign.
Letters: m test rows, n training rows, b rows in a chunk, p parameters. This module is the only
place with the sign and the scale of a score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from upweight.operator import LinearOperator
from upweight.risk import EmpiricalRisk

__all__ = [
    "Mode",
    "gathered_gradients",
    "influence_blocks",
    "mean_influence",
    "self_influence",
]

Mode = Literal["up", "perturbation"]

# Solved test gradients (C + λI)⁻¹ g_test that are held at once.
SOLVED_BYTES = 2**30


def influence_blocks(
    inverse: LinearOperator,
    train: EmpiricalRisk,
    test: EmpiricalRisk,
    mode: Mode,
    parts: Sequence[Tensor] | None = None,
) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """I in blocks: (test rows, training rows, one or several of (rows, b) or (rows, b, ...x)).

    Test gradients are solved once each. The training rows are passed once for all the solved test
    gradients that fit into `SOLVED_BYTES`.

    With `parts`, positions in θ, there is one block for each: what the training gradients in these
    positions contribute, Σ over the positions of ((C + λI)⁻¹ g_test[j]) g_train[i].
    """
    for rows, gradients in gathered_gradients(test):
        solved = inverse @ gradients.T  # (p, rows)
        for columns, blocks in _against_train(train, solved, mode, parts):
            yield rows, columns, blocks


def gathered_gradients(test: EmpiricalRisk) -> Iterator[tuple[slice, Tensor]]:
    """Test gradients in as large blocks (rows, p) as may be held."""
    limit = max(1, int(SOLVED_BYTES / (3 * 8 * test.p)))
    held: list[Tensor] = []
    start = 0
    for chunk, gradients in test.row_gradients():
        for piece in gradients.split(limit):
            if held and sum(map(len, held)) + len(piece) > limit:
                stop = start + sum(map(len, held))
                yield slice(start, stop), torch.cat(held)
                start, held = stop, []
            held.append(piece)
        if chunk.stop == test.n:
            yield slice(start, test.n), torch.cat(held)


def _against_train(
    train: EmpiricalRisk, solved: Tensor, mode: Mode, parts: Sequence[Tensor] | None
) -> Iterator[tuple[slice, list[Tensor]]]:
    if mode == "up":
        row_bytes = 2 * solved.shape[1] * solved.dtype.itemsize
        for chunk, gradients in train.row_gradients(row_bytes):
            g = gradients.T.to(solved.dtype)  # (p, b)
            # I = Xᵀ Gᵀ                                                (rows, p) × (p, b)
            blocks = [solved.T @ g] if parts is None else [solved[e].T @ g[e] for e in parts]
            yield slice(chunk.start, chunk.stop), blocks
    elif parts is None:
        for chunk, slopes in train.feature_gradients(solved):
            yield slice(chunk.start, chunk.stop), [slopes]
    else:
        k = solved.shape[1]
        apart = torch.zeros(len(parts), *solved.shape, dtype=solved.dtype, device=solved.device)
        for at, entries in enumerate(parts):
            apart[at, entries] = solved[entries]
        for chunk, slopes in train.feature_gradients(apart.movedim(0, 1).flatten(1)):
            yield slice(chunk.start, chunk.stop), list(slopes.split(k))


def mean_influence(
    inverse: LinearOperator, train: EmpiricalRisk, test: EmpiricalRisk, mode: Mode
) -> Tensor:
    """1/m Σ_j I[j, i], (n,) or (n, ...x), by one solve with the mean test gradient."""
    solved = inverse @ test.gradient()[:, None]  # (p, 1)
    if mode == "up":
        return train.matmul(solved)[:, 0]
    return torch.cat([slopes[0] for _, slopes in train.feature_gradients(solved)])


def self_influence(inverse: LinearOperator, rows: EmpiricalRisk) -> Tensor:
    """g_iᵀ (C + λI)⁻¹ g_i for every row, (n,)."""
    parts: list[Tensor] = []
    for _, gradients in rows.row_gradients():
        solved = inverse @ gradients.T  # (p, b)
        parts.append((gradients.T.to(solved.dtype) * solved).sum(0))
    return torch.cat(parts)
