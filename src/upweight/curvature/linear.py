"""Exact curvatures, written out, of networks whose θ are weights and biases of plain linear layers.

A zero δ_l is added to the output of every layer, z_l = W_l a_l + c_l + δ_l. All that θ_l does, it does
through z_l, so with ã_l = [a_l, 1] the derivatives by θ follow from those by δ, row by row:

    ∂ℓ/∂θ_l[o,i] = g_l[o] ã_l[i]                            g = ∂ℓ/∂δ  (b, D)
    C_lm[o,i; o',i'] = 1/n Σ_rows  M_lm[o,o'] ã_l[i] ã_m[i']
    H_lm[o,i; o',i'] = 1/n Σ_rows  M_lm[o,o'] ã_l[i] ã_m[i']
                                 + g_l[o] A_lm[i,o'] ã_m[i'] + g_m[o'] A_ml[i',o] ã_l[i]

with M = JᵀS SᵀJ, J = ∂output/∂δ, for the GGN and the Fisher matrices C (S: roots of the curvature in
the output), and M = ∂²ℓ/∂δ∂δ, A_lm = ∂a_l/∂δ_m for the Hessian H: D directional derivatives, not p.

Letters: b rows in a chunk, layers l and m with o and o' outputs and i and i' columns of ã, D = Σ o_l,
K roots per row, p parameters.

References
----------
A. Botev, H. Ritter, D. Barber, *Practical Gauss-Newton optimisation for deep learning*, ICML 2017, §3.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
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

        slopes = grad(loss, has_aux=True)
        zeros = taps.zeros(len(chunk))
        g, a = slopes(zeros)  # (b, o) and (b, i) per layer

        def moved(shifts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            g, a = slopes(shifts)
            return g, [a[l] for l in taps.moving]

        curved, inner = taps.pushforward(moved, zeros)  # (D, b, o) and (D, b, i)
        sums.add_tangents(curved, a)
        for l, pushed in zip(taps.moving, inner, strict=True):
            sums.add_inner(l, pushed, g[l], a)

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
        K, and S (b, K, *o) with A = S Sᵀ; None where K is too large: D products with A instead.
    multiply
        A u for a chunk, its output and u (k, b, *o).

    Returns
    -------
    None where θ does not consist of linear layers that are each called once, with inputs (b, i).
    """
    return None


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
        return self.module.out_features

    @property
    def inputs(self) -> int:
        """The number of columns of ã that are inputs."""
        return 0 if self.weight is None else self.module.in_features

    @property
    def columns(self) -> int:
        """The number of columns of ã."""
        return self.inputs + (self.bias is not None)

    def extend(self, a: Tensor) -> Tensor:
        """ã (b, i) for inputs a: [a, 1], or what of it belongs to chosen parameters."""
        parts = [] if self.weight is None else [a]
        parts += [] if self.bias is None else [torch.ones_like(a[:, :1])]
        return torch.cat(parts, dim=1)

    def segments(self) -> list[tuple[slice, slice]]:
        """Which entries of θ belong to which columns of ã; in θ the order is (o, columns)."""
        found: list[tuple[slice, slice]] = []
        if self.weight is not None:
            size = self.module.weight.numel()
            found.append((slice(self.weight, self.weight + size), slice(0, self.inputs)))
        if self.bias is not None:
            stop = self.bias + self.outputs
            found.append((slice(self.bias, stop), slice(self.inputs, self.columns)))
        return found


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
