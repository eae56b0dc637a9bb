"""Linear and convolutional layers: which parameters belong together, and what goes in and out.

    ∂(uᵀf)/∂θ_h = Σ g ãᵀ        ã = [a, 1], g = ∂(uᵀf)/∂z, over all positions and calls of a layer

with the layer's outputs z = W ã; for a convolution a is the patch under the kernel.

Letters: b rows in a chunk, k cotangents u, s positions (of all calls), q groups of a convolution,
each with o outputs and i columns of ã.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upweight.risk import EmpiricalRisk

__all__ = ["Call", "Layer", "Site", "find_sites"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = nn.Linear | Conv


@dataclass(frozen=True)
class Call:
    """One call of a layer: its input a, and the δ that was added to its output."""

    module: Layer
    a: Tensor
    shift: Tensor


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
    """

    name: str
    modules: tuple[Layer, ...]
    names: tuple[str | None, str | None]
    starts: tuple[int | None, int | None]
    groups: int
    outputs: int
    inputs: int

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
    def entries(self) -> Tensor:
        """Where in θ the parameters are, in the order (q, o, i)."""
        q, o, i = self.groups, self.outputs, self.inputs
        weight, bias = self.starts
        parts: list[Tensor] = []
        if weight is not None:
            parts.append(weight + torch.arange(q * o * i).view(q, o, i))
        if bias is not None:
            parts.append(bias + torch.arange(q * o).view(q, o, 1))
        return torch.cat(parts, dim=2).flatten()

    def join(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Derivatives (k, *shape) by name → (k, q, o, i)."""
        shape = (self.groups, self.outputs, -1)
        parts = [tree[n].reshape(len(tree[n]), *shape) for n in self.names if n is not None]
        return torch.cat(parts, dim=3)

    def extended(self, calls: Sequence[Call], b: int, dtype: torch.dtype) -> Tensor:
        """ã (b, s, q, i) of the calls: [a, 1], or what of it belongs to the site."""
        weight, bias = self.starts
        found: list[Tensor] = []
        for call in calls:
            shape = (b, _positions(call) // b, self.groups)
            parts: list[Tensor] = []
            if weight is not None:
                parts.append(_patches(call).reshape(*shape, self.inputs).to(dtype))
            if bias is not None:
                one = torch.ones((), dtype=dtype, device=call.shift.device)
                parts.append(one.expand(*shape, 1))
            found.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=3))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def slopes(self, calls: Sequence[Call], pulled: Sequence[Tensor], b: int) -> Tensor:
        """g (k, b, s, q, o), from derivatives (k, *z) by the δ of the calls."""
        found: list[Tensor] = []
        for call, g in zip(calls, pulled, strict=True):
            by_position = g if isinstance(call.module, nn.Linear) else g.flatten(3).transpose(2, 3)
            found.append(by_position.reshape(len(g), b, -1, self.groups, self.outputs))
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def _positions(call: Call) -> int:
    """Outputs of a layer in all rows, each with all its channels."""
    return call.shift.numel() // call.module.weight.shape[0]


def _patches(call: Call) -> Tensor:
    """What every output of a layer is made of, (rows, …positions, q, i)."""
    a, conv = call.a, call.module
    if isinstance(conv, nn.Linear):
        return a
    d = len(conv.kernel_size)
    for axis, kernel, stride, dilation in zip(
        range(2, 2 + d), conv.kernel_size, conv.stride, conv.dilation, strict=True
    ):
        if axis == 2:
            a = _padded(a, conv)
        a = a.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    # (rows, q, c/q, *positions, *kernel) -> (rows, *positions, q, c/q, *kernel)
    a = a.unflatten(1, (conv.groups, -1)).movedim((1, 2), (1 + d, 2 + d))
    return a.flatten(2 + d)


def _padded(a: Tensor, conv: Conv) -> Tensor:
    sides: list[int] = []  # F.pad begins with the last dimension
    for at in reversed(range(len(conv.kernel_size))):
        if isinstance(conv.padding, str):
            whole = conv.dilation[at] * (conv.kernel_size[at] - 1) if conv.padding == "same" else 0
            sides += [whole // 2, whole - whole // 2]
        else:
            sides += [conv.padding[at]] * 2
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(a, sides, mode=mode) if any(sides) else a


# --- which parameters ----------------------------------------------------------------------------


def find_sites(risk: EmpiricalRisk) -> tuple[list[Site], dict[str, str]]:
    """Weights and biases of linear and convolutional layers; for other parameters the reason."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in risk.model.model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, attribute))
    parameters = dict(risk.model.model.named_parameters())
    reasons: dict[str, str] = {}
    together: dict[tuple[int, ...], dict[str, tuple[str, int]]] = {}
    chosen: dict[int, int] = {}  # by module: how many of its parameters are in θ
    found: dict[tuple[int, ...], tuple[Layer, ...]] = {}
    start = 0
    for name, size in zip(risk.model.names, risk.model.sizes, strict=True):
        uses = owners[id(parameters[name])]
        modules = tuple(module for module, _ in uses)
        reason = _reason(uses)
        if reason is None:
            key = tuple(sorted(id(module) for module in modules))
            together.setdefault(key, {})[uses[0][1]] = (name, start)
            found[key] = cast(tuple[Layer, ...], modules)
        else:
            reasons[name] = reason
        for module in modules:
            chosen[id(module)] = chosen.get(id(module), 0) + 1
        start += size
    sites = [
        _site(found[key], at, all(chosen[one] == len(at) for one in key))
        for key, at in together.items()
    ]
    return sites, reasons


def _reason(uses: Sequence[tuple[nn.Module, str]]) -> str | None:
    """Why a parameter that is used so has no Kronecker factors; None where it may have."""
    for module, _ in uses:
        if not isinstance(module, Layer):
            kind = type(module).__name__
            if len(uses) > 1:
                return f"it is shared with a layer of type {kind}"
            return f"{kind} is no linear or convolutional layer"
    if len({attribute for _, attribute in uses}) > 1 or uses[0][1] not in ("weight", "bias"):
        return f"it is not the weight or bias of a {type(uses[0][0]).__name__} alone"
    if len({getattr(module, "groups", 1) for module, _ in uses}) > 1:
        return "convolutions with different groups share it"
    return None


def _site(modules: tuple[Layer, ...], at: dict[str, tuple[str, int]], whole: bool) -> Site:
    weight, bias = at.get("weight"), at.get("bias")
    module = modules[0]
    first = (weight or bias or ("", 0))[0]
    shape = module.weight.shape  # of a parametrised layer no parameter
    groups = int(getattr(module, "groups", 1))
    return Site(
        name=(first.rpartition(".")[0] or type(module).__name__) if whole else first,
        modules=modules,
        names=(weight and weight[0], bias and bias[0]),
        starts=(weight and weight[1], bias and bias[1]),
        groups=groups,
        outputs=shape[0] // groups,
        inputs=shape[1:].numel(),
    )
