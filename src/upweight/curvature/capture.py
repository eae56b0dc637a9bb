"""Inputs of layers and derivatives by their outputs, for all rows and roots.

Derivatives are taken by the outputs of the layers alone, where they stand in the graph of autograd:
none by parameters are computed, nothing is added to the model and nothing copied. That Σ g ãᵀ is
the derivative by θ is tried on a few rows for every layer.

Letters: b rows in a chunk, K roots per row, k cotangents, s positions of a row in all calls of a
layer, q groups of a convolution, each with o outputs and i columns of ã.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upweight.curvature.form import OutputForm
from upweight.curvature.hooks import DeclinedCallError, Hooks, zeros
from upweight.curvature.inputs import Call
from upweight.curvature.onehot import OneHot, row_gradients
from upweight.curvature.sites import Site, find_sites
from upweight.risk import CHUNK_BYTES, Chunk, EmpiricalRisk

__all__ = ["Capture", "DeclinedCallError", "Piece", "find_capture"]

PROBED_ROWS = 8
# Cotangents of one row that are pulled back together, where the rows fill the memory.
ROOTS = 32
# At most so many rows are added up in the model's own precision.
SUMMED_ROWS = 8192
# How far g ãᵀ may be from the derivative by θ, by bytes of a number; float32 may mean TF32.
TOLERANCE = {2: 5e-2, 4: 2e-3, 8: 1e-9}


@dataclass(frozen=True)
class Piece:
    """A chunk of rows with some of its roots: ã (b, s, q, i) and g (k, b, s, q, o) per site.

    A site without a call has None, one of an embedding alone its tokens in place of ã. `first`
    marks the first piece with these ã; those of a mixed site are others in every piece. `active`
    marks positions (b, t) of the output that are no padding; None where the loss knows of none.
    """

    inputs: list[Tensor | OneHot | None]
    slopes: list[Tensor | None]
    first: bool
    active: Tensor | None = None

    def part(self, sites: slice) -> Piece:
        """Of some of the sites."""
        return Piece(self.inputs[sites], self.slopes[sites], self.first, self.active)


class Capture:
    """Runs the model and keeps what goes into the sites' modules, and where it comes out.

    Attributes
    ----------
    sites
        What is captured: `pieces` have a place for each.
    rests
        Sites without Kronecker factors; see `whole`.
    row_numbers
        How many numbers ã and g have for one row, (all s·q·i, all s·q·o), as the probe found.
    graph_bytes
        What the model keeps of one row until derivatives are taken.
    """

    def __init__(
        self, risk: EmpiricalRisk, sites: Sequence[Site], rests: Sequence[Site] = ()
    ) -> None:
        self.risk = risk
        self.sites = tuple(sites)
        self.rests = tuple(rests)
        self._numbers: dict[Site, tuple[int, int]] = {}
        self.graph_bytes = risk.activation_bytes
        self._shared: set[nn.Module] = set()
        self._hooks = Hooks(risk, self._shared)

    @property
    def row_numbers(self) -> tuple[int, int]:  # noqa: D102
        found = [self._numbers.get(site, (0, 0)) for site in self.sites]
        return sum(a for a, _ in found), sum(g for _, g in found)

    def _with(self, sites: Sequence[Site], rests: Sequence[Site]) -> Capture:
        other = copy.copy(self)
        other.sites, other.rests = tuple(sites), tuple(rests)
        return other

    def using(self, declined: DeclinedCallError) -> dict[Site, str]:
        """The sites that the declined module belongs to, with the reason."""
        every = (*self.sites, *self.rests)
        return {s: declined.reason for s in every if declined.module in s.modules}

    def without(self, failed: Mapping[Site, str]) -> tuple[Capture, dict[str, str]]:
        """A capture of the other sites, and the reason for each parameter of these."""
        kept = [[s for s in some if s not in failed] for some in (self.sites, self.rests)]
        names = {n: why for site, why in failed.items() for n in site.names if n is not None}
        return self._with(*kept), names

    def whole(self) -> Capture:
        """A capture of `sites` and then `rests`, all of them as sites."""
        return self._with((*self.sites, *self.rests), ())

    def over(self, risk: EmpiricalRisk) -> Capture:
        """The same sites on other rows, or with another loss, of the same model."""
        other = self._with(self.sites, self.rests)
        other.risk, other._hooks = risk, Hooks(risk, self._shared)
        return other

    # --- all rows --------------------------------------------------------------------------------

    def root_bytes(self) -> float:
        """What derivatives for one root of one row take, and what they come by."""
        return self.row_numbers[1] * self.risk.dtype.itemsize + self.graph_bytes / 2

    def row_bytes(self, roots: int) -> float:
        """What one row with so many roots takes while it is captured."""
        inputs, outputs = (count * self.risk.dtype.itemsize for count in self.row_numbers)
        graph, both = self.graph_bytes, inputs + min(inputs, self.graph_bytes)
        if roots == 1:  # whose graph is freed while it is walked
            return max(graph + outputs, both + outputs)
        budget = self.risk.memory.chunk(CHUNK_BYTES)
        together = max(1, min(roots, ROOTS, int(budget / (2 * self.root_bytes()))))
        return graph + both + together * self.root_bytes()

    def visit(self, form: OutputForm, add: Callable[[Piece], None]) -> None:
        """Call `add` with ã and g of all rows: once for each chunk and some of its roots S.

        Raises
        ------
        DeclinedCallError
            If rows go another way through the model than the probed ones.
        ValueError
            If an input or a derivative of a layer is not finite; the layer and the rows are named.
        """
        for _, piece in self.pieces(form):
            add(piece)
            del piece  # before the next is made

    def pieces(self, form: OutputForm, row_bytes: float = 0.0) -> Iterator[tuple[Chunk, Piece]]:
        """ã and g of all rows in order: a piece for each chunk and some of its roots S.

        `row_bytes` is what the caller makes of each row, to be counted with the memory of a chunk.
        """
        alone = form.root_count == 1
        budget = self.risk.memory.chunk(CHUNK_BYTES)
        per_root = self.root_bytes()
        own = self.row_bytes(form.root_count) - self.risk.activation_bytes  # which `chunks` adds
        for chunk in self.risk.chunks(max(row_bytes + own, budget / SUMMED_ROWS)):
            together = max(1, int(budget / (len(chunk) * per_root)))
            pending = self._pending(form, chunk, together)
            while True:
                # left before every yield: what the caller does meanwhile is not ours to switch
                with self._running(twice=not alone):
                    found = list(itertools.islice(pending, 1))
                if not found:
                    break
                yield chunk, found.pop()  # the caller alone has it, and may let it go

    def _pending(self, form: OutputForm, chunk: Chunk, together: int) -> Iterator[Piece]:
        b = len(chunk)
        output, calls = self._hooks.run(self.risk.model.parameters(), chunk.batch, b)
        roots = form.roots(chunk, output.detach()).transpose(0, 1)  # (K, b, *o)
        find = getattr(self.risk.loss, "active", None)
        active: Tensor | None = None if find is None else find(self.risk.target(chunk.batch))
        inputs: list[Tensor | OneHot | None] | None = None
        left = roots.shape[0]
        for some in roots.split(together):
            left -= len(some)
            pulled = self._hooks.pull(output, calls, some, last=left == 0)
            if left == 0:
                output = output.detach()  # lets the graph go
            first = inputs is None
            inputs = self._extended(calls, b) if inputs is None else inputs
            own, slopes = self._joined(calls, pulled, b, inputs)
            del pulled
            self._check_finite(chunk, own if first else [], slopes)
            found = [Piece(own, slopes, first, active)]
            del own, slopes
            if left == 0:
                calls, inputs = [], []
            yield found.pop()

    def _installed(self) -> AbstractContextManager[None]:
        return self._hooks.installed(m for site in self.sites for m in site.modules)

    @contextmanager
    def _running(self, *, twice: bool) -> Generator[None]:
        model = self.risk.model
        learned = [p for p in model.model.parameters() if p.requires_grad]
        with model.evaluating(twice=twice), self._installed():
            try:
                # what a checkpoint runs again is run with these, and must keep no more than before
                for parameter in learned:
                    parameter.requires_grad_(False)
                yield
            finally:
                for parameter in learned:
                    parameter.requires_grad_(True)

    def _extended(self, calls: Sequence[Call], b: int) -> list[Tensor | OneHot | None]:
        """ã of every site; None for those without a call and for mixed ones."""
        found: list[Tensor | OneHot | None] = []
        for site in self.sites:
            own = [call for call in calls if call.module in site.modules]
            usable = bool(own) and not site.mixed
            found.append(site.extended(own, b, self.risk.dtype) if usable else None)
        return found

    def _joined(
        self,
        calls: Sequence[Call],
        pulled: Sequence[Tensor],
        b: int,
        inputs: Sequence[Tensor | OneHot | None],
    ) -> tuple[list[Tensor | OneHot | None], list[Tensor | None]]:
        """ã and g of every site."""
        found: list[Tensor | OneHot | None] = []
        slopes: list[Tensor | None] = []
        for site, a in zip(self.sites, inputs, strict=True):
            own = [at for at, call in enumerate(calls) if call.module in site.modules]
            some, grads = [calls[at] for at in own], [pulled[at] for at in own]
            g: Tensor | None = None
            if own and site.mixed:
                a, g = site.both(some, grads, b, self.risk.dtype)
            elif own:
                g = site.slopes(some, grads, b, self.risk.dtype)
            found.append(a)
            slopes.append(g)
        return found, slopes

    def _check_finite(
        self,
        chunk: Chunk,
        inputs: Sequence[Tensor | OneHot | None],
        slopes: Sequence[Tensor | None],
    ) -> None:
        """Refuse what is not finite, by one sum over each tensor and one look at all of them."""
        every = [("inputs", at, x, 0) for at, x in enumerate(inputs)]
        every += [("derivatives", at, x, 1) for at, x in enumerate(slopes)]
        tensors = [(w, at, x, dim) for w, at, x, dim in every if isinstance(x, Tensor)]
        if not tensors:
            return
        sums = torch.stack([x.sum() for _, _, x, _ in tensors])
        if bool(torch.isfinite(sums).all()):
            return
        for what, at, x, dim in tensors:
            bad = (~torch.isfinite(x)).movedim(dim, 0).flatten(1).any(1).nonzero().flatten()
            if len(bad):  # a sum may overflow where all of its terms are finite
                rows = ", ".join(str(chunk.start + int(row)) for row in bad[:3])
                raise ValueError(
                    f"{what} of layer {self.sites[at].name} are not finite (NaN or inf) in "
                    f"{len(bad)} of the rows {chunk.start} to {chunk.stop - 1}, first in row "
                    f"{rows}. Look at these rows; if they are in order, numbers overflow in "
                    f"{self.risk.model.dtype}: use a model in float32 or float64"
                )

    # --- the probe -------------------------------------------------------------------------------

    def probe(self) -> dict[Site, str]:
        """Sites for which Σ g ãᵀ is not the derivative by θ, each with the reason.

        A cotangent that is random in one row and zero in the others is pulled back to θ itself, as
        well as to the outputs of layers, one row after the other. One that came from the loss would
        say nothing where a row is fitted exactly.
        """
        n = self.risk.n
        each = 2 * self.risk.activation_bytes + 8 * torch.Size(self.risk.output_shape).numel()
        b = min(n, max(2, min(PROBED_ROWS, int(self.risk.memory.chunk(CHUNK_BYTES) / each))))
        spread = [at * (n - 1) // max(1, b - 1) for at in range(b)]
        few = self.risk.with_rows(self.risk.rows.subset(spread))
        few.batch_size = None  # one row alone would not show how rows are laid out
        batch, b = (chunk := next(iter(few.chunks()))).batch, len(chunk)
        with self.risk.model.evaluating():
            with self._installed():
                declined = self._look(few, batch, b)
            failed = {s: declined[m] for s in self.sites for m in s.modules if m in declined}
            others, _ = self.without(failed)
            with others._installed():
                return failed | others._compared(batch, b)

    def weigh(self) -> float:
        """`graph_bytes`, by a few rows; no parameter has a derivative there."""
        few = self.risk.with_rows(self.risk.rows.subset(range(min(PROBED_ROWS, self.risk.n))))
        few.batch_size = None
        chunk = next(iter(few.chunks()))
        model, kept = self.risk.model, dict[int, int]()
        held: list[Tensor] = []  # so that no other tensor comes to lie in the same place

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            size = min(tensor.nbytes, storage.nbytes())  # a view of all rows, or of repeated ones
            kept[storage.data_ptr()] = max(size, kept.get(storage.data_ptr(), 0))
            held.append(tensor)
            return tensor

        with self._running(twice=False), torch.autograd.graph.saved_tensors_hooks(pack, _same):
            output, calls = self._hooks.run(model.parameters(), chunk.batch, len(chunk))
        for call in calls:
            pack(call.a)
        for own in (*model.model.parameters(), *model.model.buffers()):
            kept.pop(own.untyped_storage().data_ptr(), None)
        return float(sum(kept.values()) + 4 * output.nbytes) / len(chunk)

    def _look(self, few: EmpiricalRisk, batch: Any, b: int) -> dict[nn.Module, str]:
        """See which layers are called once for all rows, and which of them that does not suit.

        Those are the ones whose input is as long for one row as for several. Their outputs are
        repeated for every row, if the model takes it so.
        """
        shared = self._shared
        shared.clear()
        theta = self.risk.model.parameters()
        one = next(iter(few.with_rows(few.rows.subset([0])).chunks())).batch
        output, several = self._hooks.look(theta, batch, b)
        _, single = self._hooks.look(theta, one, 1)
        candidates: list[nn.Module] = []
        declined: dict[nn.Module, str] = {}
        for module in dict.fromkeys(call.module for call in several):
            lengths = [[c.a.shape[:1] for c in x if c.module is module] for x in (several, single)]
            if b > 1 and lengths[0] == lengths[1]:
                candidates.append(module)
            elif b == 1 and any(c.module is module and c.a.ndim == 1 < len(c.a) for c in several):
                declined[module] = "a single row does not tell what its input is made of"
        for module in candidates:
            shared.add(module)
            try:
                fits = self._hooks.look(theta, batch, b)[0].shape == output.shape
            except RuntimeError:
                fits = False
            shared.clear()
            if not fits:
                declined[module] = "its input has no dimension for the rows of a batch"
        shared.update(module for module in candidates if module not in declined)
        return declined

    def _compared(self, batch: Any, b: int) -> dict[Site, str]:
        theta = self.risk.model.parameters()
        names = [name for site in self.sites for name in site.names if name is not None]
        leaves = {name: theta[name].detach().requires_grad_() for name in names}
        output, calls = self._hooks.run({**theta, **leaves}, batch, b)
        inputs = self._extended(calls, b)
        signs = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        sums = [_Sums() for _ in self.sites]
        every: Any = [*leaves.values(), *(call.edge for call in calls if call.edge is not None)]
        for row in range(b if output.requires_grad else 0):
            u = torch.zeros_like(output)
            u[row] = signs[row]
            pulled: Sequence[Tensor | None] = torch.autograd.grad(
                output, every, u, retain_graph=True, allow_unused=True
            )
            by_name = {
                name: (torch.zeros_like(leaf) if g is None else g)[None]
                for (name, leaf), g in zip(leaves.items(), pulled, strict=False)
            }
            left = iter(pulled[len(leaves) :])
            found = [None if call.edge is None else next(left) for call in calls]
            filled = [
                zeros(call, 1, output) if g is None else g[None]
                for call, g in zip(calls, found, strict=True)
            ]
            joined = self._joined(calls, filled, b, inputs)
            for site, a, g, own in zip(self.sites, *joined, sums, strict=True):
                if a is not None and g is not None:
                    own.add(site, by_name, a[row : row + 1], g[:, row : row + 1])
        return self._failed(sums)

    def _failed(self, sums: Sequence[_Sums]) -> dict[Site, str]:
        failed: dict[Site, str] = {}
        tolerance = TOLERANCE.get(self.risk.model.dtype.itemsize, 5e-2)
        total = math.sqrt(sum(own.wanted for own in sums))
        for site, own in zip(self.sites, sums, strict=True):
            allowed = max(math.sqrt(own.wanted), 1e-2 * own.scale, 1e-3 * total)
            if not own.called:
                failed[site] = "it is not called where it is used, so no hook sees its inputs"
            elif math.sqrt(own.error) <= tolerance * allowed:
                self._numbers[site] = own.numbers
            else:
                failed[site] = "what its calls see does not add up to its derivative"
        return failed


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class _Sums:
    """How far Σ g ãᵀ of the probed rows is from the derivative by θ, for one site."""

    called: bool = False
    error: float = 0.0
    wanted: float = 0.0
    scale: float = 0.0
    numbers: tuple[int, int] = (0, 0)

    def add(self, site: Site, by_name: Mapping[str, Tensor], a: Tensor | OneHot, g: Tensor) -> None:
        """Add ã (1, s, q, i) and g (1, 1, s, q, o) of a row."""
        got = row_gradients(a, g)[0]  # (1, q, o, i)
        wanted = site.join(by_name).to(got.dtype)
        tokens = isinstance(a, OneHot)
        # not relative to the sum over positions, which may cancel to round-off
        lengths = g[0].double().norm(dim=3)
        lengths = lengths if tokens else lengths * a.double().norm(dim=3)
        self.called = True
        self.error += float((got - wanted).double().square().sum())
        self.wanted += float(wanted.double().square().sum())
        self.scale += float(lengths.sum())
        self.numbers = (a.ids.numel() if tokens else a.numel(), g.numel())


def find_capture(risk: EmpiricalRisk) -> tuple[Capture, dict[str, str]]:
    """The sites that passed the probe, and why all other parameters have no Kronecker factors.

    Returns
    -------
    capture, reasons
        Parameters with a reason that are in no site of ``capture.rests`` are seen by no hook.
    """
    found = find_sites(risk)
    capture = Capture(risk, found.factored, found.rests)
    reasons, tried = found.reasons, False
    while (capture.sites or capture.rests) and not tried:
        every = capture.whole()
        try:
            failed, tried = every.probe(), True
        except DeclinedCallError as declined:
            failed = every.using(declined)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            some = capture.rests or capture.sites
            failed = dict.fromkeys(some, f"its inputs cannot be captured: {error}")
        capture, more = capture.without(failed)
        for name, why in more.items():
            reasons[name] = f"{reasons[name]}, and {why}" if name in reasons else why
    if capture.sites or capture.rests:
        try:
            capture.graph_bytes = capture.whole().weigh()
        except DeclinedCallError:  # these rows are not the probed ones: the pass will tell of it
            capture.graph_bytes = risk.activation_bytes
    return capture, reasons
