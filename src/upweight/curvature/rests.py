"""Parameters without Kronecker factors, by the modules that own them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upweight.curvature.onehot import OneHot
from upweight.curvature.rotated import Kind
from upweight.curvature.sites import Site
from upweight.risk import EmpiricalRisk

__all__ = ["CHOOSE", "Rest", "RestGradients", "RestSums", "find_rests", "seen_first"]

# Up to so many in one module get a dense block.
DENSE_SIZE = 512

CHOOSE = "leave them out with parameters=, or use curvature='ggn' with a solver"


@dataclass(frozen=True)
class Rest:
    """Parameters of one module that have no Kronecker factors, with their block and the reason."""

    name: str
    type: str
    names: tuple[str, ...]
    size: int
    kind: Kind
    reason: str
    told: str

    @property
    def note(self) -> str:
        """What the parameters get instead, in words."""
        if self.kind == "dense":
            return f"{self.told}. They have an exact dense block of their own"
        return (
            f"{self.told}. They have the exact diagonal alone; pass other='dense' for the whole "
            f"block, {CHOOSE}"
        )

    def seen(self, sites: Sequence[Site]) -> list[int] | None:
        """Which of these sites hold the parameters, all of them; None where hooks miss some."""
        own = [at for at, site in enumerate(sites) if set(self.names) & set(site.names)]
        names = {name for at in own for name in sites[at].names if name is not None}
        return own if names == set(self.names) else None

    def places(self, risk: EmpiricalRisk) -> Tensor:
        """The entries that they have among the parameters of a risk, in order."""
        parts: list[Tensor] = []
        start = 0
        for name, size in zip(risk.model.names, risk.model.sizes, strict=True):
            if name in self.names:
                parts.append(torch.arange(start, start + size))
            start += size
        return torch.cat(parts)


def find_rests(risk: EmpiricalRisk, reasons: Mapping[str, str], other: str) -> list[Rest]:
    """The modules of all parameters that have a reason, with the block that each gets."""
    owned: dict[str, list[str]] = {}
    for name in risk.model.names:
        if name in reasons:
            owned.setdefault(name.rpartition(".")[0], []).append(name)
    sizes = dict(zip(risk.model.names, risk.model.sizes, strict=True))
    found: list[Rest] = []
    for owner, names in owned.items():
        kind = type(risk.model.model.get_submodule(owner)).__name__
        size = sum(sizes[name] for name in names)
        small = size <= DENSE_SIZE if other == "auto" else other == "dense"
        reason = "; ".join(dict.fromkeys(reasons[name] for name in names))
        local = ", ".join(name.rpartition(".")[2] for name in names)
        told = (
            f"{owner or kind} ({kind}): {local}, {size} of {risk.p} parameters, have no Kronecker "
            f"factors: {reason}"
        )
        if other == "refuse":
            raise ValueError(f"{told}. Pass other='auto' for an exact block of their own, {CHOOSE}")
        block: Kind = "dense" if small else "diagonal"
        found.append(Rest(owner or kind, kind, tuple(names), size, block, reason, told))
    return found


def seen_first(rests: Sequence[Rest], sites: Sequence[Site]) -> list[Rest]:
    """Those that hooks see at these sites, then the others."""
    return sorted(rests, key=lambda rest: rest.seen(sites) is None)


class RestGradients:
    """Gradients by the parameters of a module, (…, size), from what hooks see of its sites.

    Parameters
    ----------
    rest
        The module.
    risk
        Of all parameters.
    sites
        Those of the capture without Kronecker factors.
    own
        Which of them hold the parameters.
    """

    def __init__(
        self, rest: Rest, risk: EmpiricalRisk, sites: Sequence[Site], own: Sequence[int]
    ) -> None:
        self.size = rest.size
        self.own = tuple(own)
        places = rest.places(risk)
        # θ has the parameters of a module in order, but there may be others between them
        self._at = [torch.searchsorted(places, sites[at].entries.sort().values) for at in own]
        self._sites = [sites[at] for at in own]

    def flat(
        self, inputs: Sequence[Tensor | OneHot | None], slopes: Sequence[Tensor | None]
    ) -> Tensor | None:
        """From ã and g (k, b, s, q, o) of the sites: (k, b, size); None if none was called."""
        out: Tensor | None = None
        for at, site, places in zip(self.own, self._sites, self._at, strict=True):
            a, g = inputs[at], slopes[at]
            if a is None or g is None:
                continue
            if out is None:
                out = g.new_zeros(*g.shape[:2], self.size)
            out[..., places.to(g.device)] = site.gradients(a, g)
        return out


class RestSums:
    """Σ g gᵀ, or its diagonal, over rows and roots for modules that hooks see."""

    def __init__(self, rests: Sequence[tuple[Rest, RestGradients]], like: Tensor) -> None:
        self._gradients = [gradients for _, gradients in rests]
        self.totals = [
            like.new_zeros((r.size, r.size) if r.kind == "dense" else (r.size,)) for r, _ in rests
        ]

    def add(
        self, inputs: Sequence[Tensor | OneHot | None], slopes: Sequence[Tensor | None]
    ) -> None:
        """Add rows and roots."""
        for total, gradients in zip(self.totals, self._gradients, strict=True):
            found = gradients.flat(inputs, slopes)
            if found is not None:
                rows = found.flatten(0, 1)
                total += rows.T @ rows if total.ndim == 2 else rows.square().sum(0)
