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
from upweight.risk import Chunk, EmpiricalRisk

__all__ = [
    "Mode",
    "gathered_gradients",
    "influence_blocks",
    "mean_gradient",
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
) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """I in blocks: (test rows, training rows, 0, (rows, b) or (rows, b, ...x)).

    Test gradients are solved once each. The training rows are passed once for all the solved test
    gradients that fit into `SOLVED_BYTES`.

    With `parts`, positions in θ, there is a block for each, with its index in place of 0: the sum
    over these positions alone of (C + λI)⁻¹ g_test[j] times g_train[i].
    """
    for rows, gradients in gathered_gradients(test):
        solved = inverse @ gradients.T  # (p, rows)
        for columns, at, block in _against_train(train, solved, mode, parts):
            yield rows, columns, at, block


def gathered_gradients(test: EmpiricalRisk) -> Iterator[tuple[slice, Tensor]]:
    """Test gradients in as large blocks (rows, p) as may be held."""
    limit = max(1, int(SOLVED_BYTES / (3 * 8 * test.p)))
    held: list[Tensor] = []
    start = 0
    for chunk, gradients in test.row_gradients():
        _check_finite(gradients, chunk.start, "test")
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
) -> Iterator[tuple[slice, int, Tensor]]:
    if mode == "up":
        row_bytes = 2 * solved.shape[1] * solved.dtype.itemsize
        for chunk, gradients in train.row_gradients(row_bytes):
            _check_finite(gradients, chunk.start, "training")
            columns, g = slice(chunk.start, chunk.stop), gradients.T.to(solved.dtype)  # (p, b)
            # I = Xᵀ Gᵀ                                                (rows, p) × (p, b)
            if parts is None:
                yield columns, 0, solved.T @ g
                continue
            for at, entries in enumerate(parts):
                yield columns, at, solved[entries].T @ g[entries]
        return
    for at, entries in enumerate([None] if parts is None else parts):
        # a pass for every part: side by side they would take as many times the memory
        own = solved if entries is None else _only(solved, entries)
        for chunk, slopes in _finite_slopes(train, own):
            yield slice(chunk.start, chunk.stop), at, slopes


def _finite_slopes(train: EmpiricalRisk, solved: Tensor) -> Iterator[tuple[Chunk, Tensor]]:
    for chunk, slopes in train.feature_gradients(solved):
        kind = "the derivative of its gradient by its features"
        _check_finite(slopes.transpose(0, 1), chunk.start, "training", kind)
        yield chunk, slopes


def _only(solved: Tensor, entries: Tensor) -> Tensor:
    own = torch.zeros_like(solved)
    own[entries] = solved[entries]
    return own


def _check_finite(
    gradients: Tensor, start: int, what: str, kind: str = "the gradient of its loss"
) -> None:
    """Refuse rows whose loss has no finite gradient: their scores would be NaN, and all means."""
    # a NaN or inf anywhere shows in the sum, which is several times faster than looking at each
    if bool(torch.isfinite(gradients.sum())):
        return
    bad = (~torch.isfinite(gradients)).flatten(1).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{what} data: row {start + int(bad[0])}: {kind} is not finite (NaN or inf), though "
            "the loss is. Has the loss a root or a logarithm of zero there, as the square root of "
            "an error has where the fit is exact?"
        )


def mean_gradient(test: EmpiricalRisk) -> Tensor:
    """1/m Σ_j g_test[j], (p,), of rows that all have a finite gradient."""
    gradient = test.gradient()
    if not bool(torch.isfinite(gradient).all()):
        for chunk, gradients in test.row_gradients():
            _check_finite(gradients, chunk.start, "test")
    return gradient


def mean_influence(
    inverse: LinearOperator, train: EmpiricalRisk, test: EmpiricalRisk, mode: Mode
) -> Tensor:
    """1/m Σ_j I[j, i], (n,) or (n, ...x), by one solve with the mean test gradient."""
    solved = inverse @ mean_gradient(test)[:, None]  # (p, 1)
    if mode == "up":
        found = train.matmul(solved)
        _check_finite(found, 0, "training")
        return found[:, 0]
    return torch.cat([slopes[0] for _, slopes in _finite_slopes(train, solved)])


def self_influence(inverse: LinearOperator, rows: EmpiricalRisk) -> Tensor:
    """g_iᵀ (C + λI)⁻¹ g_i for every row, (n,)."""
    parts: list[Tensor] = []
    for chunk, gradients in rows.row_gradients():
        _check_finite(gradients, chunk.start, "training")
        solved = inverse @ gradients.T  # (p, b)
        parts.append((gradients.T.to(solved.dtype) * solved).sum(0))
    return torch.cat(parts)
