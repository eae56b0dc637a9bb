"""Layers whose gradients are products: which parameters belong together, and what goes in and out.

    ∂(uᵀf)/∂θ_h = Σ g ãᵀ        ã = [a, 1], g = ∂(uᵀf)/∂z, over all positions and calls of a layer

with the layer's outputs z = W ã; see `inputs` for what a is.

Letters: b rows in a chunk, k cotangents u, s positions (of all calls), q groups, each with o
outputs and i columns of ã.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upweight.curvature.inputs import Call, Form, counts, form_of, inputs, slopes
from upweight.curvature.onehot import OneHot, row_gradients
from upweight.risk import EmpiricalRisk

__all__ = ["WIDE", "Call", "Site", "Sites", "find_sites"]

# The factor of a side with more columns than this is diagonal.
WIDE = 8192


@dataclass(frozen=True)
class Site:
    """A weight with its bias, or one of them, and the modules that use it.

    Attributes
    ----------
    name
        That of the module, or of the parameter where other parameters of the module are elsewhere.
    modules
        All modules that hold the parameters: several where they are tied.
    names, starts
        Of weight and bias in θ; None for one that does not belong to the site.
    groups, outputs, inputs
        q, and o and i without the one for the bias.
    form
        How the modules use the weight. Where linear layers and embeddings share it, ``"linear"``.
    mixed
        Whether linear layers and embeddings share the weight. Then the ã and g of an embedding's
        positions have changed places: its derivatives by the output are among the ã.
    """

    name: str
    modules: tuple[nn.Module, ...]
    names: tuple[str | None, str | None]
    starts: tuple[int | None, int | None]
    groups: int
    outputs: int
    inputs: int
    form: Form = "linear"
    mixed: bool = False

    @property
    def columns(self) -> int:
        """The number of columns of ã that belong to the site."""
        weight, bias = self.starts
        return (0 if weight is None else self.inputs) + (bias is not None)

    @property
    def size(self) -> int:
        """q·o·i, the number of parameters."""
        return self.groups * self.outputs * self.columns

    @property
    def wide(self) -> tuple[bool, bool]:
        """Whether the factors of g and of ã are diagonal: of a side with too many columns."""
        return self.outputs > WIDE, self.columns > WIDE

    @property
    def _flipped(self) -> bool:
        return self.form in ("transposed", "embedding")

    @property
    def entries(self) -> Tensor:
        """Where in θ the parameters are, in the order (q, o, i)."""
        q, o, i = self.groups, self.outputs, self.inputs
        weight, bias = self.starts
        parts: list[Tensor] = []
        if weight is not None:
            places = weight + torch.arange(q * o * i)
            parts.append(places.view(1, i, o).mT if self._flipped else places.view(q, o, i))
        if bias is not None:
            parts.append(bias + torch.arange(q * o).view(q, o, 1))
        return torch.cat(parts, dim=2).flatten()

    def join(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Derivatives (k, *shape) by name → (k, q, o, i)."""
        parts: list[Tensor] = []
        for at, name in enumerate(self.names):
            if name is None:
                continue
            found = tree[name].mT if at == 0 and self._flipped else tree[name]
            parts.append(found.reshape(len(found), self.groups, self.outputs, -1))
        return torch.cat(parts, dim=3)

    def extended(self, calls: Sequence[Call], b: int, dtype: torch.dtype) -> Tensor | OneHot:
        """ã (b, s, q, i) of the calls: [a, 1], or what of it belongs to the site."""
        weight, bias = self.starts
        if self.form == "embedding":
            ids = torch.cat([call.a.reshape(b, -1) for call in calls], dim=1)
            return OneHot(ids, self.inputs)
        found: list[Tensor] = []
        for call in calls:
            positions = torch.Size(call.shape).numel() // (b * self.groups * self.outputs)
            parts: list[Tensor] = []
            if weight is not None:
                own = inputs(call, self.form, b, dtype)
                assert isinstance(own, Tensor)
                parts.append(own)
            if bias is not None:
                one = torch.ones((), dtype=dtype, device=call.a.device)
                parts.append(one.expand(b, positions, self.groups, 1))
            found.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=3))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def slopes(
        self, calls: Sequence[Call], pulled: Sequence[Tensor], b: int, dtype: torch.dtype
    ) -> Tensor:
        """g (k, b, s, q, o), from derivatives (k, *z) by the outputs of the calls."""
        found = [
            slopes(call, self.form, g, b).to(dtype) for call, g in zip(calls, pulled, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def gradients(self, a: Tensor | OneHot, g: Tensor) -> Tensor:
        """Of rows and roots, (k, b, size), in the order that the parameters have in θ."""
        formed = row_gradients(a, g)  # (k, b, q, o, i)
        weight, bias = self.starts
        parts: list[tuple[int, Tensor]] = []
        if weight is not None:
            own = formed[..., : self.inputs]
            parts.append((weight, (own.mT if self._flipped else own).flatten(2)))
        if bias is not None:
            parts.append((bias, formed[..., -1].flatten(2)))
        found = [part for _, part in sorted(parts, key=lambda pair: pair[0])]
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def both(
        self, calls: Sequence[Call], pulled: Sequence[Tensor], b: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """ã (b, s, q, i) and g (k, b, s, q, o) of a mixed site.

        An embedding's gradient is Σ_s (unit vector of the token) gᵀ in the layout of the linear
        layer. Its g differs from root to root, as ã may not: each root has s positions of its own,
        where the unit vectors of the others are zero.
        """
        left: list[Tensor] = []
        right: list[Tensor] = []
        for call, g in zip(calls, pulled, strict=True):
            if form_of(call.module) == "linear":
                a = inputs(call, "linear", b, dtype)
                assert isinstance(a, Tensor)
                right.append(a)
                left.append(slopes(call, "linear", g, b).to(dtype))
                continue
            k, tokens = len(g), inputs(call, "embedding", b, dtype)
            assert isinstance(tokens, OneHot)
            own = g.reshape(k, b, -1, 1, self.inputs).to(dtype)
            right.append(own.transpose(0, 1).flatten(1, 2))  # (b, k·s, 1, i)
            units = tokens.dense(dtype)  # (b, s, 1, o)
            spread = units.new_zeros(k, b, k, *units.shape[1:])
            spread[range(k), :, range(k)] = units
            left.append(spread.flatten(2, 3))
        return torch.cat(right, dim=1), torch.cat(left, dim=2)


# --- which parameters ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sites:
    """The parameters of a model by how their gradients are had.

    Attributes
    ----------
    factored
        Sites with Kronecker factors.
    rests
        Sites without, whose gradients are products all the same.
    reasons
        Why a parameter has no Kronecker factors; also for those in `rests`.
    """

    factored: list[Site]
    rests: list[Site]
    reasons: dict[str, str]


Uses = Sequence[tuple[nn.Module, str]]


def find_sites(risk: EmpiricalRisk) -> Sites:
    """Weights and biases of all layers that are known, by what they are used for."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in risk.model.model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, attribute))
    parameters = dict(risk.model.model.named_parameters())
    found = Sites([], [], {})
    together: dict[tuple[int, ...], dict[str, tuple[str, int]]] = {}
    chosen: dict[int, int] = {}  # by module: how many of its parameters are in θ
    modules: dict[tuple[int, ...], tuple[nn.Module, ...]] = {}
    factored: dict[tuple[int, ...], bool] = {}
    start = 0
    for name, size in zip(risk.model.names, risk.model.sizes, strict=True):
        uses = owners[id(parameters[name])]
        reason = _reason(uses)
        if reason is not None:
            found.reasons[name] = reason
        if reason is None or _is_product(uses):
            key = tuple(sorted(id(module) for module, _ in uses))
            together.setdefault(key, {})[uses[0][1]] = (name, start)
            modules[key] = tuple(module for module, _ in uses)
            factored[key] = reason is None
        for module, _ in uses:
            chosen[id(module)] = chosen.get(id(module), 0) + 1
        start += size
    for key, at in together.items():
        site = _site(modules[key], at, all(chosen[one] == len(at) for one in key))
        (found.factored if factored[key] else found.rests).append(site)
    return found


def _reason(uses: Uses) -> str | None:
    """Why a parameter that is used so has no Kronecker factors; None where it may have."""
    forms = {form_of(module) for module, _ in uses}
    known = {"linear", "transposed", "conv"}
    for module, _ in uses:
        if form_of(module) not in known:
            kind = type(module).__name__
            if len(uses) > 1:
                return f"it is shared with a layer of type {kind}"
            return f"{kind} is no linear or convolutional layer"
    if len({attribute for _, attribute in uses}) > 1 or uses[0][1] not in ("weight", "bias"):
        return f"it is not the weight or bias of a {type(uses[0][0]).__name__} alone"
    if len({getattr(module, "groups", 1) for module, _ in uses}) > 1:
        return "convolutions with different groups share it"
    if len(forms) > 1:
        return f"layers of types {_kinds(uses)} share it"
    return None


def _is_product(uses: Uses) -> bool:
    """Whether gradients are products where there are no Kronecker factors."""
    forms = {form_of(module) for module, _ in uses}
    alone = {attribute for _, attribute in uses}
    if None in forms or len(alone) > 1 or not alone <= {"weight", "bias"}:
        return False
    return forms == {"linear", "embedding"} or (len(forms) == 1 and forms != {"conv"})


def _kinds(uses: Uses) -> str:
    return ", ".join(sorted({type(module).__name__ for module, _ in uses}))


def _site(modules: tuple[nn.Module, ...], at: dict[str, tuple[str, int]], whole: bool) -> Site:
    weight, bias = at.get("weight"), at.get("bias")
    forms: list[Form | None] = [form_of(module) for module in modules]
    mixed = len(set(forms)) > 1
    main = forms.index("linear") if mixed else 0
    module, form = modules[main], forms[main]
    assert form is not None
    first = (weight or bias or ("", 0))[0]
    q, o, i = counts(module, form)  # of the module: a parametrised one has no such parameter
    return Site(
        name=(first.rpartition(".")[0] or type(module).__name__) if whole else first,
        modules=modules,
        names=(weight and weight[0], bias and bias[0]),
        starts=(weight and weight[1], bias and bias[1]),
        groups=q,
        outputs=o,
        inputs=i,
        form=form,
        mixed=mixed,
    )
