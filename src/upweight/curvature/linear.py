"""Exact curvatures, written out, of networks whose θ are weights and biases of plain linear layers.

A zero δ_l is added to the output of every layer, z_l = W_l a_l + c_l + δ_l. All that θ_l does, it does
through z_l, so with ã_l = [a_l, 1] the derivatives by θ follow from those by δ, row by row:

    ∂ℓ/∂θ_l[o,i] = g_l[o] ã_l[i]                            g = ∂ℓ/∂δ  (b, D)
    C_lm[o,i; o',i'] = 1/n Σ_rows  M_lm[o,o'] ã_l[i] ã_m[i']
    H_lm[o,i; o',i'] = 1/n Σ_rows  M_lm[o,o'] ã_l[i] ã_m[i']
                                 + g_l[o] A_lm[i,o'] ã_m[i'] + g_m[o'] A_ml[i',o] ã_l[i]

with M = JᵀS SᵀJ, J = ∂output/∂δ, for the GGN and the Fisher matrices C (S: roots of the curvature in
the output), and M = ∂²ℓ/∂δ∂δ, A_lm = ∂a_l/∂δ_m for the Hessian H: D directional derivatives, not p.

Letters: b rows in a chunk, layers l and m with o and q outputs (o' above) and i and j columns of ã
(i' above), D = Σ o_l, K roots per row, p parameters.

References
----------
A. Botev, H. Ritter, D. Barber, *Practical Gauss-Newton optimisation for deep learning*, ICML 2017, §3.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vjp

from upweight.operator import wide
from upweight.risk import Chunk, EmpiricalRisk

__all__ = ["dense_gram", "dense_hessian"]

# Tangents of the directions that go through a chunk together stay below this many bytes.
TANGENT_BYTES = 64 * 2**20
# Blocks of the matrix are copied into their places in pieces of about so many numbers.
PIECE = 2**18
PROBED_ROWS = 8

Roots = Callable[[Chunk, Tensor], Tensor]  # chunk, output (b, *o) → S (b, K, *o)
Multiply = Callable[[Chunk, Tensor, Tensor], Tensor]  # chunk, output, u (k, b, *o) → A u


def dense_hessian(risk: EmpiricalRisk) -> tuple[Tensor, int] | None:
    """∇²L (p, p) in `wide` precision, and the D directional derivatives that it took.

    Parameters
    ----------
    risk
        The rows, model and loss.

    Returns
    -------
    None where θ does not consist of linear layers that are each called once, with inputs (b, i).
    """

    def add(taps: Taps, chunk: Chunk, sums: Sums) -> None:
        target = risk.target(chunk.batch)

        def loss(shifts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            output, inputs = taps(shifts, chunk.batch)
            return risk.row_loss(output, target).sum(), inputs

        def moved(shifts: list[Tensor]) -> list[Tensor]:
            inputs = taps(shifts, chunk.batch)[1]
            return [inputs[l] for l in taps.moving]

        zeros = taps.zeros(len(chunk))
        g, pull, a = vjp(grad(loss, has_aux=True), zeros, has_aux=True)  # per layer (b, o), (b, i)
        extended = taps.extend(a)
        for group, coordinates in taps.coordinates(zeros):
            curved = taps.pullback(pull, coordinates)  # M is symmetric; per layer (Σ q, b, o)
            sums.add_tangents(group, curved, extended)
        if taps.moving:
            a, pull = vjp(moved, zeros)
            for group, coordinates in taps.coordinates(a):
                inner = taps.pullback(pull, coordinates)  # per layer (Σ i, b, q)
                sums.add_inner([taps.moving[l] for l in group], inner, g, extended)

    return _dense(risk, add, lambda taps: taps.total * (taps.total + taps.moving_inputs))


def dense_gram(
    risk: EmpiricalRisk, root_count: int, roots: Roots | None, multiply: Multiply
) -> tuple[Tensor, int] | None:
    """1/n Σ_i J_iᵀ A_i J_i (p, p) in `wide` precision, and the products that it took.

    Parameters
    ----------
    risk
        The rows, model and loss.
    root_count, roots
        K, and S (b, K, *o) with A = S Sᵀ for a chunk and its output; without, D products with A.
    multiply
        A u for a chunk, its output and u (k, b, *o).

    Returns
    -------
    None where θ does not consist of linear layers that are each called once, with inputs (b, i).
    """

    def add(taps: Taps, chunk: Chunk, sums: Sums) -> None:
        zeros = taps.zeros(len(chunk))
        output, pull, a = vjp(lambda shifts: taps(shifts, chunk.batch), zeros, has_aux=True)

        extended = taps.extend(a)
        if roots is not None:
            cotangents = roots(chunk, output).transpose(0, 1)
            sums.add_roots(taps.pullback(pull, cotangents), extended)
            return
        for group, coordinates in taps.coordinates(zeros):
            pushed = risk.autodiff.pushforward(
                lambda shifts: taps(shifts, chunk.batch)[0], zeros, coordinates
            )
            curved = taps.pullback(pull, multiply(chunk, output, pushed))
            sums.add_tangents(group, curved, extended)

    return _dense(
        risk, add, lambda taps: taps.total * (taps.total if roots is None else root_count)
    )


def _dense(risk: EmpiricalRisk, add: Any, row_numbers: Callable[[Taps], int]) -> Any:
    layers = find_layers(risk)
    if layers is None:
        return None
    taps = Taps(risk, layers)
    sums = Sums(risk, layers)
    try:
        with risk.model.evaluating(), taps.installed():
            taps.probe()
            row_bytes = (row_numbers(taps) + sums.row_numbers()) * risk.dtype.itemsize
            for chunk in risk.chunks(row_bytes + 3 * risk.activation_bytes):
                add(taps, chunk, sums)
    except DeclinedError:
        return None
    return sums.matrix(), taps.total


# --- the layers --------------------------------------------------------------------------------


class DeclinedError(Exception):
    """A layer is not used exactly once per row, so the formulas do not hold."""


@dataclass(frozen=True)
class Layer:
    """A linear layer, and where its weight and bias begin in θ; None for one that is not chosen."""

    module: nn.Linear
    weight: int | None
    bias: int | None

    @property
    def outputs(self) -> int:
        """o."""
        return self.module.weight.shape[0]

    @property
    def inputs(self) -> int:
        """The number of columns of ã that are inputs."""
        return 0 if self.weight is None else self.module.weight.shape[1]

    @property
    def columns(self) -> int:
        """The number of columns of ã."""
        return self.inputs + (self.bias is not None)

    def extend(self, a: Tensor) -> Tensor:
        """ã (b, i) for inputs a: [a, 1], or what of it belongs to chosen parameters."""
        parts = [] if self.weight is None else [a]
        parts += [] if self.bias is None else [torch.ones_like(a[:, :1])]
        return torch.cat(parts, dim=1)

    @property
    def places(self) -> slice:
        """The entries of θ; weight and bias are next to each other."""
        start = min(start for start, _ in self.segments())
        return slice(start, start + self.outputs * self.columns)

    def segments(self) -> list[tuple[int, slice]]:
        """Where in θ, as (o, columns) row after row, which columns of ã begin."""
        found = [] if self.weight is None else [(self.weight, slice(0, self.inputs))]
        return found + (
            [] if self.bias is None else [(self.bias, slice(self.inputs, self.columns))]
        )


def find_layers(risk: EmpiricalRisk) -> list[Layer] | None:
    """The linear layers that θ consists of; None if some of it is anything else, or is shared."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in risk.model.model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, name))
    parameters = dict(risk.model.model.named_parameters())
    starts: dict[nn.Linear, dict[str, int]] = {}
    start = 0
    for name, size in zip(risk.model.names, risk.model.sizes, strict=True):
        (module, attribute), *others = owners[id(parameters[name])]
        plain = type(module) is nn.Linear and "forward" not in vars(module)
        if others or not plain or attribute not in ("weight", "bias"):
            return None
        starts.setdefault(module, {})[attribute] = start
        start += size
    if any(dtype != risk.dtype for dtype in risk.model.dtypes):
        return None
    return [Layer(module, at.get("weight"), at.get("bias")) for module, at in starts.items()]


class Taps:
    """The model as a function of δ, which is added to the outputs (b, o) of the layers."""

    def __init__(self, risk: EmpiricalRisk, layers: Sequence[Layer]) -> None:
        self.risk = risk
        self.layers = tuple(layers)
        self.sizes = [layer.outputs for layer in layers]
        self.total = sum(self.sizes)
        self.moving: list[int] = []
        self._theta = risk.model.parameters()
        self._shifts: Sequence[Tensor] | None = None
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._cut = False

    @property
    def moving_inputs(self) -> int:
        return sum(self.layers[l].inputs for l in self.moving)

    @contextmanager
    def installed(self) -> Generator[None]:
        """Hooks directly behind the layers, before any of the user's, until the end."""
        with ExitStack() as stack:
            for l, layer in enumerate(self.layers):
                hook = self._hook(l)
                handle = layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _hook(self, l: int) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if self._shifts is None:
                return None
            a, shift = (args[0] if args else kwargs["input"]), self._shifts[l]
            if l in self._seen or a.ndim != 2 or output.shape != shift.shape:
                raise DeclinedError
            self._seen[l] = (a, output)
            return (output.detach() if self._cut else output) + shift

        return hook

    def __call__(self, shifts: Sequence[Tensor], batch: Any) -> tuple[Tensor, list[Tensor]]:
        """The output (b, *o), and the inputs (b, i) of the layers."""
        output, seen = self._run(self._theta, shifts, batch)
        return output, [a for a, _ in seen]

    def _run(
        self, theta: Any, shifts: Sequence[Tensor], batch: Any, *, cut: bool = False
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Output, and input and output of every layer; a cut lets no derivative through a layer."""
        self._shifts, self._seen, self._cut = shifts, {}, cut
        try:
            output = self.risk.model(theta, batch)
            if len(self._seen) != len(self.layers):
                raise DeclinedError
            return output, [self._seen[l] for l in range(len(self.layers))]
        finally:
            self._shifts, self._seen, self._cut = None, {}, False

    def extend(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """ã (b, i) for the inputs of the layers."""
        return [layer.extend(a) for layer, a in zip(self.layers, inputs, strict=True)]

    def zeros(self, b: int) -> list[Tensor]:
        """δ = 0 for b rows."""
        whole = torch.zeros(b, self.total, dtype=self.risk.dtype, device=self.risk.device)
        return list(whole.split(self.sizes, dim=1))

    def coordinates(self, tensors: Sequence[Tensor]) -> Iterator[tuple[range, list[Tensor]]]:
        """Unit vectors for tensors (b, s), the same in all rows, some tensors at a time.

        Yields the indices of those tensors, and for every tensor (k, b, s), k their Σ s.
        """
        sizes = [t.shape[1] for t in tensors]
        b, dtype, device = len(tensors[0]), tensors[0].dtype, tensors[0].device
        together = TANGENT_BYTES / (3 * b * self.risk.activation_bytes)
        identity = torch.eye(sum(sizes), dtype=dtype, device=device)
        for group in groups(sizes, together):
            start = sum(sizes[: group.start])
            block = identity[start : start + sum(sizes[i] for i in group)]
            yield group, [e[:, None].expand(-1, b, -1) for e in block.split(sizes, dim=1)]

    def pullback(self, pull: Callable[[Any], Any], cotangents: Any) -> list[Tensor]:
        """uᵀ ∂/∂δ for k cotangents (k, …): per layer (k, b, o)."""
        rows = self.risk.autodiff.rows
        return rows(lambda u: pull(u)[0], cotangents, what="transposed products")

    def probe(self) -> None:
        """Try a few rows: θ must act through the layers only, and rows must stay where they are."""
        count = min(PROBED_ROWS, self.risk.n)
        few = self.risk.with_rows(self.risk.rows.subset(range(count)))
        chunk = next(iter(few.chunks()))
        batch, half = chunk.batch, len(chunk) // 2
        zeros = self.zeros(len(chunk))
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in self._theta.items()}
            output, seen = self._run(leaves, zeros, batch, cut=True)
        for layer, (a, z) in zip(self.layers, seen, strict=True):
            wanted = F.linear(a, layer.module.weight, layer.module.bias)
            if a.requires_grad or not torch.equal(z, wanted):
                raise DeclinedError
        if output.requires_grad:
            raise DeclinedError
        with torch.enable_grad():
            for shift in zeros:
                shift[:half] = 1.0
                shift.requires_grad_()
            other, seen_again = self._run(self._theta, zeros, batch)
        pairs = [(output, other)] + [
            (a, c) for (a, _), (c, _) in zip(seen, seen_again, strict=True)
        ]
        if not all(torch.equal(one[half:], two[half:]) for one, two in pairs):
            raise DeclinedError
        self.moving = [
            l for l, (a, _) in enumerate(seen_again) if a.requires_grad and self.layers[l].inputs
        ]


def groups(sizes: Sequence[int], most: float) -> Iterator[range]:
    """Consecutive indices whose sizes add up to no more than `most`, or one alone."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > most:
            yield range(start, index)
            start, total = index, 0
        total += size
    yield range(start, len(sizes))


# --- sums over rows ------------------------------------------------------------------------------


class Triangle:
    """The entries i ≥ j of a square, in the order of their rows.

    Attributes
    ----------
    rows, columns, flat
        i, j and their flat position in the square.
    places
        For every entry (size, size) of a symmetric matrix, where among these it is.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.rows, self.columns = torch.tril_indices(size, size, device=device)
        self.flat = self.rows * size + self.columns
        low, high = torch.arange(size, device=device), torch.arange(size, device=device)[:, None]
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        self.places = high * (high + 1) // 2 + low


class Sums:
    """The sums over rows that make up the matrix, by pairs of layers, in the order of the products.

    Parameters
    ----------
    risk, layers
        What the matrix is of.

    Attributes
    ----------
    outer
        For l = m Σ M[o,q] ã[i] ã[j] for o ≥ q and i ≥ j, (o·(o+1)/2, i·(i+1)/2): it is symmetric in both
        pairs. For m < l (q·o, i·j).
    inner
        For l ≠ m Σ A_lm[i,q] g_l[o] ã_m[j] as (columns, o, j), and which (i, q) the columns are:
        where A_lm is zero in all rows nothing is kept. Elementwise functions leave only a diagonal.
    """

    def __init__(self, risk: EmpiricalRisk, layers: Sequence[Layer]) -> None:
        self.risk = risk
        self.layers = tuple(layers)
        sizes = {layer.outputs for layer in layers} | {layer.columns for layer in layers}
        self.triangles = {size: Triangle(size, risk.device) for size in sizes}
        self.wide = wide(risk.dtype, risk.device)
        self.outer: dict[tuple[int, int], Tensor] = {}
        self.inner: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def row_numbers(self) -> int:
        """How many numbers one row needs for its largest pair of layers."""
        return max(
            2 * l.outputs * m.outputs
            + min(l.columns * m.columns, l.outputs * m.outputs * min(l.columns, m.columns))
            for l in self.layers
            for m in self.layers
        )

    def add_tangents(
        self, group: range, curved: Sequence[Tensor], extended: Sequence[Tensor]
    ) -> None:
        """Add a chunk by the rows M_m of a group of layers, for every l (Σ q, b, o); ã (b, i)."""
        sizes = [self.layers[m].outputs for m in group]
        for l, whole in enumerate(curved):
            for m, moment in zip(group, whole.split(sizes), strict=True):
                if m <= l:
                    self._add_outer(l, m, moment.transpose(0, 1), extended)

    def add_roots(self, pulled: Sequence[Tensor], extended: Sequence[Tensor]) -> None:
        """Add a chunk by SᵀJ (K, b, o) and ã (b, i)."""
        for l, right in enumerate(pulled):
            for m, left in enumerate(pulled[: l + 1]):
                self._add_outer(l, m, left.permute(1, 2, 0) @ right.transpose(0, 1), extended)

    def _add_outer(self, l: int, m: int, moment: Tensor, extended: Sequence[Tensor]) -> None:
        """For M_lm as (b, q, o)."""
        left, right = extended[l], extended[m]
        if l == m:
            o, i = moment.shape[1], left.shape[1]
            part = symmetric_product(moment, left, self.triangles[o], self.triangles[i])
        else:
            part = triple_product(moment.flatten(1), left, right).flatten(1)
        known = self.outer.get((l, m))
        self.outer[l, m] = part if known is None else known.to(self.wide).add_(part)

    def add_inner(
        self,
        group: Sequence[int],
        pulled: Sequence[Tensor],
        slopes: Sequence[Tensor],
        extended: Sequence[Tensor],
    ) -> None:
        """Add a chunk by A_lm for a group of layers l, for every m (Σ i, b, q); g; ã (b, j)."""
        sizes = [self.layers[l].inputs for l in group]
        for m, whole in enumerate(pulled):
            for l, block in zip(group, whole.split(sizes), strict=True):
                alive = (block != 0).any(1)  # (i, q)
                if bool(alive.any()):
                    columns = block.transpose(0, 1)[:, alive]
                    part = triple_product(columns, slopes[l], extended[m])
                    self.inner[l, m] = self._merge(self.inner.get((l, m)), alive, part)

    def _merge(
        self, known: tuple[Tensor, Tensor] | None, alive: Tensor, part: Tensor
    ) -> tuple[Tensor, Tensor]:
        if known is None:
            return alive, part
        before, total = known
        if torch.equal(before, alive):
            return alive, total.to(self.wide).add_(part)
        union = before | alive
        merged = torch.zeros(int(union.sum()), *part.shape[1:], dtype=self.wide, device=part.device)
        merged[before[union]] = total.to(self.wide)
        merged[alive[union]] += part
        return union, merged

    def matrix(self) -> Tensor:
        """The mean over rows, (p, p)."""
        p = self.risk.p
        matrix = torch.empty(p, p, dtype=self.wide, device=self.risk.device)
        for l in range(len(self.layers)):
            self._write_own(matrix, l)
            for m in range(l):
                self._write_pair(matrix, l, m)
        return matrix

    def _write_own(self, matrix: Tensor, l: int) -> None:
        layer = self.layers[l]
        o, i = layer.outputs, layer.columns
        part = self.outer.pop((l, l))
        places, inner = self.triangles[o].places, self.triangles[i].places.flatten()
        step = max(1, PIECE // (o * i * i))
        for start in range(0, o, step):
            lines = places[start : start + step]  # (s, q)
            piece = take_columns(part[lines.flatten()], inner).view(*lines.shape, i, i)
            self._write(matrix, l, l, piece.to(self.wide).transpose(1, 2), start)

    def _write_pair(self, matrix: Tensor, l: int, m: int) -> None:
        one, two = self.layers[l], self.layers[m]
        part = self.outer.pop((l, m)).to(self.wide)
        block = part.view(two.outputs, one.outputs, one.columns, two.columns)  # (q, o, i, j)
        block = block.permute(1, 2, 0, 3)  # (o, i, q, j)
        for key, view in (((l, m), block), ((m, l), block.permute(2, 3, 0, 1))):
            if key in self.inner:
                alive, values = self.inner.pop(key)
                at = view.permute(1, 2, 0, 3)[: len(alive)]  # (i, q, o, j)
                at[alive] += values.to(self.wide)
        self._write(matrix, l, m, block)
        matrix[two.places, one.places] = matrix[one.places, two.places].T

    def _write(self, matrix: Tensor, l: int, m: int, block: Tensor, first: int = 0) -> None:
        """Write a block (s, i, q, j) over n, whose rows begin with output `first` of layer l."""
        s, q = block.shape[0], block.shape[2]
        for row, i in self.layers[l].segments():
            width = i.stop - i.start
            lines = slice(row + first * width, row + (first + s) * width)
            for column, j in self.layers[m].segments():
                across = slice(column, column + q * (j.stop - j.start))
                place = matrix[lines, across].view(s, width, q, -1)
                torch.div(block[:, i, :, j], self.risk.n, out=place)


def take_columns(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index]; `torch.gather` is several times faster at it than indexing (torch 2.13)."""
    return torch.gather(x, 1, index.expand(len(x), -1))


def symmetric_product(moment: Tensor, a: Tensor, outer: Triangle, inner: Triangle) -> Tensor:
    """Σ_b M[b,o,q] a[b,i] a[b,j] for o ≥ q and i ≥ j, for M symmetric in o and q."""
    packed = take_columns(moment.flatten(1), outer.flat)  # (b, o·(o+1)/2)
    if a.shape[1] < 2 * packed.shape[1]:
        return packed.T @ (take_columns(a, inner.rows) * take_columns(a, inner.columns))
    return take_columns(triple_product(packed, a, a).flatten(1), inner.flat)


def triple_product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Σ_b x[b,k] y[b,i] z[b,j], (k, i, j), by way of the smallest of the three products of two."""
    k, i, j = x.shape[1], y.shape[1], z.shape[1]
    smallest = min(i * j, k * i, k * j)
    if smallest == i * j:
        return (x.T @ pairs(y, z)).view(k, i, j)
    if smallest == k * i:
        return (pairs(x, y).T @ z).view(k, i, j)
    return (pairs(x, z).T @ y).view(k, j, i).transpose(1, 2)


def pairs(y: Tensor, z: Tensor) -> Tensor:
    """y[b,i] z[b,j], (b, i·j)."""
    return (y[:, :, None] * z[:, None]).flatten(1)
