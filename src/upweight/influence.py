"""The influence of training rows on test rows, in blocks of constant memory.

    I[j, i]     = g_test[j]ᵀ (C + λI)⁻¹ g_train[i]             mode "up"
    I[j, i, *x] = ∂I[j, i] / ∂x_i                              mode "perturbation"

Positive = row i helps test row j: up-weighting it lowers the test loss. No 1/n, no minus sign.
Letters: m test rows, n training rows, b rows in a chunk, p parameters. This module is the only
place with the sign and the scale of a score.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from upweight.operator import LinearOperator
from upweight.risk import EmpiricalRisk

__all__ = ["Mode", "influence_blocks", "mean_influence", "self_influence"]

Mode = Literal["up", "perturbation"]

# Solved test gradients (C + λI)⁻¹ g_test that are held at once.
SOLVED_BYTES = 2**30


def influence_blocks(
    inverse: LinearOperator, train: EmpiricalRisk, test: EmpiricalRisk, mode: Mode
) -> Iterator[tuple[slice, slice, Tensor]]:
    """I in blocks: (test rows, training rows, (rows, b) or (rows, b, ...x)).

    Test gradients are solved once each. The training rows are passed once for all the solved test
    gradients that fit into `SOLVED_BYTES`.
    """
    for rows, gradients in _gathered_gradients(test):
        solved = inverse @ gradients.T  # (p, rows)
        for columns, block in _against_train(train, solved, mode):
            yield rows, columns, block


def _gathered_gradients(test: EmpiricalRisk) -> Iterator[tuple[slice, Tensor]]:
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
    train: EmpiricalRisk, solved: Tensor, mode: Mode
) -> Iterator[tuple[slice, Tensor]]:
    if mode == "up":
        row_bytes = 2 * solved.shape[1] * solved.dtype.itemsize
        for chunk, gradients in train.row_gradients(row_bytes):
            # I = Xᵀ Gᵀ                                                (rows, p) × (p, b)
            yield slice(chunk.start, chunk.stop), solved.T @ gradients.T.to(solved.dtype)
    else:
        for chunk, slopes in train.feature_gradients(solved):
            yield slice(chunk.start, chunk.stop), slopes


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
