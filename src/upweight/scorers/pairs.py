"""Products of the gradients of single rows, g_test[j]ᵀ g_train[i], in blocks of constant memory.

Where θ consists of linear layers that act once for a row, the gradient of a layer is u ãᵀ, with u
the derivative by its output and ã = [a, 1] its input. It is never formed:

    g·g' = Σ_layers (u·u') (ã·ã')        ‖g‖² = Σ_layers ‖u‖² ‖ã‖²

Letters: m test rows, n training rows, b rows in a chunk, r test rows at once, p parameters, a layer
with o outputs and i columns of ã.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from upweight.layers import DeclinedError, Taps
from upweight.operator import wide
from upweight.risk import Chunk, EmpiricalRisk

__all__ = ["GradientPairs", "RowGradients"]

# Test gradients that are held at once: so many bytes, and so many rows.
HELD_BYTES = 2**29
HELD_ROWS = 4096


@dataclass(frozen=True)
class RowGradients:
    """Gradients of b rows as parts of θ, each the outer product of its factors.

    Attributes
    ----------
    parts
        For every part its factors: (G,) with G (b, p), or (u, ã) with u (b, o) and ã (b, i).
    """

    parts: tuple[tuple[Tensor, ...], ...]

    def __len__(self) -> int:
        return len(self.parts[0][0])

    def dot(self, other: RowGradients) -> Tensor:
        """g_j·g'_i for every pair of rows, (b, b')."""
        total: Tensor | None = None
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            grams = [x @ y.T for x, y in zip(mine, theirs, strict=True)]
            part = math.prod(grams[1:], start=grams[0])
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def norms(self) -> Tensor:
        """‖g‖ of every row, (b,), in `wide` precision."""
        total = torch.zeros((), device=self.parts[0][0].device)
        for factors in self.parts:
            squares = [f.to(wide(f.dtype, f.device)).square().sum(1) for f in factors]
            total = total + math.prod(squares[1:], start=squares[0])
        return total.sqrt()

    def normalised(self) -> tuple[RowGradients, Tensor]:
        """g / ‖g‖, and which rows have no direction: their gradient is zero, and stays so."""
        norms = self.norms()
        zero = norms == 0
        divisor = norms.masked_fill(zero, 1.0)[:, None]
        parts = [((u / divisor).to(u.dtype), *others) for u, *others in self.parts]
        return RowGradients(tuple(parts)), zero

    def check_finite(self, start: int, what: str) -> None:
        """Refuse rows whose loss has no finite gradient."""
        for factors in self.parts:
            for factor in factors:
                # a NaN or inf anywhere shows in the sum, which is faster than looking at each
                if bool(torch.isfinite(factor.sum())):
                    continue
                bad = (~torch.isfinite(factor)).any(1).nonzero().flatten()
                if len(bad):
                    raise ValueError(
                        f"{what} data: row {start + int(bad[0])}: the gradient of its loss is not "
                        "finite (NaN or inf), though the loss is. Has the loss a root or a "
                        "logarithm of zero there?"
                    )


@dataclass
class GradientPairs:
    """g_test[j]ᵀ g_train[i] of two risks of one model; `normalised` gives the cosine.

    Attributes
    ----------
    zero_train, zero_test
        Rows with a zero gradient that were met, where cosines are taken.
    """

    train: EmpiricalRisk
    test: EmpiricalRisk
    normalised: bool = False
    zero_train: set[int] = field(default_factory=set[int])
    zero_test: set[int] = field(default_factory=set[int])

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Blocks (test rows, training rows, (r, b)); a block may come twice, the later one counts.

        That is where a row goes another way through the model than the probed ones, so that layer
        by layer does not do.
        """
        if self.train.taps() is not None and self.test.taps() is not None:
            try:
                yield from self._blocks(by_layer=True)
                return
            except DeclinedError:
                pass
        yield from self._blocks(by_layer=False)

    def _blocks(self, by_layer: bool) -> Iterator[tuple[slice, slice, Tensor]]:
        for rows, held in self._held(by_layer):
            row_bytes = 3 * len(held) * self.train.dtype.itemsize
            for columns, gradients in _gradients(self.train, by_layer, row_bytes):
                gradients.check_finite(columns.start, "training")
                yield rows, columns, held.dot(self._ready(gradients, columns, self.zero_train))

    def _held(self, by_layer: bool) -> Iterator[tuple[slice, RowGradients]]:
        """Test gradients in as large blocks as may be held."""
        held: list[RowGradients] = []
        start = 0
        for rows, gradients in _gradients(self.test, by_layer):
            gradients.check_finite(rows.start, "test")
            width = sum(f.shape[1] for part in gradients.parts for f in part)
            limit = min(HELD_ROWS, int(HELD_BYTES / (width * self.test.dtype.itemsize)))
            held.append(self._ready(gradients, rows, self.zero_test))
            if rows.stop - start >= limit or rows.stop == self.test.n:
                yield slice(start, rows.stop), _joined(held)
                start, held = rows.stop, []

    def _ready(self, gradients: RowGradients, rows: slice, zeros: set[int]) -> RowGradients:
        if not self.normalised:
            return gradients
        gradients, zero = gradients.normalised()
        zeros.update(rows.start + int(at) for at in zero.nonzero())
        return gradients

    def notes(self) -> list[str]:
        """What is to be said of these scores."""
        return [
            f"{len(zeros)} {what} row(s) have a zero gradient, and a cosine of 0 with every row: "
            f"the first is row {min(zeros)}"
            for what, zeros in (("training", self.zero_train), ("test", self.zero_test))
            if zeros
        ]


def _gradients(
    risk: EmpiricalRisk, by_layer: bool, row_bytes: float = 0.0
) -> Iterator[tuple[slice, RowGradients]]:
    taps = risk.taps() if by_layer else None
    if taps is None:
        for chunk, gradients in risk.row_gradients(row_bytes):
            yield slice(chunk.start, chunk.stop), RowGradients(((gradients,),))
        return
    width = sum(layer.outputs + layer.columns for layer in taps.layers)
    own = 2 * width * risk.dtype.itemsize + 2 * risk.activation_bytes
    for chunk in risk.chunks(row_bytes + own):
        # left before every yield: what the caller does meanwhile is not ours to switch
        with risk.model.evaluating(), taps.installed():
            parts = _by_layer(taps, chunk)
        yield slice(chunk.start, chunk.stop), parts


def _by_layer(taps: Taps, chunk: Chunk) -> RowGradients:
    with torch.enable_grad():
        shifts = taps.shifts(len(chunk))
        output, inputs = taps(shifts, chunk.batch)
        loss = taps.risk.row_loss(output, taps.risk.target(chunk.batch)).sum()
    slopes = torch.autograd.grad(loss, shifts, materialize_grads=True)
    return RowGradients(tuple(zip(slopes, taps.extend(inputs), strict=True)))


def _joined(blocks: list[RowGradients]) -> RowGradients:
    parts = zip(*[block.parts for block in blocks], strict=True)
    return RowGradients(
        tuple(tuple(torch.cat(f) for f in zip(*part, strict=True)) for part in parts)
    )
