"""Inputs of layers and derivatives by their outputs, for all rows and roots.

A zero δ is added to the output of every call of a layer, z = W ã + δ, and derivatives are taken by
δ alone. That Σ g ãᵀ is the derivative by θ is tried on a few rows for every layer.

Letters: b rows in a chunk, K roots per row, k cotangents, s positions of a row in all calls of a
layer, q groups of a convolution, each with o outputs and i columns of ã.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upweight.curvature.form import OutputForm
from upweight.curvature.sites import Call, Layer, Site, find_sites
from upweight.risk import CHUNK_BYTES, Chunk, EmpiricalRisk

__all__ = ["Capture", "DeclinedCallError", "Piece", "find_capture"]

PROBED_ROWS = 8
# Cotangents of one row that are pulled back together, where the rows fill the memory.
ROOTS = 32
# At most so many rows are added up in the model's own precision.
SUMMED_ROWS = 8192
# How far g ãᵀ may be from the derivative by θ, by bytes of a number; float32 may mean TF32.
TOLERANCE = {2: 5e-2, 4: 2e-3, 8: 1e-9}


class DeclinedCallError(Exception):
    """A layer is called in a way that does not tell its rows apart."""

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(reason)
        self.module, self.reason = module, reason


@dataclass(frozen=True)
class Piece:
    """A chunk of rows with some of its roots: ã (b, s, q, i) and g (k, b, s, q, o) per site.

    A site without a call has None. `first` marks the first piece with these ã.
    """

    inputs: list[Tensor | None]
    slopes: list[Tensor | None]
    first: bool


class Capture:
    """Runs the model with a zero δ behind every call of the sites' modules.

    Attributes
    ----------
    sites
        What is captured.
    row_numbers
        How many numbers ã and g have for one row, (all s·q·i, all s·q·o), as the probe found.
    """

    def __init__(self, risk: EmpiricalRisk, sites: Sequence[Site]) -> None:
        self.risk = risk
        self.sites = tuple(sites)
        self.row_numbers = (0, 0)
        self._calls: list[Call] | None = None
        self._rows = 0

    def using(self, declined: DeclinedCallError) -> dict[Site, str]:
        """The sites that the declined module belongs to, with the reason."""
        return {s: declined.reason for s in self.sites if declined.module in s.modules}

    def without(self, failed: Mapping[Site, str]) -> tuple[Capture, dict[str, str]]:
        """A capture of the other sites, and the reason for each parameter of these."""
        other = Capture(self.risk, [site for site in self.sites if site not in failed])
        other.row_numbers = self.row_numbers
        names = {n: why for site, why in failed.items() for n in site.names if n is not None}
        return other, names

    @contextmanager
    def installed(self) -> Generator[None]:
        """Hooks directly behind the layers, before any of the user's, until the end."""
        with ExitStack() as stack:
            for module in dict.fromkeys(m for site in self.sites for m in site.modules):
                handle = module.register_forward_hook(self._hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _hook(self, module: Layer, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        if self._calls is None:
            return None
        a = args[0] if args else kwargs.get("input")
        if not isinstance(a, Tensor) or not isinstance(output, Tensor):
            raise DeclinedCallError(module, "it is not called with one tensor")
        linear = isinstance(module, nn.Linear)
        fits = a.ndim > 1 if linear else a.ndim == 2 + len(module.kernel_size)
        # (b·t, d) for the t positions of every row is taken, too
        if not fits or a.shape[0] % self._rows:
            raise DeclinedCallError(
                module, f"its input {tuple(a.shape)} is not made of the batch's {self._rows} rows"
            )
        # made here, so that a layer may be called several times and with any shape
        shift = torch.zeros_like(output, requires_grad=True)
        self._calls.append(Call(module, a.detach(), shift))
        return output + shift

    def run(self, theta: Mapping[str, Tensor], batch: Any, b: int) -> tuple[Tensor, list[Call]]:
        """The output (b, *o) and the calls of the layers, in order."""
        self._calls, self._rows = [], b
        try:
            with torch.enable_grad():
                output = self.risk.model(dict(theta), batch)
            return output, self._calls
        finally:
            self._calls = None

    def pull(
        self, output: Tensor, leaves: Sequence[Tensor], cotangents: Tensor, what: str
    ) -> list[Tensor]:
        """Uᵀ ∂output/∂leaf for k cotangents (k, b, *o): per leaf (k, …)."""
        if not output.requires_grad or not leaves:
            return [leaf.new_zeros(len(cotangents), *leaf.shape) for leaf in leaves]

        def one(u: Tensor) -> list[Tensor]:
            found = torch.autograd.grad(
                output, leaves, u, retain_graph=True, materialize_grads=True
            )
            return list(found)

        return self.risk.autodiff.rows(one, cotangents, what=what)

    def over(self, risk: EmpiricalRisk) -> Capture:
        """The same sites on other rows, or with another loss, of the same model."""
        other = Capture(risk, self.sites)
        other.row_numbers = self.row_numbers
        return other

    def visit(self, form: OutputForm, add: Callable[[Piece], None]) -> None:
        """Call `add` with ã and g of all rows: once for each chunk and some of its roots S.

        Raises
        ------
        DeclinedCallError
            If rows go another way through the model than the probed ones.
        """
        for _, piece in self.pieces(form):
            add(piece)

    def pieces(self, form: OutputForm, row_bytes: float = 0.0) -> Iterator[tuple[Chunk, Piece]]:
        """ã and g of all rows in order: a piece for each chunk and some of its roots S.

        `row_bytes` is what the caller makes of each row, to be counted with the memory of a chunk.
        """
        size, (inputs, outputs) = self.risk.dtype.itemsize, self.row_numbers
        per_root = 2 * outputs * size + self.risk.activation_bytes
        own = 2 * inputs * size + min(form.root_count, ROOTS) * per_root
        theta = self.risk.model.parameters()
        for chunk in self.risk.chunks(max(row_bytes + own, CHUNK_BYTES / SUMMED_ROWS)):
            # left before every yield: what the caller does meanwhile is not ours to switch
            with self._running():
                output, calls = self.run(theta, chunk.batch, len(chunk))
                roots = form.roots(chunk, output.detach()).transpose(0, 1)  # (K, b, *o)
                extended = self._extended(calls, len(chunk))
            shifts = [call.shift for call in calls]
            together = max(1, int(CHUNK_BYTES / (len(chunk) * per_root)))
            for at, some in enumerate(roots.split(together)):
                with self._running():
                    pulled = self.pull(output, shifts, some, "derivatives by outputs of layers")
                    piece = Piece(extended, self._slopes(calls, pulled, len(chunk)), at == 0)
                yield chunk, piece

    @contextmanager
    def _running(self) -> Generator[None]:
        with self.risk.model.evaluating(), self.installed():
            yield

    def _extended(self, calls: Sequence[Call], b: int) -> list[Tensor | None]:
        own = [[call for call in calls if call.module in site.modules] for site in self.sites]
        return [
            site.extended(some, b, self.risk.dtype) if some else None
            for site, some in zip(self.sites, own, strict=True)
        ]

    def _slopes(
        self, calls: Sequence[Call], pulled: Sequence[Tensor], b: int
    ) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for site in self.sites:
            own = [at for at, call in enumerate(calls) if call.module in site.modules]
            some, grads = [calls[at] for at in own], [pulled[at] for at in own]
            found.append(site.slopes(some, grads, b).to(self.risk.dtype) if own else None)
        return found

    # --- the probe -------------------------------------------------------------------------------

    def probe(self) -> dict[Site, str]:
        """Sites for which Σ g ãᵀ is not the derivative by θ, each with the reason.

        A cotangent that is random in one row and zero in the others is pulled back to θ itself, as
        well as to δ. One that came from the loss would say nothing where a row is fitted exactly.
        """
        n, p = self.risk.n, sum(site.size for site in self.sites)
        each = 2 * self.risk.activation_bytes + 8 * torch.Size(self.risk.output_shape).numel()
        fitting = min(CHUNK_BYTES / (16 * p), (CHUNK_BYTES / each) ** 0.5)
        b = min(n, max(2, min(PROBED_ROWS, int(fitting))))
        spread = [at * (n - 1) // max(1, b - 1) for at in range(b)]
        few = self.risk.with_rows(self.risk.rows.subset(spread))
        few.batch_size = None  # one row alone would not show how rows are laid out
        batch, b = (chunk := next(iter(few.chunks()))).batch, len(chunk)
        theta = self.risk.model.parameters()
        names = [name for site in self.sites for name in site.names if name is not None]
        leaves = {name: theta[name].detach().requires_grad_() for name in names}
        with self.risk.model.evaluating(), self.installed():
            output, calls = self.run({**theta, **leaves}, batch, b)
            signs = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
            u = torch.zeros(b, *output.shape, dtype=output.dtype, device=output.device)
            u[range(b), range(b)] = signs.to(output)
            shifts = [call.shift for call in calls]
            wanted = [*leaves.values(), *shifts]
            pulled = self.pull(output, wanted, u, "derivatives by θ and by outputs of layers")
            by_name = dict(zip(names, pulled, strict=False))
            slopes = self._slopes(calls, pulled[len(names) :], b)
            return self._failed(by_name, self._extended(calls, b), slopes, b)

    def _failed(
        self,
        by_name: Mapping[str, Tensor],
        inputs: Sequence[Tensor | None],
        slopes: Sequence[Tensor | None],
        b: int,
    ) -> dict[Site, str]:
        failed: dict[Site, str] = {}
        tolerance = TOLERANCE.get(self.risk.model.dtype.itemsize, 5e-2)
        total = math.sqrt(sum(float(part.double().square().sum()) for part in by_name.values()))
        numbers = [0, 0]
        for site, a, g in zip(self.sites, inputs, slopes, strict=True):
            if a is None or g is None:
                failed[site] = "it is not called where it is used, so no hook sees its inputs"
                continue
            own = g[range(b), range(b)]  # (b, s, q, o): row k of cotangent k
            got = torch.einsum("bsqo,bsqi->bqoi", own, a)
            wanted = site.join(by_name).to(got.dtype)
            # not relative to the sum over positions, which may cancel to round-off
            scale = torch.linalg.vector_norm(own, dim=3) * torch.linalg.vector_norm(a, dim=3)
            allowed = max(float(wanted.norm()), 1e-2 * float(scale.sum()), 1e-3 * total)
            if float((got - wanted).norm()) <= tolerance * allowed:
                numbers = [numbers[0] + a[0].numel(), numbers[1] + g[0, 0].numel()]
            else:
                failed[site] = "what its calls see does not add up to its derivative"
        self.row_numbers = (numbers[0], numbers[1])
        return failed


def find_capture(risk: EmpiricalRisk) -> tuple[Capture, dict[str, str]]:
    """The sites that passed the probe, and for the other parameters of θ the reason."""
    sites, reasons = find_sites(risk)
    capture, tried = Capture(risk, sites), False
    while capture.sites and not tried:
        try:
            failed, tried = capture.probe(), True
        except DeclinedCallError as declined:
            failed = capture.using(declined)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            failed = dict.fromkeys(capture.sites, f"its inputs cannot be captured: {error}")
        capture, more = capture.without(failed)
        reasons |= more
    return capture, reasons
