"""What goes into linear layers, and what their outputs do to the loss.

A zero δ_h is added to the output of every layer, z_h = W_h a_h + c_h + δ_h. All that θ_h does, it
does through z_h, so with ã_h = [a_h, 1] the derivatives by θ follow from those by δ, row by row.

Letters: b rows in a chunk, layer h with o outputs and i columns of ã, D = Σ o_h, p parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from upweight.risk import Chunk, EmpiricalRisk

__all__ = ["DeclinedError", "Layer", "Taps", "find_taps", "jacobian_rows", "row_gradients"]

# Cotangents that go through a chunk together stay below this many bytes, unless those of one layer
# alone need more.
COTANGENT_BYTES = 64 * 2**20
PROBED_ROWS = 8


class DeclinedError(Exception):
    """A layer is not used exactly once for every row, or θ is used elsewhere."""


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

    @property
    def segments(self) -> list[tuple[int, slice]]:
        """Where in θ, in the order (o, columns), which columns of ã begin."""
        found: list[tuple[int, slice]] = []
        if self.weight is not None:
            found.append((self.weight, slice(0, self.inputs)))
        if self.bias is not None:
            found.append((self.bias, slice(self.inputs, self.columns)))
        return found

    @property
    def entries(self) -> slice:
        """The entries of θ: a module's parameters are next to each other."""
        start = min(start for start, _ in self.segments)
        return slice(start, start + self.outputs * self.columns)

    def extend(self, a: Tensor) -> Tensor:
        """ã (b, i) for inputs a: [a, 1], or what of it belongs to chosen parameters."""
        parts = [] if self.weight is None else [a]
        parts += [] if self.bias is None else [torch.ones_like(a[:, :1])]
        return torch.cat(parts, dim=1)


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
        if type(module) is not nn.Linear or "forward" in vars(module):
            return None
        if others or attribute not in ("weight", "bias"):
            return None
        starts.setdefault(module, {})[attribute] = start
        start += size
    if any(dtype != risk.dtype for dtype in risk.model.dtypes):
        return None
    return [Layer(module, at.get("weight"), at.get("bias")) for module, at in starts.items()]


def find_taps(risk: EmpiricalRisk) -> Taps | None:
    """Taps that were tried on a few rows; None where θ does not act through linear layers alone."""
    layers = find_layers(risk)
    if layers is None:
        return None
    try:
        with risk.model.evaluating():
            taps = Taps(risk, layers)
            with taps.installed():
                taps.probe()
            return taps
    except torch.OutOfMemoryError:
        raise
    except (DeclinedError, RuntimeError, NotImplementedError):
        return None


class Taps:
    """The model as a function of δ, which is added to the outputs (b, o) of the layers.

    Attributes
    ----------
    moving
        The layers whose weights are chosen and whose inputs depend on δ.
    outputs, inputs
        D, and the number of inputs of those layers.
    """

    def __init__(self, risk: EmpiricalRisk, layers: Sequence[Layer]) -> None:
        self.risk = risk
        self.layers = tuple(layers)
        self.sizes = [layer.outputs for layer in layers]
        self.outputs = sum(self.sizes)
        self.moving: list[int] = []
        self.inputs = 0
        self._theta = risk.model.parameters()
        self._shifts: Sequence[Tensor] | None = None
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._cut = False

    @contextmanager
    def installed(self) -> Generator[None]:
        """Hooks directly behind the layers, before any of the user's, until the end."""
        with ExitStack() as stack:
            for h, layer in enumerate(self.layers):
                hook = self._hook(h)
                handle = layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def attempt(self, function: Callable[[Taps], Tensor]) -> Tensor | None:
        """What a function makes of the taps; None if rows take another way than the probed ones."""
        try:
            with self.installed():
                return function(self)
        except DeclinedError:
            return None

    def _hook(self, h: int) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if self._shifts is None:
                return None
            a, shift = (args[0] if args else kwargs["input"]), self._shifts[h]
            if h in self._seen or a.ndim != 2 or output.shape != shift.shape:
                raise DeclinedError
            self._seen[h] = (a, output)
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
            return output, [self._seen[h] for h in range(len(self.layers))]
        finally:
            self._shifts, self._seen, self._cut = None, {}, False

    def extend(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """ã (b, i) for the inputs of the layers."""
        return [layer.extend(a.detach()) for layer, a in zip(self.layers, inputs, strict=True)]

    def shifts(self, b: int) -> list[Tensor]:
        """δ = 0 for b rows, to differentiate by."""
        whole = torch.zeros(b, self.outputs, dtype=self.risk.dtype, device=self.risk.device)
        return [part.detach().requires_grad_() for part in whole.split(self.sizes, dim=1)]

    def units(self, tensors: Sequence[Tensor]) -> Iterator[tuple[range, list[Tensor]]]:
        """Unit vectors for the columns of tensors (b, s), the same in all rows.

        Yields the indices of some of the tensors, and for every tensor (k, b, s) with k their Σ s.
        """
        b, sizes = len(tensors[0]), [tensor.shape[1] for tensor in tensors]
        together = self.risk.memory.chunk(COTANGENT_BYTES) / (b * self.risk.activation_bytes)
        identity = torch.eye(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
        for group in groups(sizes, together):
            start = sum(sizes[: group.start])
            block = identity[start : start + sum(sizes[index] for index in group)]
            yield group, [e[:, None].expand(-1, b, -1) for e in block.split(sizes, dim=1)]

    def pullback(
        self, values: Sequence[Tensor], shifts: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> list[Tensor]:
        """Σ uᵀ ∂values/∂δ for k cotangents u (k, …): per layer (k, b, o)."""
        used = [at for at, value in enumerate(values) if value.requires_grad]
        reached = [values[at] for at in used]

        def pull(u: Sequence[Tensor]) -> list[Tensor]:
            if not used:
                return [torch.zeros_like(shift) for shift in shifts]
            some = [u[at] for at in used]
            found = torch.autograd.grad(
                reached, shifts, some, retain_graph=True, materialize_grads=True
            )
            return list(found)

        return self.risk.autodiff.rows(pull, cotangents, what="transposed products")

    def probe(self) -> None:
        """Try a few rows: θ must act through the layers only, and rows must keep their places."""
        few = self.risk.with_rows(self.risk.rows.subset(range(min(PROBED_ROWS, self.risk.n))))
        chunk = next(iter(few.chunks()))
        half, shifts = len(chunk) // 2, self.shifts(len(chunk))
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in self._theta.items()}
            fixed = [shift.detach() for shift in shifts]
            output, seen = self._run(leaves, fixed, chunk.batch, cut=True)
        if output.requires_grad or any(a.requires_grad for a, _ in seen):
            raise DeclinedError
        for layer, (a, z) in zip(self.layers, seen, strict=True):
            if not torch.equal(z, F.linear(a, layer.module.weight, layer.module.bias)):
                raise DeclinedError
        for shift in shifts:
            shift[:half] = 1.0
        with torch.enable_grad():
            moved, seen_again = self._run(self._theta, shifts, chunk.batch)
        before, after = [output, *(a for a, _ in seen)], [moved, *(a for a, _ in seen_again)]
        for one, two in zip(before, after, strict=True):
            if not torch.equal(one[half:], two[half:]):
                raise DeclinedError
        depends = [a.requires_grad for a, _ in seen_again]
        self.moving = [h for h, layer in enumerate(self.layers) if depends[h] and layer.inputs]
        self.inputs = sum(self.layers[h].inputs for h in self.moving)


def row_gradients(taps: Taps, chunk: Chunk) -> Tensor:
    """∂ℓ/∂θ_h[o,i] = g_h[o] ã_h[i] for every row of a chunk, (b, p), with g = ∂ℓ/∂δ.

    Raises
    ------
    DeclinedError
        If these rows go another way through the model than the probed ones.
    """
    with torch.enable_grad():
        shifts = taps.shifts(len(chunk))
        output, inputs = taps(shifts, chunk.batch)
        loss = taps.risk.row_loss(output, taps.risk.target(chunk.batch)).sum()
    slopes = torch.autograd.grad(loss, shifts, materialize_grads=True)
    return _by_parameters(taps, [g[:, None] for g in slopes], inputs)[:, 0]


def jacobian_rows(taps: Taps, chunk: Chunk, roots: Callable[[Chunk, Tensor], Tensor]) -> Tensor:
    """SᵀJ for every row of a chunk, (b, K, p), with S (b, K, *o) for the chunk and its output.

    Raises
    ------
    DeclinedError
        If these rows go another way through the model than the probed ones.
    """
    with torch.enable_grad():
        shifts = taps.shifts(len(chunk))
        output, inputs = taps(shifts, chunk.batch)
    cotangents = roots(chunk, output.detach()).transpose(0, 1)
    pulled = taps.pullback([output], shifts, [cotangents])  # per layer (K, b, o)
    return _by_parameters(taps, [u.transpose(0, 1) for u in pulled], inputs)


def _by_parameters(taps: Taps, by_shift: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Derivatives by θ, (b, K, p), from those by δ, per layer (b, K, o)."""
    b, k = by_shift[0].shape[:2]
    rows = by_shift[0].new_empty(b, k, taps.risk.p)
    for layer, u, a in zip(taps.layers, by_shift, taps.extend(inputs), strict=True):
        for start, columns in layer.segments:
            part = a[:, None, None, columns]  # (b, 1, 1, i)
            place = rows[..., start : start + layer.outputs * part.shape[-1]]
            torch.mul(u[..., None], part, out=place.unflatten(-1, (layer.outputs, -1)))
    return rows


def groups(sizes: Sequence[int], most: float) -> Iterator[range]:
    """Consecutive indices whose sizes add up to no more than `most`, or one alone."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > most:
            yield range(start, index)
            start, total = index, 0
        total += size
    yield range(start, len(sizes))
