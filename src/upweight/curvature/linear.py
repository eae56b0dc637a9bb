"""Exact curvatures, written out, of networks whose θ are weights and biases of linear layers.

A zero δ_h is added to the output of every layer h, z_h = W_h a_h + c_h + δ_h. All that its weight
and bias do, they do through z_h, so that with ã_h = [a_h, 1] derivatives by θ follow from those by
δ, row by row:

    ∂ℓ/∂θ_h[o,i] = g_h[o] ã_h[i]                            g = ∂ℓ/∂δ
    C_hm[o,i; q,j] = 1/n Σ_rows  M_hm[o,q] ã_h[i] ã_m[j]
    H_hm[o,i; q,j] = 1/n Σ_rows  M_hm[o,q] ã_h[i] ã_m[j]
                               + g_h[o] A_hm[i,q] ã_m[j] + g_m[q] A_mh[j,o] ã_h[i]

For the GGN and the Fisher matrices C, M = Jᵀ B J with J = ∂output/∂δ and B the curvature of the
loss in the output. For the Hessian H, M = ∂²ℓ/∂δ∂δ and A_hm = ∂a_h/∂δ_m: derivatives along D
directions of δ, and as many of a, instead of p.

Letters: n rows, b in a chunk; layers h and m, with outputs o and q and columns i and j of ã, which
also stand for how many there are; D = Σ o over the layers; K roots per row; p parameters.

References
----------
A. Botev, H. Ritter, D. Barber, *Practical Gauss-Newton optimisation for deep learning* (2017), §3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from upweight.layers import DeclinedError, Layer, Taps
from upweight.operator import wide
from upweight.risk import CHUNK_BYTES, Chunk, EmpiricalRisk

__all__ = ["dense_gram", "dense_hessian"]

# Where one row needs more than this, too few rows would share a product of matrices.
ROW_BYTES = 4 * 2**20
# To form a number of M takes as long as so many multiplications in a product of matrices.
FORMED = 64
# At most so many rows are added up in the model's own precision.
SUMMED_ROWS = 8192
# Blocks of the matrix are written in pieces of about so many numbers, which stay in the cache.
PIECE = 2**18

Roots = Callable[[Chunk, Tensor], Tensor]  # chunk, output (b, *o) → S (b, K, *o) with B = S Sᵀ
Multiply = Callable[[Chunk, Tensor, Tensor], Tensor]  # chunk, output, u (k, b, *o) → B u


def dense_hessian(risk: EmpiricalRisk) -> tuple[Tensor, int] | None:
    """∇²L (p, p) in `wide` precision, and along how many directions it was differentiated.

    Parameters
    ----------
    risk
        The rows, model and loss.

    Returns
    -------
    None where θ does not consist of linear layers that are each called once, with inputs (b, i).
    """
    spent = 0

    def add(taps: Taps, chunk: Chunk, sums: Sums) -> None:
        nonlocal spent
        spent = taps.outputs + taps.inputs
        with torch.enable_grad():
            shifts = taps.shifts(len(chunk))
            output, inputs = taps(shifts, chunk.batch)  # per layer (b, i)
            loss = risk.row_loss(output, risk.target(chunk.batch)).sum()
            slopes = torch.autograd.grad(loss, shifts, create_graph=True, materialize_grads=True)
        g, extended = [slope.detach() for slope in slopes], taps.extend(inputs)
        for group, units in taps.units(g):
            curved = taps.pullback(slopes, shifts, units)  # M is symmetric: per layer (Σ q, b, o)
            sums.add_curved(group, curved, extended)
        if taps.moving:
            moving = [inputs[h] for h in taps.moving]
            for group, units in taps.units(moving):
                inner = taps.pullback(moving, shifts, units)  # per layer (Σ i, b, q)
                sums.add_inner([taps.moving[h] for h in group], inner, g, extended)

    def row_size(taps: Taps) -> tuple[int, int]:
        together = max(taps.sizes + [taps.layers[h].inputs for h in taps.moving])
        return taps.outputs * (taps.outputs + taps.inputs), together

    taps = risk.taps()
    matrix = None if taps is None else _dense(taps, add, row_size)
    return None if matrix is None else (matrix, spent)


def dense_gram(
    risk: EmpiricalRisk, root_count: int, roots: Roots, multiply: Multiply
) -> Tensor | None:
    """1/n Σ JᵀBJ (p, p) in `wide` precision, by K or o products for each row.

    Parameters
    ----------
    risk
        The rows, model and loss.
    root_count, roots
        K, and S (b, K, *o) with B = S Sᵀ for a chunk and its output. Used where K is less than o.
    multiply
        B u for a chunk, its output and u (k, b, *o). Otherwise applied to the o unit vectors.

    Returns
    -------
    None where θ does not consist of linear layers that are each called once, with inputs (b, i),
    or where these have so few inputs that all rows SᵀJ by θ (n·K, p) are cheaper.
    """
    o = int(torch.Size(risk.output_shape).numel())
    taps = risk.taps()
    if taps is None or min(root_count, o) * risk.p**2 < FORMED * taps.outputs**2:
        return None

    def add(taps: Taps, chunk: Chunk, sums: Sums) -> None:
        with torch.enable_grad():
            shifts = taps.shifts(len(chunk))
            output, inputs = taps(shifts, chunk.batch)
        fixed = output.detach()
        if root_count < o:
            cotangents = roots(chunk, fixed).transpose(0, 1)
            right = left = taps.pullback([output], shifts, [cotangents])
        else:
            units = torch.eye(o, dtype=output.dtype, device=output.device)
            units = units.view(o, 1, *output.shape[1:]).expand(o, *output.shape)
            both = torch.cat([units, multiply(chunk, fixed, units)])
            pulled = taps.pullback([output], shifts, [both])  # J and BJ, per layer (2o, b, q)
            right, left = [u[:o] for u in pulled], [u[o:] for u in pulled]
        sums.add_factors(left, right, taps.extend(inputs))

    return _dense(taps, add, lambda taps: (2 * o * (taps.outputs + o), o))


def _dense(
    taps: Taps,
    add: Callable[[Taps, Chunk, Sums], None],
    row_size: Callable[[Taps], tuple[int, int]],
) -> Tensor | None:
    """The matrix, by adding chunks whose rows take so many numbers, and cotangents, at once."""
    risk = taps.risk
    numbers, cotangents = row_size(taps)
    with risk.model.evaluating():
        sums = Sums(risk, taps.layers)
        own = (numbers + sums.row_numbers()) * risk.dtype.itemsize
        if own > ROW_BYTES:
            return None
        row_bytes = own + cotangents * risk.activation_bytes
        least = risk.memory.chunk(CHUNK_BYTES) / SUMMED_ROWS
        try:
            with taps.installed():
                for chunk in risk.chunks(max(row_bytes, least)):
                    add(taps, chunk, sums)
        except torch.OutOfMemoryError:
            raise
        except (DeclinedError, RuntimeError, NotImplementedError):
            return None
        return sums.matrix()


# --- sums over rows ------------------------------------------------------------------------------


class Triangle:
    """The entries i ≥ j of a square, line by line.

    Attributes
    ----------
    rows, columns, flat
        i, j and the flat position in the square of every such entry.
    places
        (size, size): for every entry of a symmetric matrix, which of them it is equal to.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.rows, self.columns = torch.tril_indices(size, size, device=device)
        self.flat = self.rows * size + self.columns
        index = torch.arange(size, device=device)
        low, high = torch.minimum(index, index[:, None]), torch.maximum(index, index[:, None])
        self.places = high * (high + 1) // 2 + low


class Sums:
    """The sums over rows that the matrix consists of, by pairs of layers.

    Parameters
    ----------
    risk, layers
        What the matrix is of.

    Attributes
    ----------
    outer
        Σ M_hm[o,q] ã_h[i] ã_m[j] for m < h, as (q·o, i·j). For m = h it is symmetric in o and q and
        in i and j: only o ≥ q and i ≥ j, a quarter, as (o(o + 1)/2, i(i + 1)/2).
    inner
        Σ A_hm[i,q] g_h[o] ã_m[j] for h ≠ m, as (columns, o, j), and which (i, q) the columns are.
        Where A_hm is zero in all rows there is none: after an elementwise function most of it is.
    """

    def __init__(self, risk: EmpiricalRisk, layers: Sequence[Layer]) -> None:
        self.risk = risk
        self.layers = tuple(layers)
        self.wide = wide(risk.dtype, risk.device)
        sizes = {layer.outputs for layer in layers} | {layer.columns for layer in layers}
        self.triangles = {size: Triangle(size, risk.device) for size in sizes}
        self.outer: dict[tuple[int, int], Tensor] = {}
        self.inner: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def row_numbers(self) -> int:
        """How many numbers one row needs for its largest pair of layers."""
        return max(
            2 * h.outputs * m.outputs
            + min(h.columns * m.columns, h.outputs * m.outputs * min(h.columns, m.columns))
            for h in self.layers
            for m in self.layers
        )

    def add_curved(
        self, group: range, curved: Sequence[Tensor], extended: Sequence[Tensor]
    ) -> None:
        """Add a chunk by M of a group of layers m with every h, (Σ q, b, o), and by ã (b, i)."""
        sizes = [self.layers[m].outputs for m in group]
        for h, whole in enumerate(curved):
            for m, moment in zip(group, whole.split(sizes), strict=True):
                if m <= h:
                    self._add_outer(h, m, moment.transpose(0, 1), extended)

    def add_factors(
        self, left: Sequence[Tensor], right: Sequence[Tensor], extended: Sequence[Tensor]
    ) -> None:
        """Add a chunk by the factors of M = leftᵀ right, per layer (K, b, o), and by ã (b, i)."""
        for h, two in enumerate(right):
            for m, one in enumerate(left[: h + 1]):
                self._add_outer(h, m, one.permute(1, 2, 0) @ two.transpose(0, 1), extended)

    def _add_outer(self, h: int, m: int, moment: Tensor, extended: Sequence[Tensor]) -> None:
        """Add M_hm as (b, q, o)."""
        left, right = extended[h], extended[m]
        if h == m:
            outer, inner = self.triangles[moment.shape[1]], self.triangles[left.shape[1]]
            part = symmetric_product(moment, left, outer, inner)
        else:
            part = triple_product(moment.flatten(1), left, right).flatten(1)
        known = self.outer.get((h, m))
        self.outer[h, m] = part if known is None else known.to(self.wide).add_(part)

    def add_inner(
        self,
        group: Sequence[int],
        pulled: Sequence[Tensor],
        slopes: Sequence[Tensor],
        extended: Sequence[Tensor],
    ) -> None:
        """Add a chunk by A of a group of layers h with every m, (Σ i, b, q), by g and by ã."""
        sizes = [self.layers[h].inputs for h in group]
        for m, whole in enumerate(pulled):
            alive = (whole != 0).any(1)  # (Σ i, q)
            for h, block, kept in zip(group, whole.split(sizes), alive.split(sizes), strict=True):
                if bool(kept.any()):
                    columns = block.transpose(0, 1)[:, kept]  # (b, columns)
                    part = triple_product(columns, slopes[h], extended[m])
                    self.inner[h, m] = self._merge(self.inner.get((h, m)), kept, part)

    def _merge(
        self, known: tuple[Tensor, Tensor] | None, kept: Tensor, part: Tensor
    ) -> tuple[Tensor, Tensor]:
        if known is None:
            return kept, part
        before, total = known
        if torch.equal(before, kept):
            return kept, total.to(self.wide).add_(part)
        union = before | kept
        shape = (int(union.sum()), *part.shape[1:])
        merged = torch.zeros(shape, dtype=self.wide, device=part.device)
        merged[before[union]] = total.to(self.wide)
        merged[kept[union]] += part
        return union, merged

    def matrix(self) -> Tensor:
        """The mean over rows, (p, p)."""
        p = self.risk.p
        matrix = torch.empty(p, p, dtype=self.wide, device=self.risk.device)
        for h in range(len(self.layers)):
            self._write_own(matrix, h)
            for m in range(h):
                self._write_pair(matrix, h, m)
        return matrix

    def _write_own(self, matrix: Tensor, h: int) -> None:
        o, i = self.layers[h].outputs, self.layers[h].columns
        part = self.outer.pop((h, h))
        places, inner = self.triangles[o].places, self.triangles[i].places.flatten()
        step = max(1, PIECE // (o * i * i))
        for start in range(0, o, step):
            lines = places[start : start + step]  # (s, q)
            piece = take_columns(part[lines.flatten()], inner).view(*lines.shape, i, i)
            self._write(matrix, h, h, piece.to(self.wide).transpose(1, 2), start)

    def _write_pair(self, matrix: Tensor, h: int, m: int) -> None:
        one, two = self.layers[h], self.layers[m]
        part = self.outer.pop((h, m)).to(self.wide)
        block = part.view(two.outputs, one.outputs, one.columns, two.columns)  # (q, o, i, j)
        block = block.permute(1, 2, 0, 3)  # (o, i, q, j)
        for key, view in (((h, m), block), ((m, h), block.permute(2, 3, 0, 1))):
            if key in self.inner:
                kept, values = self.inner.pop(key)
                at = view.permute(1, 2, 0, 3)[: len(kept)]  # (i, q, o, j)
                at[kept] += values.to(self.wide)
        self._write(matrix, h, m, block)
        matrix[two.entries, one.entries] = matrix[one.entries, two.entries].T

    def _write(self, matrix: Tensor, h: int, m: int, block: Tensor, first: int = 0) -> None:
        """Write a block (s, i, q, j) over n, whose lines begin with output `first` of layer h."""
        s, q = block.shape[0], block.shape[2]
        for line, i in self.layers[h].segments:
            width = i.stop - i.start
            lines = slice(line + first * width, line + (first + s) * width)
            for column, j in self.layers[m].segments:
                columns = slice(column, column + q * (j.stop - j.start))
                place = matrix[lines, columns].view(s, width, q, -1)
                torch.div(block[:, i, :, j], self.risk.n, out=place)


def symmetric_product(moment: Tensor, a: Tensor, outer: Triangle, inner: Triangle) -> Tensor:
    """Σ_b M[b,o,q] a[b,i] a[b,j] for o ≥ q and i ≥ j, for M symmetric in o and q."""
    packed = take_columns(moment.flatten(1), outer.flat)  # (b, o(o + 1)/2)
    if a.shape[1] < 2 * packed.shape[1]:
        return packed.T @ (take_columns(a, inner.rows) * take_columns(a, inner.columns))
    return take_columns(triple_product(packed, a, a).flatten(1), inner.flat)


def triple_product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Σ_b x[b,k] y[b,i] z[b,j], (k, i, j), by way of the smallest of the three products of two."""
    k, i, j = x.shape[1], y.shape[1], z.shape[1]
    smallest = min(i * j, k * i, k * j)
    if smallest == i * j:
        return (x.T @ products(y, z)).view(k, i, j)
    if smallest == k * i:
        return (products(x, y).T @ z).view(k, i, j)
    return (products(x, z).T @ y).view(k, j, i).transpose(1, 2)


def products(y: Tensor, z: Tensor) -> Tensor:
    """y[b,i] z[b,j], (b, i·j)."""
    return (y[:, :, None] * z[:, None]).flatten(1)


def take_columns(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index]; `torch.gather` is two to three times as fast as indexing here (torch 2.13)."""
    return torch.gather(x, 1, index.expand(len(x), -1))
