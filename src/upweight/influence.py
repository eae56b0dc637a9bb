"""The influence of training rows on test rows, in blocks of constant memory.

    I[j, i]     = g_test[j]ᵀ (C + λI)⁻¹ g_train[i]             mode "up"
    I[j, i, *x] = ∂I[j, i] / ∂x_i                              mode "perturbation"

Positive = row i helps test row j: up-weighting it lowers the test loss. No 1/n, no minus sign.
Letters: m test rows, n training rows, b rows in a chunk, p parameters. This module is the only
place with the sign and the scale of a score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from upweight.curvature import KroneckerInverse
from upweight.layerwise import (
    Frames,
    GradientStore,
    Held,
    LayerGradients,
    Source,
    against_rows,
    blocks_of_parts,
    column_queries,
    factored_error,
    held_queries,
    own_influence,
)
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
Blocks = Iterator[tuple[slice, slice, int, Tensor]]

# Solved test gradients (C + λI)⁻¹ g_test that are held at once.
SOLVED_BYTES = 2**30
# Vectors of all parameters, in float64, that measuring the residual of one solution takes.
CERTIFIED = 8


def influence_blocks(
    inverse: LinearOperator,
    train: EmpiricalRisk | GradientStore,
    test: EmpiricalRisk,
    mode: Mode,
    parts: Sequence[Tensor] | None = None,
    *,
    shards: Sequence[slice] | None = None,
    done: Callable[[slice, slice], bool] | None = None,
) -> Blocks:
    """I in blocks: (test rows, training rows, 0, (rows, b) or (rows, b, ...x)).

    Test gradients are solved once each. The training rows are passed once for all the solved test
    gradients that fit into memory. An inverse by layers is met by what goes in and out of layers,
    or by what a store has of it; any other by gradients of all parameters.

    With `parts`, positions in θ, there is a block for each, with its index in place of 0: the sum
    over these positions alone of (C + λI)⁻¹ g_test[j] times g_train[i].

    With `shards`, consecutive slices of all training rows, no block crosses the border of two, and
    the numbers of one do not depend on the others. ``done(test rows, shard)`` says which to leave
    out.
    """
    n = len(train) if isinstance(train, GradientStore) else train.n
    pieces = [slice(0, n)] if shards is None else shards

    def wanted(rows: slice) -> list[slice]:
        return [piece for piece in pieces if done is None or not done(rows, piece)]

    inner = _by_layers(inverse)
    blocks = None if inner is None or not parts else blocks_of_parts(inner.curvature, parts)
    if inner is not None and mode == "up" and (parts is None or blocks is not None):
        _certify(inverse, test)
        frames = train.frames(inner) if isinstance(train, GradientStore) else None
        for held in held_queries(inner, test, n, frames):
            _tell(inverse, held, _source(inner, train, slice(0, n)))
            for piece in wanted(held.rows):
                source = _source(inner, train, piece)
                for columns, at, block in against_rows(held, source, blocks, piece.start):
                    yield held.rows, columns, at, block
        return
    if isinstance(train, GradientStore):
        raise TypeError(
            "a store of gradients has them in the blocks of EKFAC or KFAC, for mode='up': it "
            "cannot be used with another method, mode, or groups of parameters. Pass training rows"
        )
    for rows, gradients in gathered_gradients(test):
        if left := wanted(rows):
            solved = inverse @ gradients.T  # (p, rows)
            for piece in left:
                some = _only_rows(train, piece)
                for columns, at, block in _against_train(some, solved, mode, parts, piece.start):
                    yield rows, columns, at, block


def _source(inner: KroneckerInverse, train: EmpiricalRisk | GradientStore, piece: slice) -> Source:
    if isinstance(train, GradientStore):
        return train.part(piece).on(inner.device)
    return LayerGradients(inner.curvature, _only_rows(train, piece))


def _only_rows(train: EmpiricalRisk, piece: slice) -> EmpiricalRisk:
    if piece == slice(0, train.n):
        return train
    return train.with_rows(train.rows.subset(range(piece.start, piece.stop)))


def _by_layers(inverse: LinearOperator) -> KroneckerInverse | None:
    """The blocks by layers that an inverse is, or None."""
    inner = getattr(inverse, "inner", inverse)
    return inner if isinstance(inner, KroneckerInverse) else None


def _tell(inverse: Any, held: Held, train: Source) -> None:
    """Write into the certificate how test rows are held, and what is lost by it."""
    certificate = getattr(inverse, "certificate", None)
    if certificate is None:
        return
    certificate.facts.update(held.facts)
    error = factored_error(held, train)
    if error is not None:
        certificate.facts["error of factored scores"] = f"{error:.2g}, measured on some pairs"


def _certify(inverse: Any, test: EmpiricalRisk) -> None:
    """Measure residuals of some test rows, which are solved for as vectors of all parameters."""
    budget = int(getattr(inverse, "budget", 0))
    count = min(test.n, budget)
    certificate = getattr(inverse, "certificate", None)
    row_bytes = 0 if test.memory.limit is None else CERTIFIED * 8 * test.p
    if count and 4 * row_bytes > test.memory.queries(0):
        count = 0
        if certificate is not None:
            certificate.note("no residual measured: vectors of all parameters exceed memory=")
    if count:
        chosen = torch.linspace(0, test.n - 1, count).round().long().tolist()
        few = test.with_rows(test.rows.subset(chosen))
        for chunk, gradients in few.row_gradients(row_bytes):
            _check_finite(gradients, chunk.start, "test")
            _ = inverse @ gradients.T
    if certificate is not None:
        certificate.add(torch.empty(0), test.n - count)


def gathered_gradients(test: EmpiricalRisk) -> Iterator[tuple[slice, Tensor]]:
    """Test gradients in as large blocks (rows, p) as may be held."""
    limit = max(1, int(test.memory.queries(SOLVED_BYTES) / (3 * 8 * test.p)))
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
    train: EmpiricalRisk,
    solved: Tensor,
    mode: Mode,
    parts: Sequence[Tensor] | None,
    start: int,
) -> Iterator[tuple[slice, int, Tensor]]:
    if mode == "up":
        row_bytes = 2 * solved.shape[1] * solved.dtype.itemsize
        for chunk, gradients in train.row_gradients(row_bytes):
            _check_finite(gradients, start + chunk.start, "training")
            columns = slice(start + chunk.start, start + chunk.stop)
            g = gradients.T.to(solved.dtype)  # (p, b)
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
        for chunk, slopes in _finite_slopes(train, own, start):
            yield slice(start + chunk.start, start + chunk.stop), at, slopes


def _finite_slopes(
    train: EmpiricalRisk, solved: Tensor, start: int = 0
) -> Iterator[tuple[Chunk, Tensor]]:
    for chunk, slopes in train.feature_gradients(solved):
        kind = "the derivative of its gradient by its features"
        _check_finite(slopes.transpose(0, 1), start + chunk.start, "training", kind)
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
    inner = _by_layers(inverse)
    if mode == "up" and inner is not None:
        held = column_queries(inner.curvature, solved)
        gradients = LayerGradients(inner.curvature, train)
        return torch.cat([block[0] for _, _, block in against_rows(held, gradients)])
    if mode == "up":
        found = train.matmul(solved)
        _check_finite(found, 0, "training")
        return found[:, 0]
    return torch.cat([slopes[0] for _, slopes in _finite_slopes(train, solved)])


def self_influence(inverse: LinearOperator, rows: EmpiricalRisk | GradientStore) -> Tensor:
    """g_iᵀ (C + λI)⁻¹ g_i for every row, (n,)."""
    inner = _by_layers(inverse)
    if inner is not None and isinstance(rows, GradientStore):
        return own_influence(rows.on(inner.device), rows.frames(inner))
    if isinstance(rows, GradientStore):
        raise TypeError("a store of gradients is for the methods EKFAC and KFAC; pass rows")
    if inner is not None:
        _certify(inverse, rows)
        return own_influence(LayerGradients(inner.curvature, rows), Frames.of(inner))
    parts: list[Tensor] = []
    for chunk, gradients in rows.row_gradients():
        _check_finite(gradients, chunk.start, "training")
        solved = inverse @ gradients.T  # (p, b)
        parts.append((gradients.T.to(solved.dtype) * solved).sum(0))
    return torch.cat(parts)
