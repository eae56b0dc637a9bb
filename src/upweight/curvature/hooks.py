"""Hooks behind layers: what goes into them, and derivatives by what comes out.

Derivatives are taken where the output of a layer stands in the graph of autograd, so that none by
parameters are computed and, but where derivatives begin, nothing is added to the model.

Letters: b rows in a batch, k cotangents.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from upweight.curvature.inputs import Call, fits, form_of
from upweight.risk import EmpiricalRisk

__all__ = ["DeclinedCallError", "Hooks"]

# By which names layers are given their input.
ARGUMENTS = ("input", "x", "hidden_states")


class DeclinedCallError(Exception):
    """A layer is called in a way that does not tell its rows apart."""

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(reason)
        self.module, self.reason = module, reason


class Hooks:
    """Runs a model and keeps the calls of some of its layers.

    Parameters
    ----------
    risk
        Of the model.
    shared
        Modules that are called once for all rows, as embeddings of positions are. What they give is
        repeated for every row. It may be changed between runs.
    """

    def __init__(self, risk: EmpiricalRisk, shared: set[nn.Module]) -> None:
        self.risk = risk
        self.shared = shared
        self._calls: list[Call] | None = None
        self._rows = 0
        self._looking = False

    @contextmanager
    def installed(self, modules: Iterable[nn.Module]) -> Generator[None]:
        """Hooks directly behind the layers, before any of the user's, until the end."""
        with ExitStack() as stack:
            for module in dict.fromkeys(modules):
                handle = module.register_forward_hook(self._hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        a = args[0] if args else next((kwargs[n] for n in ARGUMENTS if n in kwargs), None)
        if not isinstance(a, Tensor) or not isinstance(output, Tensor):
            raise DeclinedCallError(module, "it is not called with one tensor")
        b, shape = self._rows, tuple(a.shape)
        if module in self.shared:
            if a.ndim == 0 or len(a) != 1:
                a, output = a[None], output[None]
            a, output = a.expand(b, *a.shape[1:]), output.expand(b, *output.shape[1:])
        if self._looking:
            self._keep(module, a, output)
            return output
        form = form_of(module)
        assert form is not None
        # (b·t, d) for the t positions of every row is taken, too
        if not fits(module, form, a) or a.shape[0] % b:
            raise DeclinedCallError(
                module, f"its input {shape} is not made of the batch's {b} rows"
            )
        a = a.detach()
        if not output.requires_grad:
            # nothing before it has derivatives: a zero lets them begin here
            start = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            output = output + start
        self._keep(module, a, output)
        return output

    def _keep(self, module: nn.Module, a: Tensor, output: Tensor) -> None:
        if self._calls is None:
            return  # a checkpoint runs a layer again for its derivatives
        # not the output itself: an operation in place would give it another place in the graph
        edge = get_gradient_edge(output) if output.requires_grad else None
        self._calls.append(Call(module, a, tuple(output.shape), edge))

    def run(self, theta: Mapping[str, Tensor], batch: Any, b: int) -> tuple[Tensor, list[Call]]:
        """The output (b, *o) and the calls of the layers, in order."""
        self._calls, self._rows = [], b
        try:
            with torch.enable_grad():
                output = self.risk.model(dict(theta), batch)
            return output, self._calls
        finally:
            self._calls = None

    def look(self, theta: Mapping[str, Tensor], batch: Any, b: int) -> tuple[Tensor, list[Call]]:
        """The same without a graph, and whatever the inputs of layers look like."""
        self._calls, self._rows, self._looking = [], b, True
        try:
            return self.risk.model(dict(theta), batch), self._calls
        finally:
            self._calls, self._looking = None, False

    def pull(
        self, output: Tensor, calls: Sequence[Call], cotangents: Tensor, *, last: bool = False
    ) -> list[Tensor]:
        """Uᵀ ∂output/∂z for k cotangents (k, b, *o): (k, *z) by the output z of every call.

        With `last`, the graph may be freed.
        """
        k = len(cotangents)
        edges = [call.edge for call in calls if call.edge is not None]
        found: list[Tensor | None] = [None for _ in edges]
        if output.requires_grad and edges:
            if k == 1:
                some = torch.autograd.grad(
                    output, edges, cotangents[0], retain_graph=not last, allow_unused=True
                )
                found = [None if g is None else g[None] for g in some]
            else:
                found = self._pulled(output, edges, cotangents)
        left = iter(found)
        slopes = [None if call.edge is None else next(left) for call in calls]
        return [
            zeros(call, k, output) if g is None else g
            for call, g in zip(calls, slopes, strict=True)
        ]

    def _pulled(self, output: Tensor, edges: Sequence[Any], u: Tensor) -> list[Tensor | None]:
        """Of several cotangents at once; None for those that the output does not depend on."""
        used: list[bool] = []

        def one(u: Tensor) -> list[Tensor]:
            some = torch.autograd.grad(output, edges, u, retain_graph=True, allow_unused=True)
            used[:] = [g is not None for g in some]
            return [*(g for g in some if g is not None), u]  # vmap wants something

        found = iter(self.risk.autodiff.rows(one, u, what="derivatives by outputs of layers"))
        return [next(found) if there else None for there in used]


def zeros(call: Call, k: int, output: Tensor) -> Tensor:
    """Derivatives (k, *z) by what the output does not depend on; they take no memory."""
    return torch.zeros((), dtype=output.dtype, device=output.device).expand(k, *call.shape)
